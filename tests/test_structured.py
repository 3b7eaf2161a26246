"""The structured baselines through the real pipeline: in memory, on disk, interrupted, loaded again, generating."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import modegpt
from family_table import BY_NAME, layers_of
from helpers import run_cli, tiny_llama, tiny_tokenizer, token_windows
from modegpt.budget import kept_parameters
from modegpt.config import CompressionConfig, RunConfig
from modegpt.engine import Engine, compress_model
from modegpt.families import model_geometry
from modegpt.journal import Journal, work_directory
from modegpt.methods import METHODS
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.report import CompressionReport
from modegpt.sources import ModelSource

LAYERS = ["shortgpt"]
BASELINES = ["magnitude", "obc", *LAYERS]
NAMES = [
    "llama-gqa",
    "llama-biases",
    "qwen3",
    "olmo2",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "phi3",
    "opt",
    "cohere-norms",
    "stablelm-norms",
    "mixtral",
    "qwen3-moe",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Path]:
    """Makes a row's stock checkpoint with a tokenizer, as a Hugging Face directory."""
    tokenizer, scratch = tiny_tokenizer(text_file.read_text()), tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        if not (scratch / name).exists():
            BY_NAME[name].build(vocab_size=len(tokenizer) + 8).save_pretrained(scratch / name)
            tokenizer.save_pretrained(scratch / name)
        return scratch / name

    return make


def saved(directory: Path, report: CompressionReport) -> int:
    """Parameters of the layers in a checkpoint's tensors: all numbers in them but the kept rotary pairs."""
    tensors = load_file(directory / "model.safetensors")
    inside = [tensor for name, tensor in tensors.items() if any(part.isdigit() for part in name.split("."))]
    assert report.bytes.compressed == sum(t.numel() * t.element_size() for t in tensors.values())
    return sum(tensor.numel() for tensor in inside if tensor.is_floating_point())


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", BASELINES)
def test_the_whole_way(
    method: str,
    name: str,
    checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here survives a crash of the machine anyhow
    options = {"method": method, "ratio": 0.3, "samples": 6, "sequence_length": 32, "batch_size": 4}
    directory = checkpoint(name)

    def config(output: str) -> RunConfig:
        return RunConfig.validated(
            model=str(directory), output=tmp_path / output, calibration=str(text_file), **options
        )

    report = compress_to_directory(config("whole"))
    loaded = modegpt.load(tmp_path / "whole")

    # In memory the same comes out, with the same report.
    source = ModelSource(str(directory))
    stock, texts = source.model(), read_texts(config("whole"), source.tokenizer())
    thin = modegpt.compress(stock, calibration=texts.calibration, **options)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(thin.state_dict()), rtol=0, atol=0)
    assert [layer.modules for layer in report.layers] == [layer.modules for layer in thin.compression_report.layers]
    assert report.perplexity is not None
    measured = [modegpt.perplexity(model, texts.evaluation, batch_size=4) for model in (stock, thin)]
    assert [report.perplexity.dense, report.perplexity.compressed] == pytest.approx(measured, rel=1e-5)

    # The parameters that are counted are those that are there.
    own = METHODS[method].from_config(CompressionConfig.validated(method=method, ratio=0.3))
    ranks = [{module: result.rank for module, result in layer.modules.items()} for layer in report.layers]
    counted = kept_parameters(model_geometry(stock, own.geometry), ranks)
    assert counted == report.block_parameters.compressed == saved(tmp_path / "whole", report)
    assert counted == sum(parameter.numel() for parameter in layers_of(loaded).parameters())

    # It generates with a cache as without.
    ids = token_windows(2, 9).ids
    assert torch.equal(greedy(loaded, ids), greedy(loaded, ids, use_cache=False))

    # An interrupted run gives the same.
    keep_layer, kept = Journal.keep_layer, []

    def keep(self: Journal, index: int, *arguments: Any) -> None:
        keep_layer(self, index, *arguments)
        kept.append(index)
        if kept == [0, 1]:
            raise KeyboardInterrupt

    with patch.object(Journal, "keep_layer", keep):
        with pytest.raises(KeyboardInterrupt):
            compress_to_directory(config("resumed"))
        resumed = compress_to_directory(config("resumed"))
    assert kept == [0, 1, 2]
    assert resumed.layers == report.layers
    whole, again = (load_file(tmp_path / output / "model.safetensors") for output in ("whole", "resumed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert not work_directory(tmp_path / "resumed").exists()


# Whole layers


def stock_without(model: PreTrainedModel, gone: list[int]) -> PreTrainedModel:
    """A copy whose layers ``gone`` only pass their input on."""
    result = copy.deepcopy(model)
    for index in gone:
        layers_of(result)[index].forward = lambda hidden_states, *_, **__: hidden_states
    return result


def gone_in(report_or_layers: Any) -> list[int]:
    return [index for index, layer in enumerate(report_or_layers) if layer.modules["layer"].rank == 0]


@pytest.mark.parametrize("ratio", [0.2, 0.6])
@pytest.mark.parametrize(
    "name", ["llama-gqa", "gemma3", "ministral", "qwen2-window", "gpt2", "qwen3-moe", "mixtral", "opt"]
)
@pytest.mark.parametrize("method", LAYERS)
def test_without_a_layer_the_others_do_what_they_did(method: str, name: str, ratio: float) -> None:
    model = BY_NAME[name].build(num_hidden_layers=5, **_layers_of_five(name))
    result = compress_model(model, token_windows(), CompressionConfig.validated(method=method, ratio=ratio))
    gone = gone_in(result.layers)
    assert len(gone) == round(5 * ratio)
    assert result.model.config.num_hidden_layers == len(layers_of(result.model)) == 5 - len(gone)
    ids = token_windows(3, 24, seed=5).ids
    with torch.no_grad():
        expected, found = (each(ids, use_cache=False).logits for each in (stock_without(model, gone), result.model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [layer.self_attn.layer_idx for layer in layers_of(result.model) if hasattr(layer, "self_attn")] in (
        [],
        list(range(5 - len(gone))),
    )


def _layers_of_five(name: str) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
    return {"layer_types": kinds} if name in ("gemma3", "ministral") else {}


def test_the_layers_of_least_influence_go() -> None:
    model = tiny_llama(num_hidden_layers=6)
    with torch.no_grad():
        for index in (1, 4):  # nearly nothing is added to the stream
            model.model.layers[index].self_attn.o_proj.weight *= 1e-3
            model.model.layers[index].mlp.down_proj.weight *= 1e-3
    result = compress_model(model, token_windows(), CompressionConfig.validated(method="shortgpt", ratio=0.3))
    assert gone_in(result.layers) == [1, 4]
    assert result.choice.scores is not None
    assert sorted(range(6), key=lambda index: result.choice.scores[index])[:2] in ([1, 4], [4, 1])


@pytest.mark.parametrize("method", LAYERS)
def test_what_cannot_be_done_with_whole_layers_is_refused_in_one_line(
    method: str, checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    def refused(*options: object, model: str = "llama-gqa") -> str:
        outcome = run_cli(
            *("compress", checkpoint(model), "--method", method, "--output", tmp_path / "out"),
            *("--calibration", text_file, "--samples", 4, "--sequence-length", 32, *options),
        )
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return outcome.err

    assert "--allocation" in refused("--ratio", 0.3, "--allocation", "uniform")
    assert "use 0.167 to 0.833" in refused("--ratio", 0.1)
    assert "--ratio 0.9" in refused("--ratio", 0.9)
    assert "mlp" in refused("--ratio", 0.3, "--modules", "mlp")
    assert "depends on its number" in refused("--ratio", 0.3, model="gpt2-layer-scale")


def test_scores_are_not_measured_again(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    for method, options in (("shortgpt", {}), ("magnitude", {"allocation": "owl", "owl_threshold": 2.0})):
        config = RunConfig.validated(
            model=str(checkpoint("llama-gqa")),
            output=tmp_path / method,
            calibration=str(text_file),
            **{"method": method, "ratio": 0.3, "samples": 4, "sequence_length": 32, **options},
        )
        with patch.object(Engine, "compress", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            compress_to_directory(config)
        with patch("modegpt.scores.over_layers", side_effect=AssertionError("again")):
            compress_to_directory(config)
        assert (tmp_path / method / "compression.json").is_file()
