"""The command line on a tiny model: the whole way, what is printed, what is recorded, and every option."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.models import ArgumentInfo

import modegpt
from helpers import Outcome, compress_arguments, run_cli, run_process
from modegpt.cli import app
from modegpt.console import PlainProgress
from modegpt.data import sample_from_model
from modegpt.methods import METHODS, Method

GROUPS, HEADS, HEAD_DIM, LAYERS, WIDTH = 2, 4, 8, 3, 48
FULL = {"mlp": WIDTH, "qk": HEAD_DIM // 2, "vo": HEAD_DIM}


@dataclass(frozen=True)
class Run:
    """A finished ``compress`` command."""

    command: list[object]
    outcome: Outcome
    directory: Path

    @property
    def report(self) -> Any:
        return json.loads((self.directory / "compression.json").read_text())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "model.safetensors")


def compress(model: Path, directory: Path, text: object, *options: object, ratio: float = 0.3) -> Run:
    command = compress_arguments(model, directory, text, *options, ratio=ratio)
    outcome = run_cli(*command)
    assert outcome.code == 0, outcome.err
    return Run(command, outcome, directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text_file: Path, other_text_file: Path) -> Run:
    """Everything at its default but the amount of text and the evaluation text."""
    return compress(tiny_checkpoint, tmp_path_factory.mktemp("cli") / "small", text_file, "--evaluate", other_text_file)


def file_ids(directory: Path, text: Path) -> torch.Tensor:
    """The token ids of a text file, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]


def drawn(ids: torch.Tensor, seed: int = 0, count: int = 8, length: int = 32) -> torch.Tensor:
    """``count`` of the consecutive windows of ``ids``."""
    cut = ids[: len(ids) // length * length].view(-1, length)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:count]]


def sha256(ids: torch.Tensor) -> str:
    """Hash of the shape and the little-endian ids."""
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()


def table_rows(text: str) -> dict[str, list[str]]:
    """First cell -> other cells of every row of the tables in ``text``."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {row[0]: row[1:] for row in rows}


# What is printed


def test_the_summary_has_the_facts_of_the_report(run: Run, other_text_file: Path) -> None:
    rows, report = table_rows(run.outcome.out), run.report

    def removed(facts: dict[str, float]) -> str:
        return f"{1 - facts['compressed'] / facts['dense']:.2%}"

    assert rows["Ratio aimed at"] == ["", "", "30.00%"]
    for name, key in (("Decoder-block parameters", "block_parameters"), ("All parameters", "parameters")):
        facts = report[key]
        assert rows[name] == [f"{facts['dense']:,.0f}", f"{facts['compressed']:,.0f}", removed(facts)]
    size, perplexity = report["bytes"], report["perplexity"]
    megabytes = [f"{count / 1e6:.1f} MB" for count in (size["dense"], size["compressed"])]
    assert rows["Weights on disk (float32)"] == [*megabytes, removed(size)]
    shown = [f"{perplexity['dense']:.3f}", f"{perplexity['compressed']:.3f}", ""]
    assert rows[f"Perplexity ({other_text_file})"] == shown
    for phase in ("reading text", "loading the model", "scoring layers", "compressing layers", "measuring perplexity"):
        assert re.fullmatch(r"\d+\.\d s", rows[f"Time: {phase}"][1])
    assert re.fullmatch(r"[\d,]+\.\d MB", rows["Peak memory"][1])


def test_the_output_directory_is_named_last(run: Run) -> None:
    assert run.outcome.out.splitlines()[-1] == f"Checkpoint: {run.directory}"


def test_progress_is_plain_lines_where_there_is_no_terminal(run: Run) -> None:
    plan, *lines = run.outcome.err.splitlines()
    assert re.fullmatch(r"Plan: peak memory [\d.]+ GB, disk [\d.]+ GB, [\d.]+ TFLOP, about \d+ s", plan)
    expected = ["Reading text ...", "Loading the model ..."]
    for phase, steps in (("Scoring layers", 3), ("Compressing layers", 3), ("Measuring perplexity", 6)):
        expected += [f"{phase} ...", f"{phase}: {steps} of {steps}"]  # what takes less than seconds has one line
    assert [re.sub(r" \(\d+ s, \d+ s left\)$", "", line) for line in lines] == expected
    assert sum(line.endswith(" s left)") for line in lines) == 3


def test_logs_have_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """And one for the last step of a phase."""
    progress, clock = PlainProgress(Console(stderr=True)), iter(range(0, 100, 2))
    with patch("modegpt.console.time.perf_counter", lambda: float(next(clock))), progress.phase("compress", 7):
        for _ in range(7):
            progress.advance()
    lines = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["Compressing layers ...", *(f"Compressing layers: {step} of 7" for step in (3, 6, 7))]


def test_quiet_prints_nothing(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """In a process of its own, so that nothing of what libraries print is missed."""
    command = compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--quiet")
    assert run_process(*command) == Outcome(0, "", "")
    assert (tmp_path / "small" / "compression.json").is_file()


def test_brackets_in_names_are_printed_as_they_are(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """rich would take them for markup."""
    text, directory = tmp_path / "text[bold].txt", tmp_path / "small[red]"
    text.write_bytes(text_file.read_bytes())
    printed = compress(tiny_checkpoint, directory, text).outcome.out
    assert f"Perplexity ({text}, held out)" in table_rows(printed)
    assert printed.endswith(f"Checkpoint: {directory}\n")
    assert f"--output '{directory}'" in run_cli("inspect", directory).out
    evaluated = run_cli("evaluate", directory, "--perplexity", text, "--sequence-length", 32, "--samples", 1)
    assert f" on {text} (" in evaluated.out


def final_screen(written: str) -> list[str]:
    """The lines on a terminal after ``written``, which only erases lines and moves up."""
    lines, row = [""], 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\n)|([^\x1b\n]+)", written):
        if code == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif match := re.fullmatch(r"\x1b\[(\d+)A", code):
            row -= int(match[1])
        elif code == "\x1b[2K":
            lines[row] = ""
        lines[row] += text.strip("\r")
    return [line.strip() for line in lines if line.strip()]


@pytest.fixture
def screen(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> tuple[str, list[str]]:
    """All that a run writes to a terminal's standard error, and what is left of it on the screen."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way to say that this is a terminal
    written = compress(tiny_checkpoint, tmp_path / "small", text_file).outcome.err
    plan, *lines = final_screen(written)
    assert plan.startswith("Plan: ")
    return written, lines


def test_a_terminal_shows_phase_step_and_what_is_done(screen: tuple[str, list[str]]) -> None:
    _, left = screen
    assert re.search(r"Scoring layers +━+ 3/3 block influence +\d:\d\d:\d\d left", "\n".join(left))
    assert re.search(r"Compressing layers +━+ 3/3 keeping the layer +\d:\d\d:\d\d left", "\n".join(left))


PHASES = ("Reading text", "Loading the model", "Scoring layers", "Compressing layers", "Measuring perplexity")


def test_a_terminal_shows_every_phase_once(screen: tuple[str, list[str]]) -> None:
    assert len(screen[1]) == len(PHASES)


def test_a_terminal_shows_every_phase_finished(screen: tuple[str, list[str]]) -> None:
    finished = {line.split(" ━")[0].strip() for line in screen[1] if re.search(r" (\d+)/\1 ", line)}
    assert finished == set(PHASES)


def test_inspect_shows_every_layer(run: Run) -> None:
    outcome = run_cli("inspect", run.directory)
    assert (outcome.code, outcome.err) == (0, "")
    for index, layer in enumerate(run.report["layers"]):
        modules = [layer["modules"][name] for name in ("mlp", "qk", "vo")]
        cells = [f"{m['rank']} {m['rank'] / m['full']:.0%} {m['relative_error']:.3f}" for m in modules]
        assert re.search(rf"^\s*{index} " + " ".join(cells), re.sub(r" +", " ", outcome.out), re.MULTILINE)
    assert re.search(r"of 48 .* of 4 .* of 8 ", outcome.out)
    assert "Made by: modegpt compress" in outcome.out
    assert table_rows(outcome.out) == table_rows(run.outcome.out)


@pytest.mark.parametrize("model", ["dense", "compressed"])
def test_evaluate_prints_the_perplexity_in_the_report(
    run: Run, tiny_checkpoint: Path, other_text_file: Path, model: str
) -> None:
    directory = run.directory if model == "compressed" else tiny_checkpoint
    options = ("--perplexity", other_text_file, "--samples", 8, "--sequence-length", 32)
    outcome = run_cli("evaluate", directory, *options)
    expected = run.report["perplexity"][model]
    assert outcome.out == f"perplexity {expected:.4f} on {other_text_file} (8 windows of 32 tokens)\n"
    phases = [line for line in outcome.err.splitlines() if line.endswith(" ...")]
    assert phases == ["Reading text ...", "Loading the model ...", "Measuring perplexity ..."]
    assert "Measuring perplexity: 8 of 8 (" in outcome.err
    assert run_cli("evaluate", directory, *options, "--quiet") == Outcome(0, outcome.out, "")


def test_evaluate_takes_the_whole_text_by_default(run: Run, tiny_checkpoint: Path, other_text_file: Path) -> None:
    windows = len(file_ids(tiny_checkpoint, other_text_file)) // 32
    outcome = run_cli("evaluate", run.directory, "--perplexity", other_text_file, "--sequence-length", 32)
    assert f"({windows} windows of 32 tokens)" in outcome.out


def test_evaluate_measures_exp_of_the_mean_loss(run: Run, other_text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.directory)
    windows = file_ids(run.directory, other_text_file)[: 8 * 32].view(8, 32)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
    assert run.report["perplexity"]["compressed"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_generate_continues_greedily(run: Run) -> None:
    outcome = run_cli("generate", run.directory, "The model", "--max-new-tokens", 5)
    tokenizer, model = AutoTokenizer.from_pretrained(run.directory), AutoModelForCausalLM.from_pretrained(run.directory)
    inputs = tokenizer("The model", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert outcome == Outcome(0, expected + "\n", "")


def test_generate_uses_the_chat_template(run: Run, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.directory)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}The head: {{ message['content'] }}{% endfor %}"
    )
    directory = tmp_path / "chatty"
    modegpt.save(modegpt.load(run.directory), directory, tokenizer=tokenizer)
    chat = run_cli("generate", directory, "the model", "--chat", "--max-new-tokens", 5)
    assert chat == run_cli("generate", directory, "The head: the model", "--max-new-tokens", 5)
    assert chat != run_cli("generate", directory, "the model", "--max-new-tokens", 5)


def test_the_whole_way_in_processes_of_their_own(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    made = run_process(*compress_arguments(tiny_checkpoint, directory, text_file))
    assert (made.code, made.out.splitlines()[0].strip()) == (0, "Compression")
    report = json.loads((directory / "compression.json").read_text())
    assert report["command"].startswith(f"modegpt compress {tiny_checkpoint} --ratio 0.3 --output {directory}")
    inspected = run_process("inspect", directory)
    assert (inspected.code, inspected.err) == (0, "")
    generated = run_process("generate", directory, "The", "--max-new-tokens", 3)
    assert (generated.code, generated.err) == (0, "")


# What is recorded


def test_the_report_says_how_to_repeat_the_run(run: Run, tiny_checkpoint: Path) -> None:
    report = run.report
    assert report["command"] == " ".join(["modegpt", *map(str, run.command)])
    assert report["source"] == str(tiny_checkpoint)
    assert report["options"]["seed"] == 0
    assert report["options"]["samples"] == 8
    assert report["requested_ratio"] == report["options"]["ratio"] == 0.3
    packages = {name: version(name) for name in ("modegpt", "torch", "transformers", "safetensors")}
    assert {"python": platform.python_version(), **packages}.items() <= report["versions"].items()


def test_the_report_hashes_the_calibration_and_evaluation_ids(
    run: Run, tiny_checkpoint: Path, text_file: Path, other_text_file: Path
) -> None:
    calibration = drawn(file_ids(tiny_checkpoint, text_file))
    evaluation = file_ids(tiny_checkpoint, other_text_file)[: 8 * 32].view(8, 32)
    for key, path, ids in (("calibration", text_file, calibration), ("evaluation", other_text_file, evaluation)):
        facts = {"source": str(path), "windows": 8, "tokens": 256, "sha256": sha256(ids), "mixture": None}
        assert run.report[key] == facts


def recount(directory: Path) -> dict[str, int]:
    """Parameters and bytes in a checkpoint's safetensors file; the kept rotary pairs are no parameters."""
    tensors = load_file(directory / "model.safetensors")
    weights = {name: tensor.numel() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {
        "block_parameters": sum(count for name, count in weights.items() if ".layers." in name),
        "parameters": sum(weights.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def test_the_counts_are_those_of_the_files(run: Run, tiny_checkpoint: Path) -> None:
    dense, compressed = recount(tiny_checkpoint), recount(run.directory)
    for key in dense:
        assert run.report[key] == {"dense": dense[key], "compressed": compressed[key]}
    removed = 1 - compressed["block_parameters"] / dense["block_parameters"]
    assert removed == pytest.approx(0.3, abs=0.005)


def test_the_ranks_are_those_of_the_tensors(run: Run) -> None:
    tensors = run.tensors
    for index, layer in enumerate(run.report["layers"]):
        modules, prefix = layer["modules"], f"model.layers.{index}."
        assert {name: facts["full"] for name, facts in modules.items()} == FULL
        width = tensors[prefix + "mlp.down_proj.weight"].shape[1]
        pairs = tensors[prefix + "self_attn.k_proj.weight"].shape[0] // GROUPS // 2
        values = tensors[prefix + "self_attn.o_proj.weight"].shape[1] // HEADS
        assert {name: facts["rank"] for name, facts in modules.items()} == {"mlp": width, "qk": pairs, "vo": values}


def test_the_kept_indices_are_those_in_the_weights(run: Run, tiny_checkpoint: Path) -> None:
    tensors, dense = run.tensors, load_file(tiny_checkpoint / "model.safetensors")
    for index, layer in enumerate(run.report["layers"]):
        modules, prefix = layer["modules"], f"model.layers.{index}."
        kept = modules["mlp"]["kept"]
        assert kept == sorted(set(kept))
        gate = prefix + "mlp.gate_proj.weight"
        assert torch.equal(tensors[gate], dense[gate][kept])
        channels = torch.tensor(modules["qk"]["kept"])
        pairs = tensors[prefix + "self_attn.rotary_pairs"]
        assert torch.equal(channels, torch.cat((pairs, pairs + HEAD_DIM // 2), dim=1))
        key = prefix + "self_attn.k_proj.weight"
        rows = channels + torch.arange(GROUPS)[:, None] * HEAD_DIM
        assert torch.equal(tensors[key], dense[key][rows.flatten()])
        assert modules["vo"]["kept"] is None


def test_errors_are_relative_and_vanish_only_where_nothing_is_removed(run: Run) -> None:
    for layer in run.report["layers"]:
        for facts in layer["modules"].values():
            assert 0 <= facts["relative_error"] < 1
            assert (facts["relative_error"] == 0) == (facts["rank"] == facts["full"])


def test_times_and_memory_are_recorded(run: Run) -> None:
    facts = json.loads((run.directory / "run.json").read_text())
    assert list(facts["seconds"]) == ["text", "load", "scores", "compress", "evaluate"]
    assert all(seconds > 0 for seconds in facts["seconds"].values())
    assert facts["peak_memory_bytes"] > 10**8
    assert facts["peak_device_memory_bytes"] is None
    assert (facts["processes"], facts["starts"]) == (1, 1)


def test_tokenizer_generation_config_and_card_come_along(run: Run, tiny_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        assert (run.directory / name).read_text() == (tiny_checkpoint / name).read_text()
    assert f"| Compressed from | `{tiny_checkpoint}` |" in (run.directory / "README.md").read_text()


def test_a_sharded_model_is_read_like_one_in_a_single_file(
    run: Run, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    sharded = compress(tmp_path / "sharded", tmp_path / "small", text_file, "--evaluate", "none")
    assert sharded.report["layers"] == run.report["layers"]


# Options


@pytest.mark.parametrize(("modules", "ratio"), [("mlp", 0.3), ("qk", 0.1), ("vo", 0.1), ("qk,mlp", 0.3)])
def test_modules_not_named_stay_whole(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, modules: str, ratio: float
) -> None:
    run = compress(
        *(tiny_checkpoint, tmp_path / "small", text_file),
        *("--modules", modules, "--evaluate", "none", "--allocation", "uniform"),
        ratio=ratio,
    )
    for layer in run.report["layers"]:
        assert set(layer["sparsity"]) == set(modules.split(","))
        whole = {name for name, facts in layer["modules"].items() if facts["rank"] == facts["full"]}
        assert whole == set(FULL) - set(modules.split(","))
    blocks = run.report["block_parameters"]
    assert 1 - blocks["compressed"] / blocks["dense"] == pytest.approx(ratio, abs=0.005)
    dense, tensors = load_file(tiny_checkpoint / "model.safetensors"), run.tensors
    maps = {"mlp": ("mlp.gate_proj", "mlp.down_proj"), "qk": ("self_attn.q_proj",), "vo": ("self_attn.o_proj",)}
    names = [f"model.layers.1.{name}.weight" for module in set(FULL) - set(modules.split(",")) for name in maps[module]]
    for name in names:
        assert torch.equal(tensors[name], dense[name]), name


@pytest.mark.parametrize("align", [4, 8])
def test_align_rounds_ranks_to_multiples_of_channels(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, align: int
) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--align", align, "--evaluate", "none")
    ranks = [{name: facts["rank"] for name, facts in layer["modules"].items()} for layer in run.report["layers"]]
    assert all(rank["mlp"] % align == 2 * rank["qk"] % align == rank["vo"] % align == 0 for rank in ranks)
    assert any(rank != FULL for rank in ranks)


def test_uniform_takes_the_same_share_everywhere(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--allocation", "uniform", "--evaluate", "none")
    assert len({share for layer in run.report["layers"] for share in layer["sparsity"].values()}) == 1
    assert [layer["scores"] for layer in run.report["layers"]] == [None] * LAYERS
    assert run.report["temperature"] is None
    assert "scores" not in json.loads((run.directory / "run.json").read_text())["seconds"]


@pytest.mark.parametrize(("allocation", "parts"), [("block-influence", 1), ("block-influence-split", 2)])
def test_block_influence_lets_the_least_influential_lose_80_percent(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, allocation: str, parts: int
) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--allocation", allocation, "--evaluate", "none")
    layers = run.report["layers"]
    slots = ("mlp",) if parts == 1 else ("qk", "mlp")
    shares = [layer["sparsity"][slot] for layer in layers for slot in slots]
    scores = [score for layer in layers for score in layer["scores"]]
    assert all(len(layer["scores"]) == parts for layer in layers)
    assert all(layer["sparsity"]["qk"] == layer["sparsity"]["vo"] for layer in layers)
    assert max(shares) == pytest.approx(0.8)
    assert sorted(range(len(shares)), key=shares.__getitem__) == sorted(range(len(scores)), key=lambda i: -scores[i])


def test_a_given_temperature_is_used(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--temperature", "0.5", "--evaluate", "none")
    assert run.report["temperature"] == run.report["options"]["temperature"] == 0.5
    first, last = run.report["layers"][0], run.report["layers"][-1]
    ratio = torch.tensor((last["scores"][0] - first["scores"][0]) / 0.5, dtype=torch.float64).exp()
    assert first["sparsity"]["mlp"] / last["sparsity"]["mlp"] == pytest.approx(float(ratio))


def test_dense_statistics_differ_from_sequential_after_the_first_layer(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    sequential, dense = (
        compress(
            *(tiny_checkpoint, tmp_path / kind, text_file),
            *("--statistics", kind, "--allocation", "uniform", "--evaluate", "none"),
        ).report["layers"]
        for kind in ("sequential", "dense")
    )
    assert sequential[0] == dense[0]
    assert sequential[1] != dense[1]
    assert sequential[2] != dense[2]


def test_bfloat16_halves_the_file(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in run.tensors.values()} == {torch.bfloat16, torch.int64}
    assert AutoConfig.from_pretrained(run.directory).dtype == torch.bfloat16
    assert run.report["dtype"] == "bfloat16"
    assert run.report["bytes"]["dense"] == recount(tiny_checkpoint)["bytes"] / 2
    assert run.report["bytes"]["compressed"] == recount(run.directory)["bytes"]
    assert "Weights on disk (bfloat16)" in run.outcome.out


def test_evaluate_none_measures_nothing(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--evaluate", "none")
    assert run.report["evaluation"] is None
    assert run.report["perplexity"] is None
    assert "erplexity" not in run.outcome.out + run.outcome.err


def test_held_out_is_the_last_tenth_and_never_calibrated_on(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--evaluation-samples", 5)
    ids = file_ids(tiny_checkpoint, text_file)
    cut = len(ids) - len(ids) // 10
    held_out = ids[cut : cut + 5 * 32].view(5, 32)
    facts = {"source": f"{text_file}, held out", "windows": 5, "tokens": 160, "sha256": sha256(held_out)}
    assert run.report["evaluation"] == facts | {"mixture": None}
    assert run.report["calibration"]["sha256"] == sha256(drawn(ids[:cut]))


def test_self_calibrates_and_evaluates_on_different_sampled_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", "self", "--seed", 5, "--evaluation-samples", 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    ids = sample_from_model(model, AutoTokenizer.from_pretrained(tiny_checkpoint), 10, 32, 5).ids
    for key, source, windows in (("calibration", "self", ids[:8]), ("evaluation", "self, held out", ids[8:])):
        assert run.report[key]["source"] == source
        assert run.report[key]["sha256"] == sha256(windows)
    assert "Sampling text from the model ..." in run.outcome.err
    assert "Time: sampling text from the model" in run.outcome.out


def test_self_can_be_evaluated_on_a_file(tiny_checkpoint: Path, other_text_file: Path, tmp_path: Path) -> None:
    run = compress(tiny_checkpoint, tmp_path / "small", "self", "--evaluate", other_text_file)
    assert run.report["evaluation"]["sha256"] == sha256(
        file_ids(tiny_checkpoint, other_text_file)[: 8 * 32].view(8, 32)
    )


def test_the_seed_decides_the_calibration_windows(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    first, again, other = (
        compress(tiny_checkpoint, tmp_path / name, text_file, "--seed", seed, "--evaluate", "none")
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    weights = [(run.directory / "model.safetensors").read_bytes() for run in (first, again, other)]
    hashes = [run.report["calibration"]["sha256"] for run in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert hashes[0] == hashes[1] != hashes[2]
    assert first.report["options"]["seed"] == 7


def test_the_batch_size_changes_only_rounding(run: Run, tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    batched = compress(tiny_checkpoint, tmp_path / "small", text_file, "--batch-size", 3, "--evaluate", "none")
    assert batched.report["calibration"] == run.report["calibration"]
    for name, tensor in run.tensors.items():
        torch.testing.assert_close(batched.tensors[name].abs(), tensor.abs(), rtol=1e-3, atol=1e-3)


def test_the_batch_size_does_not_change_what_is_sampled(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """``--help`` says that it changes results only by rounding."""
    hashes = {
        compress(
            *(tiny_checkpoint, tmp_path / f"small-{size}", "self"),
            *("--batch-size", size, "--allocation", "uniform", "--evaluate", "none"),
        ).report["calibration"]["sha256"]
        for size in (1, 4)
    }
    assert len(hashes) == 1


def test_overwrite_replaces_an_earlier_checkpoint(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    compress(tiny_checkpoint, directory, text_file, "--evaluate", "none")
    run = compress(tiny_checkpoint, directory, text_file, "--evaluate", "none", "--overwrite", ratio=0.5)
    assert run.report["requested_ratio"] == 0.5
    assert run.report["block_parameters"]["compressed"] == recount(directory)["block_parameters"]
    assert list(tmp_path.iterdir()) == [directory]


def test_an_empty_output_directory_is_used(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    run = compress(tiny_checkpoint, tmp_path / "small", text_file, "--evaluate", "none")
    assert run.report["block_parameters"]["compressed"] == recount(tmp_path / "small")["block_parameters"]


def test_names_that_look_like_markup_are_printed_as_they_are(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "[red]text.txt"
    text.write_text(text_file.read_text())
    run = compress(tiny_checkpoint, tmp_path / "small[bold]", text, "--evaluate", "held-out")
    assert "small[bold]" in run.outcome.out
    assert "[red]text.txt" in re.sub(r"\s", "", run_cli("inspect", tmp_path / "small[bold]").out)


def test_missing_parents_of_the_output_directory_are_made(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    run = compress(tiny_checkpoint, tmp_path / "a" / "b" / "small", text_file, "--evaluate", "none")
    assert run.report["block_parameters"]["compressed"] == recount(tmp_path / "a/b/small")["block_parameters"]


# Help

COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands if command.callback}


def option_entries(text: str) -> dict[str, str]:
    """Long option name -> its description in a help page, on one line."""
    text = re.sub(r"[│╭╰╮╯─]|(?<=\s)\*(?=\s)", " ", text)
    entries = re.split(r"\n\s*(?=--[a-z])", text)[1:]
    return {entry.split()[0]: " ".join(entry.split()) for entry in entries}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_its_default(command: str) -> None:
    outcome = run_cli(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    entries = option_entries(outcome.out)
    kinds = get_type_hints(COMMANDS[command], include_extras=True)
    for name, parameter in inspect.signature(COMMANDS[command]).parameters.items():
        kind = kinds[name].__metadata__[0]
        if isinstance(kind, ArgumentInfo):
            assert (kind.metavar or name) in outcome.out
            continue
        entry = entries["--" + name.replace("_", "-")]
        assert all(declared in entry for declared in kind.param_decls or ())
        assert " ".join(kind.help.split()) in entry
        if parameter.default is inspect.Parameter.empty:
            assert "[required]" in entry
        elif not isinstance(parameter.default, bool) and parameter.default is not None:
            assert f"[default: {parameter.default}]" in entry


def test_the_command_has_the_librarys_options_and_defaults() -> None:
    fields = modegpt.RunConfig.model_fields
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(COMMANDS["compress"]).parameters.items()
    }
    del defaults["quiet"]
    for name in ("devices", "align"):  # numbers or words: text on the command line
        assert defaults.pop(name) == str(fields[name].default)
    decided_by_the_method = {name for name, field in fields.items() if field.default_factory}
    assert decided_by_the_method == {"modules", "allocation", "statistics", "ridge", "calibration", "evaluate"}
    or_by_the_profile = {"method", "samples", "sequence_length", "seed"}
    assert {defaults.pop(name) for name in decided_by_the_method | or_by_the_profile} == {None}
    assert defaults == {
        name: inspect.Parameter.empty if field.is_required() else field.default
        for name, field in fields.items()
        if name not in {*decided_by_the_method, *or_by_the_profile, "devices", "align"}
    }
    shown = " ".join(run_cli("compress", "--help").out.split())
    assert all(f"[default: ({fields[name].default})]" in shown for name in or_by_the_profile)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_what_is_not_given_is_what_suits_the_method(method: type[Method]) -> None:
    config = modegpt.CompressionConfig.validated(ratio=0.3, method=method.name)
    assert (config.modules, config.allocation, config.statistics, config.ridge) == (
        method.modules,
        method.allocation,
        method.calibrated,
        method.default_ridge,
    )
    for allocation in method.allocations:
        given = modegpt.CompressionConfig.validated(ratio=0.3, method=method.name, allocation=allocation)
        assert given.allocation == allocation


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "nothing"])
def test_the_overview_names_every_command(arguments: list[str]) -> None:
    outcome = run_cli(*arguments)
    assert outcome.code == (0 if arguments else 2)
    for command in COMMANDS:
        assert re.search(rf"^│ {command} +[A-Z]", outcome.out, re.MULTILINE)


def test_help_names_the_choices() -> None:
    text = run_cli("compress", "--help").out
    for choice in ("wikitext2", "ptb", "alpaca", "self", ".parquet", "block-influence-split", "sequential", "held-out"):
        assert choice in text


def test_the_version() -> None:
    outcome = run_cli("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"modegpt {version('modegpt')}\n", "")
