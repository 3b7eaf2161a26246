"""The structured baselines through the real pipeline: in memory, on disk, interrupted, loaded again, generating."""

from __future__ import annotations

import copy
import json
import math
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
from family_table import BY_NAME, heads_of, layers_of, mlps_of
from helpers import compress_interrupted, run_cli, tiny_llama, token_windows
from modegpt.budget import kept_parameters
from modegpt.config import CompressionConfig, RunConfig
from modegpt.engine import Compression, Engine, compress_model
from modegpt.families import model_geometry
from modegpt.layered import resident
from modegpt.methods import METHODS
from modegpt.methods.sleb import losses_without
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.report import CompressionReport
from modegpt.results import Choice
from modegpt.sources import ModelSource

LAYERS = ["shortgpt", "sleb"]
BASELINES = ["magnitude", "obc", "flap", *LAYERS]
HEADS = ["obc", "flap"]
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


def saved(directory: Path, report: CompressionReport) -> int:
    """Parameters of the layers in a checkpoint's tensors: all numbers in them but the kept rotary pairs."""
    tensors = load_file(directory / "model.safetensors")
    inside = [tensor for name, tensor in tensors.items() if any(part.isdigit() for part in name.split("."))]
    assert report.bytes.compressed == sum(t.numel() * t.element_size() for t in tensors.values())
    return sum(tensor.numel() for tensor in inside if tensor.is_floating_point())


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize(
    ("method", "name"),
    [(one, name) for one in BASELINES for name in NAMES if one != "flap" or name not in ("mixtral", "qwen3-moe")],
)
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
    (held_out,) = texts.evaluation.values()
    measured = [modegpt.perplexity(model, held_out, batch_size=4) for model in (stock, thin)]
    assert report.perplexity is not None
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
    assert compress_interrupted(config("resumed")).layers == report.layers
    whole, again = (load_file(tmp_path / output / "model.safetensors") for output in ("whole", "resumed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


# Channels and heads


def silenced(name: str, *, repeated: bool) -> tuple[PreTrainedModel, list[list[int]]]:
    """A model of four key-value heads, of which some carry nothing or what others do, and what is to stay.

    Of the MLP the first ten channels are dead.
    """
    model = BY_NAME[name].build(num_key_value_heads=4)
    stay = []
    with torch.no_grad():
        for number, layer in enumerate(layers_of(model)):
            heads, mlp = heads_of(model, layer), mlps_of(model, layer)[0]
            mlp.output[:, :10] = 0
            gone = [number] if repeated else [number, 3]
            for head in gone:
                if not repeated:
                    heads.output[head].zero_()
                    continue
                for parts in (heads.query, heads.key, heads.value):
                    other = parts[(head + 1) % 4]
                    parts[head].weight.copy_(other.weight)
                    if other.bias is not None:
                        parts[head].bias.copy_(other.bias)
            stay.append([head for head in range(4) if head not in gone])
    return model, stay


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(token_windows(4, seed=2).ids).logits


def compress_to(
    method: str, model: PreTrainedModel, mlp: int, heads: int, *, ridge: float = 1e-9, sequential: bool = True
) -> Compression:
    own = METHODS[method].from_config(CompressionConfig.validated(method=method, ratio=0.3, ridge=ridge))
    ranks = [{"mlp": mlp, "heads": heads} for _ in layers_of(model)]
    engine = Engine(resident(model), token_windows(16), 4)
    with engine.active():
        return engine.compress(own, Choice(ranks, [{} for _ in ranks]), sequential=sequential)


@pytest.mark.parametrize(
    "name", ["llama-mha", "llama-biases", "gpt2", "gpt-neox", "phi3", "opt", "qwen3", "gemma3", "cohere"]
)
@pytest.mark.parametrize("method", HEADS)
def test_heads_and_channels_without_output_go_without_a_trace(method: str, name: str) -> None:
    model, stay = silenced(name, repeated=False)
    result = compress_to(method, model, 38, 2)
    torch.testing.assert_close(logits(result.model), logits(model), rtol=1e-3, atol=1e-3)
    for layer, expected in zip(result.layers, stay, strict=True):
        kept = layer.modules["heads"].kept
        assert kept == expected if len(expected) == 2 else set(kept) < set(expected)
        assert layer.modules["mlp"].kept == list(range(10, 48))


@pytest.mark.parametrize("name", ["llama-mha", "llama-biases", "gpt2", "opt"])
def test_of_two_equal_heads_one_goes_without_a_trace(name: str) -> None:
    model, _ = silenced(name, repeated=True)
    result = compress_to("obc", model, 38, 3)
    torch.testing.assert_close(logits(result.model), logits(model), rtol=1e-3, atol=2e-3)
    for number, layer in enumerate(result.layers):
        assert len({number, (number + 1) % 4} & set(layer.modules["heads"].kept)) == 1


def test_errors_of_heads_are_those_of_attention_s_output() -> None:
    model = tiny_llama(num_key_value_heads=4, attention_bias=True)
    result = compress_to("obc", model, 48, 2, sequential=False)
    seen: list[torch.Tensor] = []
    layer, thin = model.model.layers[1].self_attn, layers_of(result.model)[1].self_attn
    layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        model(token_windows(16).ids)
        facts, outputs = result.layers[1].modules["heads"], seen[0] - layer.v_proj.bias.double()
        kept = [8 * head + channel for head in facts.kept for channel in range(8)]
        exact = outputs @ layer.o_proj.weight.double().T
        found = outputs[:, kept] @ thin.o_proj.weight.double().T
    assert facts.relative_error == pytest.approx(float((exact - found).norm() / exact.norm()), rel=1e-3)


@pytest.mark.parametrize("biases", [False, True])
def test_means_take_the_place_of_what_does_not_vary(biases: bool) -> None:
    """The values of one head and some MLP channels are the same for all tokens."""
    model = tiny_llama(num_key_value_heads=4, mlp_bias=biases, attention_bias=biases)
    with torch.no_grad():
        for layer in model.model.layers:
            if biases:
                layer.mlp.gate_proj.weight[:20] = 0
                layer.mlp.up_proj.weight[:20] = 0
                layer.self_attn.v_proj.weight[8:16] = 0
            else:
                layer.mlp.down_proj.weight[:, :20] = 0
                layer.self_attn.o_proj.weight[:, 8:16] = 0
    result = compress_to("flap", model, 28, 3)
    torch.testing.assert_close(logits(result.model), logits(model), rtol=1e-3, atol=1e-3)
    for layer in result.layers:
        assert layer.modules["heads"].kept == [0, 2, 3]
        assert layer.modules["mlp"].kept == list(range(20, 48))


def test_what_goes_leaves_its_mean() -> None:
    """The compressed layer's MLP, fed with the dense one's inputs, puts out the same on average."""
    model = tiny_llama()
    result = compress_to("flap", model, 20, 1, sequential=False)
    seen: list[torch.Tensor] = []
    layer, thin = model.model.layers[0], layers_of(result.model)[0]
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(token_windows(16).ids)
        heads, x = seen
        torch.testing.assert_close(thin.mlp(x).mean(0), layer.mlp(x).mean(0), rtol=1e-4, atol=1e-4)
        kept = result.layers[0].modules["heads"].kept
        found = thin.self_attn.o_proj(torch.cat([heads[:, 16 * head : 16 * head + 16] for head in kept], dim=1))
        torch.testing.assert_close(found.mean(0), layer.self_attn.o_proj(heads).mean(0), rtol=1e-4, atol=1e-4)
        assert (found - layer.self_attn.o_proj(heads)).abs().max() > 0.1


@pytest.mark.parametrize("modules", ["mlp,heads", "mlp", "heads"])
def test_flap_takes_the_lowest_of_all_standardised_scores(modules: str) -> None:
    model = BY_NAME["llama-mha"].build(num_hidden_layers=4)
    for ratio in (0.3, 0.1, 0.2, 0.15):
        config = CompressionConfig.validated(method="flap", ratio=ratio, modules=modules)
        assert config.allocation == "own"
        result = compress_model(model, token_windows(), config)
        dense, kept = (sum(p.numel() for p in layers_of(one).parameters()) for one in (model, result.model))
        unit = 4 * 32 * 8 if modules == "heads" else 3 * 32
        assert abs(dense * (1 - ratio) - kept) <= unit / 2 + 1

    seen: dict[tuple[int, str], torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name, module in (("mlp", layer.mlp.down_proj), ("heads", layer.self_attn.o_proj)):
            module.register_forward_pre_hook(
                lambda _, args, key=(index, name): seen.update({key: args[0].detach().double().flatten(0, 1)})
            )
    logits(model)
    with torch.no_grad():
        model(token_windows().ids)
    gone, stay = [], []
    for (index, name), x in seen.items():
        layer = model.model.layers[index]
        weight = (layer.mlp.down_proj if name == "mlp" else layer.self_attn.o_proj).weight.detach().double()
        metric = x.var(0, correction=0) * weight.square().sum(0)
        metric = ((metric - metric.mean()) / metric.std(correction=0)).view(-1, 1 if name == "mlp" else 8).mean(1)
        facts = result.layers[index].modules[name]
        if name not in modules.split(","):
            assert facts.rank == facts.full
            continue
        lost = facts.full - facts.rank
        assert sorted(set(range(facts.full)) - set(facts.kept)) == sorted(metric.sort().indices[:lost].tolist())
        order = metric.sort().values.tolist()
        gone += order[:lost]
        stay += order[lost:-1]  # the best of each stays anyhow
    assert gone
    # At the end a head can be more than is left to go; channels then go in its place.
    assert sum(score > min(stay) for score in gone) <= (12 if modules == "mlp,heads" else 0)


def test_experts_have_no_biases_for_flap(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    outcome = run_cli(
        *("compress", checkpoint("mixtral"), "--method", "flap", "--ratio", 0.3, "--output", tmp_path / "out"),
        *("--calibration", text_file, "--samples", 4, "--sequence-length", 32),
    )
    assert outcome.code == 2
    assert "experts" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("obc", {"num_key_value_heads": 5}, "num_key_value_heads is 5; expected 1 to 4"),
        ("obc", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ("obc", {"num_key_value_heads": "2"}, "num_key_value_heads"),
        ("obc", {"num_key_value_heads": 1, "num_attention_heads": 2}, "num_attention_heads is 2; expected 1"),
        ("obc", {"num_key_value_heads": 1, "num_attention_heads": "1"}, "num_attention_heads"),
        ("obc", {"num_key_value_heads": 1, "num_attention_heads": 1}, "mismatched"),
        ("flap", {"output_biases": "yes"}, "output_biases"),
        ("flap", {"output_biases": False}, "disagree"),
    ],
)
def test_nonsense_in_the_config_is_refused(method: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    modegpt.save(compress_to(method, tiny_llama(num_key_value_heads=4), 30, 3).model, tmp_path / "m")
    modegpt.load(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["per_layer_config"]["1"] |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(modegpt.CheckpointError, match=words):
        modegpt.load(tmp_path / "m")


def test_inspect_shows_heads_and_layers(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    for method, title in (("obc", "HEADS"), ("shortgpt", "LAYER")):
        output = tmp_path / method
        arguments = ("compress", checkpoint("llama-gqa"), "--method", method, "--ratio", 0.3, "--output", output)
        assert run_cli(*arguments, "--calibration", text_file, "--samples", 4, "--sequence-length", 32).code == 0
        outcome = run_cli("inspect", output)
        assert outcome.code == 0
        assert title in outcome.out


@pytest.mark.parametrize("method", BASELINES)
def test_a_plan_is_made_for_it(method: str, checkpoint: Callable[[str], Path]) -> None:
    for name in ("llama-gqa", "qwen3-moe") if method != "flap" else ("llama-gqa",):
        outcome = run_cli("plan", checkpoint(name), "--method", method, "--ratio", 0.3, "--sequence-length", 32)
        assert (outcome.code, outcome.err) == (0, "")
        assert "All phases" in outcome.out


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


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_sleb_takes_the_layer_that_the_loss_rises_least_without(name: str) -> None:
    model, data = BY_NAME[name].build(num_hidden_layers=5, **_layers_of_five(name)), token_windows(6, 24)
    engine = Engine(resident(model), data, 4)
    config = CompressionConfig.validated(method="sleb", ratio=0.6)
    with engine.active():
        choice = engine.choose_ranks(config)
        first = dict(losses_without(engine, []))
        second = dict(losses_without(engine, [min(first, key=lambda index: first[index])]))

    gone: list[int] = []
    for measured in (first, second, None):
        losses = {
            index: math.log(modegpt.perplexity(stock_without(model, [*gone, index]), data))
            for index in range(5)
            if index not in gone
        }
        if measured is not None:
            assert measured == pytest.approx(losses, rel=1e-5)
        gone.append(min(losses, key=lambda index: losses[index]))
    assert [rank["layer"] for rank in choice.ranks] == [int(index not in gone) for index in range(5)]


def test_sleb_goes_on_after_the_last_round(
    checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[list[int]] = []

    def counted(engine: Engine, gone: list[int]) -> list[tuple[int, float]]:
        rounds.append(list(gone))
        if rounds == [[], rounds[-1]] and len(gone) == 1:
            raise KeyboardInterrupt
        return losses_without(engine, gone)

    monkeypatch.setattr("modegpt.methods.sleb.losses_without", counted)
    config = RunConfig.validated(
        model=str(checkpoint("llama-gqa")),
        output=tmp_path / "out",
        calibration=str(text_file),
        method="sleb",
        ratio=0.6,
        samples=4,
        sequence_length=32,
    )
    with pytest.raises(KeyboardInterrupt):
        compress_to_directory(config)
    report = compress_to_directory(config)
    assert [len(gone) for gone in rounds] == [0, 1, 1]
    assert len(gone_in(report.layers)) == 2


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
