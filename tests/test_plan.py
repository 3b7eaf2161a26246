"""The plan: what it predicts is what a run then measures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import compress_arguments, random_text, run_cli, run_process, tiny_llama
from modegpt import memory
from modegpt.config import CompressionConfig, RunConfig
from modegpt.costs import (
    Sizes,
    elimination_bytes,
    elimination_flops,
    forward_flops,
    gram_flops,
    solve_bytes,
    spread,
    value_fit_bytes,
)
from modegpt.data import TokenWindows
from modegpt.engine import Engine, compress_model
from modegpt.methods import Greedy, ModeGPT
from modegpt.pipeline import plan_request
from modegpt.plan import Plan, Shape, predict, shape_of

LLAMA_7B = Sizes(layers=32, hidden=4096, intermediate=11008, heads=32, groups=32, head=128, gates=2)


@pytest.fixture(scope="module")
def wide_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers, statistics and hidden states outweigh the program."""
    directory = tmp_path_factory.mktemp("models") / "wide"
    tiny_tokenizer_files = [path for path in tiny_checkpoint.iterdir() if path.name.startswith("tokenizer")]
    model = tiny_llama(
        vocab_size=40_000,
        hidden_size=512,
        intermediate_size=2560,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.02,
    )
    model.save_pretrained(directory)
    for path in tiny_tokenizer_files:
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.parametrize(
    ("statistics", "method"),
    [
        *[("sequential", "modegpt"), ("sequential", "slicegpt")],
        *[("dense", "modegpt"), ("dense", "greedy"), ("dense", "svd-llm"), ("dense", "joint-rank-k")],
    ],
)
def test_peak_memory_and_disk_are_within_a_fifth_of_what_is_measured(
    wide_checkpoint: Path, tmp_path: Path, statistics: str, method: str
) -> None:
    text, output = tmp_path / "long.txt", tmp_path / "small"
    text.write_text(random_text(600, seed=0))
    options = ("--samples", 64, "--sequence-length", 128, "--statistics", statistics, "--method", method, "--quiet")
    command = compress_arguments(wide_checkpoint, output, text, *options)
    assert run_process(*command).code == 0
    facts = json.loads((output / "run.json").read_text())
    predicted = Plan.model_validate(facts["planned"])
    assert predicted.host_peak == pytest.approx(facts["peak_memory_bytes"], rel=0.2)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert predicted.disk[1].bytes == pytest.approx(written, rel=0.2)


@pytest.mark.parametrize("statistics", ["sequential", "dense"])
@pytest.mark.parametrize("allocation", ["uniform", "block-influence"])
def test_arithmetic_is_within_a_fifth_of_what_is_counted(statistics: str, allocation: str) -> None:
    """PyTorch counts matrix products; factorisations, which it does not count, are a small part here."""
    model = tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=4, attn_implementation="eager")
    windows = TokenWindows(torch.randint(0, 128, (24, 64), generator=torch.Generator().manual_seed(0)))
    settings = {"ratio": 0.3, "samples": 24, "sequence_length": 64, "statistics": statistics, "allocation": allocation}
    settings |= {"temperature": 1.0}  # near uniform, as plans take it to be
    with FlopCounterMode(display=False) as counted:
        compress_model(model, windows, CompressionConfig.validated(**settings))
    config = RunConfig.validated(model="m", output="out", evaluate="none", **settings)
    plan = predict(config, shape_of(model, 4), on_gpu=False)
    assert plan.flops == pytest.approx(counted.get_total_flops(), rel=0.2)


def test_slicing_is_one_pass_over_the_layers() -> None:
    """Without the eigendecompositions, which PyTorch does not count."""
    model = tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=4, attn_implementation="eager")
    windows = TokenWindows(torch.randint(0, 128, (24, 64), generator=torch.Generator().manual_seed(0)))
    settings = {"ratio": 0.3, "samples": 24, "sequence_length": 64, "method": "slicegpt"}
    with FlopCounterMode(display=False) as counted:
        compress_model(model, windows, CompressionConfig.validated(**settings))
    plan = predict(RunConfig.validated(model="m", output="o", evaluate="none", **settings), shape_of(model, 4))
    assert [phase.name for phase in plan.phases] == ["calibrate", "solve"]
    assert plan.phases[0].flops == pytest.approx(counted.get_total_flops(), rel=0.25)


def test_a_plan_reads_nothing_but_the_config(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    options = ("--method", "modegpt", "--samples", 8, "--sequence-length", 32)
    outcome = run_cli("plan", tmp_path, "--ratio", 0.3, *options)
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("Peak memory", "hidden states", "two layers", "Disk", "scores", "calibrate", "solve", "pass on"):
        assert words in outcome.out
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


def test_windows_longer_than_the_models_positions_are_refused_here_too(tiny_checkpoint: Path) -> None:
    outcome = run_cli("plan", tiny_checkpoint, "--ratio", 0.3, "--samples", 8, "--sequence-length", 10**6)
    assert outcome.code == 2
    assert "--sequence-length 1000000 exceeds the model's" in outcome.err


def test_a_plan_that_does_not_fit_is_shown_and_refused(tiny_checkpoint: Path) -> None:
    outcome = run_cli("plan", tiny_checkpoint, "--ratio", 0.3, "--samples", 10**10, "--sequence-length", 128)
    assert outcome.code == 2
    assert "hidden states" in outcome.out
    assert re.fullmatch(r"modegpt: not enough memory: [^\n]*--offload-folder[^\n]*\n", outcome.err)


def test_plan_and_compress_have_the_same_options() -> None:
    options = [set(re.findall(r"--[a-z-]+", run_cli(name, "--help").out)) for name in ("plan", "compress")]
    assert options[0] == options[1]


def test_every_phase_has_a_time_only_if_asked(tiny_checkpoint: Path) -> None:
    settings = {"ratio": 0.3, "samples": 8, "sequence_length": 32}
    config = RunConfig.validated(model=str(tiny_checkpoint), output="out", **settings)
    assert all((phase.seconds or 0) > 0 for phase in plan_request(config)[2].phases)
    assert all(phase.seconds is None for phase in plan_request(config, timed=False)[2].phases)


def plan_of(shape: Shape, **settings: object) -> Plan:
    config = RunConfig.validated(
        **({"model": "m", "output": "out", "ratio": 0.3, "method": "modegpt", "evaluate": "none"} | settings)
    )
    return predict(config, shape, on_gpu=False)


def shape_7b(layers: int = 32) -> Shape:
    sizes = replace(LLAMA_7B, layers=layers)
    return Shape(sizes=sizes, layer=202_383_360, rest=262_148_096, vocabulary=32000, item=2)


def test_memory_does_not_depend_on_the_number_of_layers() -> None:
    few, many = (plan_of(shape_7b(layers)) for layers in (2, 200))
    assert [part.bytes for part in few.host[1:]] == [part.bytes for part in many.host[1:]]
    assert many.disk_peak > 50 * few.disk_peak


def test_hidden_states_go_to_the_offload_folder() -> None:
    kept, offloaded = plan_of(shape_7b()), plan_of(shape_7b(), offload_folder="states")
    states = 128 * 2048 * 4096 * 2
    assert sum(part.bytes for part in kept.host[1:]) - sum(part.bytes for part in offloaded.host[1:]) == states
    assert (kept.offload, offloaded.offload) == (0, 2 * states)


def test_seven_billion_parameters_cost_what_arithmetic_says() -> None:
    """Two operations for each of the 6.48e9 weights of the linear maps and token, and attention over the window."""
    per_token = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32 * 4 * 2048 * 4096
    assert 32 * forward_flops(LLAMA_7B, 2048) == per_token
    symmetric = 11008**2 + 4096**2
    assert symmetric < gram_flops(LLAMA_7B, ModeGPT.statistics, 2048) < 1.2 * symmetric + 2 * 64 * 128**2


@pytest.mark.parametrize("share", [0.1, 0.25, 1, 2, 4])
def test_the_elimination_takes_less_than_the_forward_pass(share: float) -> None:
    """Of a model from 0.1 to 4 times as wide as Llama 2 7B, on the default number of windows of 2048 tokens."""
    sizes = LLAMA_7B.scaled(share)
    tokens = RunConfig.model_fields["samples"].default * 2048
    elimination = Greedy(1e-2).solve_flops("mlp", sizes, 0.7)
    assert elimination >= elimination_flops(sizes)
    assert elimination < 0.5 * tokens * forward_flops(sizes, 2048)


def test_spreading_gives_the_costliest_first_to_the_least_busy() -> None:
    costs = {"a": 1.0, "b": 7.0, "c": 3.0, "d": 3.0}
    assert spread(costs, 1) == dict.fromkeys(costs, 0)
    assert spread(costs, 2) == {"b": 0, "c": 1, "d": 1, "a": 1}
    assert sorted(spread(costs, 8).values()) == [0, 1, 2, 3]


def test_processes_share_windows_and_arithmetic() -> None:
    alone, shared = (plan_of(shape_7b(), devices=count) for count in (1, 8))
    passes = [{phase.name: phase.flops for phase in plan.phases} for plan in (alone, shared)]
    assert passes[0]["calibrate"] == pytest.approx(8 * passes[1]["calibrate"])
    assert passes[0]["solve"] == passes[1]["solve"]
    states = [next(part.bytes for part in plan.host if part.name == "hidden states") for plan in (alone, shared)]
    assert states[0] == 8 * states[1]


def test_sampling_needs_the_whole_model() -> None:
    plan = plan_of(shape_7b(), calibration="self", samples=1)
    assert next(part.bytes for part in plan.host if part.name == "whole model") == 2 * (32 * 202_383_360 + 262_148_096)


def test_of_a_mixture_the_models_share_is_sampled_and_each_text_evaluated() -> None:
    phases = {}
    for text in ("self", "wikitext2,self", "wikitext2,alpaca,self:2", "wikitext2"):
        plan = plan_of(shape_7b(), calibration=text, samples=64, evaluate="held-out")
        phases[text] = {phase.name: phase.flops for phase in plan.phases}
        held = {part.name: part.bytes for part in plan.host}
        assert ("keys and values" in held) == ("sample" in phases[text])
    whole, half = phases["self"], phases["wikitext2,self"]
    assert whole["sample"] == 2 * half["sample"] == 2 * phases["wikitext2,alpaca,self:2"]["sample"] > 0
    assert "sample" not in phases["wikitext2"]
    assert whole["evaluate"] == half["evaluate"] == phases["wikitext2"]["evaluate"]
    assert phases["wikitext2,alpaca,self:2"]["evaluate"] == 2 * half["evaluate"]
    # 64 pieces of 256 tokens: a key and a value of 4096 numbers of two bytes in each of 32 layers.
    plan = plan_of(shape_7b(), calibration="self", samples=1)
    assert next(part.bytes for part in plan.host if part.name == "keys and values") == 64 * 256 * 32 * 2 * 4096 * 2


def test_what_an_interrupted_run_has_written_is_not_needed_again(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--quiet")
    with patch.object(Engine, "perplexity", side_effect=KeyboardInterrupt):
        assert run_cli(*command).code == 130
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=240_000))
    assert run_cli(*command[:4], tmp_path / "other", *command[5:]).code == 2
    assert run_cli(*command).code == 0


def test_other_files_in_the_offload_folder_are_not_taken_for_the_runs(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / "other").write_bytes(bytes(10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if path == folder else 2**30))
    command = compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--offload-folder", folder)
    outcome = run_cli(*command)
    assert outcome.code == 2
    assert "not enough disk at --offload-folder" in outcome.err


@pytest.mark.parametrize("tokens", [6000, 500], ids=["regular", "singular"])
@pytest.mark.skipif(sys.platform != "linux", reason="measures a process's peak as Linux counts it")
def test_what_solving_holds_is_predicted(tokens: int) -> None:
    """The peak of a process that solves one MLP, over that of one that only has its inputs."""
    sizes = replace(LLAMA_7B, hidden=256, intermediate=2400)
    script = f"""
import re, torch
from modegpt.decompositions import nystrom_decomposition
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.manual_seed(0)
warm = torch.randn(64, 32, dtype=torch.float64)
nystrom_decomposition(warm.T @ warm, torch.randn(32, 8, dtype=torch.float64), 16, 1e-4)
gram = torch.zeros({sizes.intermediate}, {sizes.intermediate}, dtype=torch.float64)
output = torch.randn({sizes.intermediate}, {sizes.hidden}, dtype=torch.float64)
for _ in range({tokens // 500}):
    z = torch.randn(500, {sizes.intermediate}, dtype=torch.float64)
    gram.addmm_(z.T, z)
held = z.numel() * 8
del z
before = peak()
nystrom_decomposition(gram, output, {round(0.7 * sizes.intermediate)}, 1e-4, 1e-7)
print(peak() - before + held)
"""
    # What is freed goes back at once: otherwise the peak depends on what an earlier block has left.
    run = {"env": os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, "capture_output": True, "check": True}
    measured = int(subprocess.run([sys.executable, "-c", script], **run).stdout)
    assert 0.6 * solve_bytes(sizes, tokens, 0.7) < measured < 1.2 * solve_bytes(sizes, tokens, 0.7)
    if tokens < sizes.intermediate:  # a ridge makes the greedy method's matrix regular
        return
    greedy = """
from modegpt.decompositions import greedy_elimination, refit, regularised
def greedy(gram, output, rank, ridge, _=0):
    kept = greedy_elimination(regularised(gram, ridge), output).kept(rank)
    refit(regularised(gram, ridge), output, kept)
"""
    script = greedy + script.replace("nystrom_decomposition(", "greedy(")
    measured = int(subprocess.run([sys.executable, "-c", script], **run).stdout)
    assert 0.6 * elimination_bytes(sizes) < measured < 1.2 * elimination_bytes(sizes)


@pytest.mark.parametrize("rank", [13, 58])
@pytest.mark.skipif(sys.platform != "linux", reason="measures a process's peak as Linux counts it")
def test_what_fitting_values_holds_is_predicted(rank: int) -> None:
    """The peak of a process that solves the values and outputs of a layer, over that of one that has its statistics."""
    sizes = replace(LLAMA_7B, hidden=1024, intermediate=1, heads=24, groups=4, head=64)
    script = f"""
import re, torch
from modegpt.methods import Greedy
from modegpt.statistics import LayerStatistics
from modegpt.weights import ValueOutputWeights
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def solve(groups, heads, d, h, rank):
    output, value = (torch.randn(groups, *shape, dtype=torch.float64) for shape in ((heads // groups, h, d), (d, h)))
    z = torch.randn(500, heads * h, dtype=torch.float64)
    statistics = LayerStatistics({{"head_outputs": z.T @ z, "value": value.mT @ value}})
    del z
    before = peak()
    Greedy(1e-2).value_output(ValueOutputWeights(value, output, None), statistics).final(rank)
    return peak() - before
torch.manual_seed(0)
solve(1, 2, 32, 8, 4)
print(solve({sizes.groups}, {sizes.heads}, {sizes.hidden}, {sizes.head}, {rank}))
"""
    run = {"env": os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, "capture_output": True, "check": True}
    measured = int(subprocess.run([sys.executable, "-c", script], **run).stdout)
    assert 0.6 * value_fit_bytes(sizes) < measured < 1.2 * value_fit_bytes(sizes)


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"": None}, 100),
        ({"": ("max", 10, 0)}, 100),
        ({"": (60, 50, 20)}, 30),
        ({"": (200, 10, 0)}, 100),
        ({"": (90, 50, 0), "pods/one": ("max", 10, 0)}, 40),
        ({"": ("max", 50, 0), "pods": (70, 65, 0), "pods/one": (80, 10, 0)}, 5),
    ],
)
def test_memory_is_what_control_groups_leave(
    limits: dict[str, Any], left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, numbers in limits.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        if numbers is not None:
            for file, number in zip(("memory.max", "memory.current", "memory.stat"), numbers, strict=True):
                prefix = "anon 1\ninactive_file " if file == "memory.stat" else ""
                (tmp_path / name / file).write_text(f"{prefix}{number}\n")
    (tmp_path / "own").write_text(f"1:name=systemd:/\n0::/{max(limits, key=len)}\n")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    assert memory.free_memory() == left
    monkeypatch.setattr(memory, "_OWN", tmp_path / "no such file")
    assert memory.free_memory() == 100
