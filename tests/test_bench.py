"""``modegpt bench``: what is counted is counted right, and what is timed is put together right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import modegpt
from family_table import BY_NAME
from helpers import compress_arguments, run_cli, tiny_llama, token_windows
from modegpt.address import open_model
from modegpt.bench import Load, Ratio, Timing, _memory, macs_per_token, measure, odd_share


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "small"
    assert (
        run_cli(*compress_arguments(tiny_checkpoint, directory, text_file, "--evaluate", "none", "--quiet")).code == 0
    )
    return directory


def attention_channels(model: PreTrainedModel) -> tuple[int, int]:
    """Of all layers together, the channels of queries and of weighted values, and those of keys and values."""
    maps = [
        [layer.self_attn.get_submodule(name) for name in ("q_proj", "o_proj", "k_proj", "v_proj")]
        for layer in model.model.layers
    ]
    queries = sum(q.out_features + o.in_features for q, o, _, _ in maps)
    return queries, sum(k.out_features + v.out_features for _, _, k, v in maps)


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_arithmetic_is_that_of_all_maps_and_of_attention(kind: str) -> None:
    model: PreTrainedModel = tiny_llama()
    if kind == "compressed":
        model = modegpt.compress(model, ratio=0.3, calibration=token_windows(), method="modegpt")
    maps = sum(map_.weight.numel() for map_ in model.modules() if isinstance(map_, nn.Linear))
    assert macs_per_token(model, 24) == maps + 24 * attention_channels(model)[0]
    assert model.config._attn_implementation == "sdpa"


def test_cache_and_weights_are_those_of_the_model(tiny_checkpoint: Path, small: Path) -> None:
    load = Load(batch_sizes=[3], sequence_lengths=[10], new_tokens=5, repeats=2)
    for address, speed in zip((tiny_checkpoint, small), measure([str(tiny_checkpoint), str(small)], load), strict=True):
        model = modegpt.load(address) if address == small else None
        model = model or type(tiny_llama()).from_pretrained(address)
        (timing,) = speed.timings
        assert speed.parameters == model.num_parameters()
        assert speed.weight_bytes == 4 * speed.parameters
        assert timing.cache_bytes == 4 * 3 * 15 * attention_channels(model)[1]
        logits = 4 * 3 * model.config.vocab_size
        assert timing.peak_bytes > speed.weight_bytes + timing.cache_bytes + logits
        assert len(timing.prefill) == len(timing.steps) == 2
        assert [len(steps) for steps in timing.steps] == [5, 5]


def test_the_same_model_again_needs_the_same_memory(tiny_checkpoint: Path) -> None:
    load = Load(batch_sizes=[1, 2, 1], sequence_lengths=[16], new_tokens=3, repeats=1)
    first, second = measure([str(tiny_checkpoint)] * 2, load)
    peaks = [[timing.peak_bytes for timing in speed.timings] for speed in (first, second)]
    assert peaks[0] == peaks[1]
    assert peaks[0][0] == peaks[0][2] < peaks[0][1]


def test_experts_are_counted() -> None:
    """Of each token those that it is sent to."""
    model = BY_NAME["mixtral"].build()
    config, layers = model.config, model.config.num_hidden_layers
    experts = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    maps = sum(map_.weight.numel() for map_ in model.modules() if isinstance(map_, nn.Linear))
    router = sum(layer.mlp.gate.weight.numel() for layer in model.model.layers)
    expected = maps + router + layers * experts + 8 * attention_channels(model)[0]
    assert macs_per_token(model, 8) == expected


def test_odd_widths_are_shown() -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=48, vocab_size=128)
    assert odd_share(model) == 0
    model = tiny_llama(hidden_size=32, intermediate_size=50, vocab_size=128)
    mlps = 3 * 3 * 32 * 50
    maps = sum(map_.weight.numel() for map_ in model.modules() if isinstance(map_, nn.Linear))
    assert odd_share(model) == mlps / maps


def test_odd_widths_of_other_maps_are_shown() -> None:
    """GPT-2's are no linear layers, and those of experts no layers at all."""
    gpt2 = BY_NAME["gpt2"].build(n_inner=50)
    layers = gpt2.transformer.h
    maps = sum(one.weight.numel() for one in gpt2.modules() if isinstance(one, (nn.Linear, Conv1D)))
    assert odd_share(gpt2) == len(layers) * 2 * 32 * 50 / maps
    mixtral = BY_NAME["mixtral"].build(intermediate_size=22)
    experts = sum(one.numel() for one in mixtral.parameters() if one.dim() == 3)
    others = sum(one.weight.numel() for one in mixtral.modules() if isinstance(one, nn.Linear))
    assert experts > 0
    assert odd_share(mixtral) == experts / (experts + others)


def test_models_take_turns(tiny_checkpoint: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run(model: PreTrainedModel, ids: torch.Tensor, count: int) -> tuple[list[float], None]:
        order.append(type(model).__name__)
        return [1.0] * (count + 1), None

    monkeypatch.setattr("modegpt.bench._run", run)
    monkeypatch.setattr("modegpt.bench._memory", lambda *_: (0, 0))
    measure([str(tiny_checkpoint), str(small)], Load([1, 2], [4], 1, repeats=3))
    turn = [type(tiny_llama()).__name__, type(modegpt.load(small)).__name__]
    assert order == [*turn, *turn[::-1], *turn] * 2  # so that a steady drift slows neither


def measured_batches(printed: str, name: str) -> list[str]:
    """What the two tables by numbers of sequences have for a model."""
    return [line.split()[0] for line in printed.splitlines() if line.split()[1:2] == [name]]


def test_a_batch_that_does_not_fit_is_left_out(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By prediction on a CPU: the batch of 16 is not begun, one of 4 is measured."""
    model = type(tiny_llama()).from_pretrained(tiny_checkpoint)
    _, alone = _memory(model, torch.zeros(1, 8, dtype=torch.int64), Load([1], [8], 2))
    free = SimpleNamespace(available=5 * alone)
    monkeypatch.setattr("modegpt.bench.psutil.virtual_memory", lambda: free)
    options = ("--sequence-length", 8, "--new-tokens", 2, "--repeats", 1)
    outcome = run_cli("bench", tiny_checkpoint, "--batch-sizes", "16,4", *options)
    assert outcome.code == 0, outcome.err
    assert re.search(r"Batches of 16 x 8 tokens are left out: about \S+ GB are needed and \S+ GB are free", outcome.err)
    assert measured_batches(outcome.out, tiny_checkpoint.name) == ["4", "4"]
    outcome = run_cli("bench", tiny_checkpoint, "--batch-sizes", "16,64", *options, "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--batch-sizes 16,64: none fits in memory; use less" in outcome.err


def test_what_runs_out_of_memory_all_the_same_is_left_out(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(model: PreTrainedModel, ids: torch.Tensor, count: int) -> tuple[list[float], DynamicCache]:
        if len(ids) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
        return [1.0] * (count + 1), DynamicCache(config=model.config)

    monkeypatch.setattr("modegpt.bench._run", run)
    options = ("--batch-sizes", "2,3,4", "--sequence-length", 8, "--new-tokens", 2, "--repeats", 1)
    outcome = run_cli("bench", tiny_checkpoint, *options)
    assert outcome.code == 0, outcome.err
    assert "Batches of 3 x 8 tokens are left out: CUDA out of memory. Tried to allocate 2.00 GiB\n" in outcome.err
    assert measured_batches(outcome.out, tiny_checkpoint.name) == ["2", "4", "2", "4"]


@pytest.mark.parametrize(
    ("where", "words"),
    [("_run", "one sequence of 10 tokens does not fit: CUDA out"), ("open_model", "the models do not fit together")],
)
def test_where_nothing_fits_there_is_one_line(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, where: str, words: str
) -> None:
    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    opened = open_model(str(tiny_checkpoint))
    value = too_much if where == "_run" else lambda *_, **__: (*opened[:2], too_much)
    monkeypatch.setattr(f"modegpt.bench.{where}", value)
    options = ("--batch-sizes", "2", "--sequence-length", 8, "--new-tokens", 2, "--repeats", 1, "--quiet")
    outcome = run_cli("bench", tiny_checkpoint, *options)
    assert (outcome.code, outcome.out, outcome.err.count("\n"), words in outcome.err) == (2, "", 1, True), outcome.err


def test_compiled_models_are_measured_as_such(
    tiny_checkpoint: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that changes nothing, to be fast: every token, timed or not, is one call of what it made."""
    calls: list[int] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        return lambda *inputs: (calls.append(id(graph)), graph(*inputs))[1]

    monkeypatch.setattr("modegpt.bench.COMPILER", compiler)
    path, options = tmp_path / "bench.json", ("--batch-sizes", 1, "--sequence-length", 8, "--new-tokens", 2)
    outcome = run_cli("bench", tiny_checkpoint, small, "--compile", *options, "--repeats", 3, "--output", path)
    assert outcome.code == 0, outcome.err
    runs = 2 + 2 + 3  # for the memory of one sequence and of a batch, and timed
    assert len(calls) == 2 * runs * 3
    found = json.loads(path.read_text())
    assert found["settings"]["compile"] is True
    plain = measure([str(tiny_checkpoint), str(small)], Load([1], [8], 2, 1))
    assert [one["macs_per_token"] for one in found["models"]] == [one.macs_per_token for one in plain]


def test_models_never_run_uncompiled_for_want_of_variants(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modegpt.bench.COMPILER", "eager")
    monkeypatch.setattr("modegpt.bench.GRAPHS", 1)
    outcome = run_cli("bench", tiny_checkpoint, "--compile", "--sequence-length", 8, "--new-tokens", 2)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(r"^modegpt: --compile: .*recompile_limit_hit; leave it out$", outcome.err, flags=re.MULTILINE)


def test_a_compiler_that_fails_is_one_line(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("modegpt.bench.COMPILER", fail)
    outcome = run_cli("bench", tiny_checkpoint, "--compile", "--sequence-length", 8, "--new-tokens", 2)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(r"^modegpt: --compile: .*no compiler here; leave it out$", outcome.err, flags=re.MULTILINE)


def test_rates_ratios_and_percentiles_of_known_seconds() -> None:
    load = Load([2], sequence_lengths=[10], new_tokens=4, repeats=3)
    own = Timing(2, 10, prefill=[1.0, 2.0, 4.0], steps=[[1.0] * 4, [2.0] * 4, [3.0] * 4])
    assert own.speeds(load) == (2 * 10 / 2.0, 2 * 4 / 8.0)
    assert own.latencies() == [2.0, 3.0, 3.0]
    assert Ratio.of(own.prefill, [2.0, 3.0, 4.0]) == Ratio(1.5, 1.0, 2.0)


def test_the_command_prints_and_keeps_all_numbers(tiny_checkpoint: Path, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    options = ("--batch-sizes", "1,4", "--sequence-length", "16,8", "--new-tokens", 3, "--repeats", 2, "--threads", 1)
    outcome = run_cli("bench", tiny_checkpoint, small, *options, "--output", path)
    assert outcome.code == 0, outcome.err
    facts = json.loads(path.read_text())
    assert [one["model"] for one in facts["models"]] == [str(tiny_checkpoint), str(small)]
    assert facts["machine"]["threads"] == 1
    assert facts["settings"]["new_tokens"] == 3
    lines = [line.split() for line in outcome.out.splitlines()]
    for one in facts["models"]:
        loads = [(row["sequence_length"], row["batch_size"]) for row in one["rows"]]
        assert loads == [(16, 1), (16, 4), (8, 1), (8, 4)]
        for load, row in zip(loads, one["rows"], strict=True):
            name = Path(one["model"]).name
            shown = next(line for line in lines if line[:3] == [*map(str, load), name])
            median, least, greatest = row["prefill_ratio"]
            assert shown[3] == f"{row['prefill_tokens_per_second']:,.0f}"
            assert shown[4:6] == [f"{median:.2f}", f"({least:.2f}-{greatest:.2f})"]
            seconds = row["seconds"]["prefill"]
            assert row["first_token_seconds"] == pytest.approx(sum(seconds) / 2)
            assert row["prefill_tokens_per_second"] == pytest.approx(math.prod(load) / row["first_token_seconds"])
            others = facts["models"][0]["rows"][loads.index(load)]
            ratios = [ours / own for ours, own in zip(others["seconds"]["prefill"], seconds, strict=True)]
            assert row["prefill_ratio"] == pytest.approx([sum(ratios) / 2, min(ratios), max(ratios)])
    assert facts["models"][0]["rows"][0]["decode_ratio"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--batch-sizes", "1,x"), "--batch-sizes '1,x': give whole numbers separated by commas"),
        (("--batch-sizes", "0"), "--batch-sizes 0: must be at least 1"),
        (("--sequence-length", "16,8k"), "--sequence-length '16,8k': give whole numbers separated by commas"),
        (("--sequence-length", "16,0"), "--sequence-length 0: must be at least 1"),
        (("--repeats", 0), "--repeats 0: must be at least 1"),
        (("--new-tokens", 0), "--new-tokens 0: must be at least 1"),
        (("--threads", 0), "--threads 0: must be at least 1"),
        (("--sequence-length", 120), "--sequence-length and --new-tokens: 152 tokens exceeds the model's 128"),
        (("--output", "speed.txt"), "--output 'speed.txt': name a .json file"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_checkpoint: Path, options: tuple[object, ...], problem: str) -> None:
    outcome = run_cli("bench", tiny_checkpoint, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert problem in outcome.err
    assert "Loading the model" not in outcome.err
