"""GGUF files of the architectures that store tensors as Transformers has them; the others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from family_table import BY_NAME
from modegpt import InvalidRequest
from modegpt.sources import ModelSource
from modegpt.stored import GGUFFile


def write_gguf(model: PreTrainedModel, path: Path, architecture: str) -> None:
    """A float32 GGUF file of ``model`` as llama.cpp's converter writes it, with a made-up vocabulary."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("name", "settings"), [("qwen2", {}), ("qwen3", {"head_dim": 128})])
def test_layers_read_from_a_gguf_file_are_the_models(name: str, settings: dict[str, int], tmp_path: Path) -> None:
    """Transformers does not read the head size of a Qwen3 file: all of them have 128."""
    model = BY_NAME[name].build(**settings)
    path = tmp_path / "model.gguf"
    write_gguf(model, path, name)
    source = ModelSource(str(path))
    config = source.config()
    assert config.model_type == name
    streamed = source.streamed(config, "auto", "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    prefix = "model.layers."
    for index, layer in enumerate(streamed.layers):
        with streamed.live(index):
            for key, tensor in layer.state_dict().items():
                torch.testing.assert_close(tensor, model.state_dict()[f"{prefix}{index}.{key}"], rtol=0, atol=0)
                torch.testing.assert_close(tensor, loaded.state_dict()[f"{prefix}{index}.{key}"], rtol=0, atol=0)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    model = BY_NAME["qwen2"].build()
    path = tmp_path / "model.gguf"
    write_gguf(model, path, "gemma2")
    with pytest.raises(InvalidRequest, match=r"'gemma2' are not supported, only llama, qwen2, qwen3; use"):
        GGUFFile(path, list(model.state_dict()), model.config)
