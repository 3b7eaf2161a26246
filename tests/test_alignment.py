"""``--align auto``: widths that are timed, the choice from known times, and a whole compression by it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import modegpt
from helpers import compress_arguments, compress_interrupted, run_cli, tiny_llama, token_windows
from modegpt.alignment import ALIGNMENTS, TOKENS, Alignment, Width, measure_alignments, widths_of
from modegpt.config import CompressionConfig, RunConfig
from modegpt.engine import Engine
from modegpt.layered import resident
from modegpt.methods import ModeGPT
from modegpt.parallel import Workers


@pytest.mark.parametrize("full", [64, 1536, 11008])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_timed_widths_are_near_those_wanted_and_multiples_of_nothing_larger(full: int, ratio: float) -> None:
    for alignment in ALIGNMENTS:
        channels = Width(576, full, 1, 3).channels(ratio, alignment)
        assert channels == full or channels % (2 * alignment) == alignment
        assert abs(channels - full * (1 - ratio)) <= alignment or channels in (alignment, full)


def test_parameters_are_those_of_the_layer() -> None:
    model = tiny_llama()
    engine = Engine(resident(model), token_windows(), 4)
    layer, hidden = model.model.layers[0], model.config.hidden_size
    widths = widths_of(engine.geometry(ModeGPT(1e-4))[0], engine._heads(layer), hidden, ("mlp", "qk", "vo"))
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    assert sum(width.parameters(width.full) for width in widths) == weights
    assert [width.full for width in widths] == [8, 8, 48]
    (mlp,) = widths_of(engine.geometry(ModeGPT(1e-4))[0], engine._heads(layer), hidden, ("mlp",))
    assert mlp == widths[2]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: [1.0, 1.0], 2: [1.0, 1.0], 8: [1.0, 1.0]}, 1),
        ({1: [1.0, 1.0], 2: [0.98, 0.98], 8: [1.0, 1.0]}, 1),  # not worth it
        ({1: [1.0, 1.3], 2: [1.0, 1.0], 8: [0.99, 0.99]}, 2),
        ({1: [2.0, 2.0], 2: [1.5, 1.5], 8: [1.0, 1.0]}, 8),
        ({1: [1.0, 1.0], 8: [2.0, 0.9]}, 1),  # the two numbers of tokens count alike
    ],
)
def test_the_smallest_alignment_that_is_as_fast_as_any_is_chosen(seconds: dict[int, list[float]], chosen: int) -> None:
    assert Alignment.of(seconds) == Alignment(chosen, seconds)


def test_what_leaves_no_choice_is_not_measured() -> None:
    for full, most in ((7, 1), (64, 8), (96, 8), (128, 16), (512, 64), (4096, 64)):
        widths = [Width(16, 2000, 1, 3), Width(16, full, 2, 2)]
        found = measure_alignments(widths, 0.3, torch.float32, torch.device("cpu"))
        assert list(found) == [one for one in ALIGNMENTS if one <= most]
        assert all(len(row) == len(TOKENS) and min(row) > 0 for row in found.values())


def test_the_caller_draws_the_same_numbers_as_without() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    measure_alignments([Width(16, 64, 2, 2)], 0.3, torch.float32, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_all_workers_go_by_what_the_first_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told; it measures nothing itself."""
    chosen_to_be(8, monkeypatch)
    told: list[Any] = []

    class Second(Workers):
        rank, size = 1, 2

        def tell(self, value: Any, source: int = 0) -> Any:
            told.append(value)
            return None if len(told) == 1 else [[1, [1.0, 1.0]], [2, [0.5, 0.5]]]

    config = CompressionConfig.validated(ratio=0.3, method="modegpt", align="auto")
    engine = Engine(resident(tiny_llama()), token_windows(), 4)
    assert engine.fastest_alignment(config).chosen == 8
    engine.workers = Second()
    assert engine.fastest_alignment(config).chosen == 2
    assert told == [None, []]


def chosen_to_be(alignment: int, patch: pytest.MonkeyPatch) -> None:
    """Let the measurement find ``alignment`` fastest."""
    seconds = {one: [1.0 if one == alignment else 2.0] * len(TOKENS) for one in ALIGNMENTS}
    patch.setattr("modegpt.engine.measure_alignments", lambda *_: seconds)


@pytest.mark.parametrize("method", ["modegpt", "magnitude"])
def test_ranks_are_those_of_the_alignment_that_was_fastest(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen_to_be(4, monkeypatch)
    windows = None if method == "magnitude" else token_windows()
    options = {"method": method, "ratio": 0.3} | ({} if windows is None else {"calibration": windows})
    auto, four = (modegpt.compress(tiny_llama(), align=align, **options) for align in ("auto", 4))
    assert all(torch.equal(a, b) for a, b in zip(auto.state_dict().values(), four.state_dict().values(), strict=True))
    report = auto.compression_report
    assert report.options["align"] == "auto"
    assert report.alignment.chosen == 4
    assert report.alignment.seconds[4] == [1.0] * len(TOKENS)
    assert four.compression_report.alignment is None


def test_a_real_measurement_in_the_command(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modegpt.alignment.CHOICES", 2)  # heads have eight channels
    small = tmp_path / "small"
    outcome = run_cli(*compress_arguments(tiny_checkpoint, small, text_file, "--align", "auto", "--evaluate", "none"))
    assert outcome.code == 0, outcome.err
    found = modegpt.CompressionReport.read(small).alignment
    chosen = found.chosen
    assert list(found.seconds) == [1, 2, 4]
    assert Alignment.of(found.seconds).chosen == chosen
    assert f"Ranks are rounded to multiples of {chosen} channels, which measured fastest" in outcome.err
    assert re.search(rf"Ranks are multiples of \(measured\) .* {chosen} ", run_cli("inspect", small).out)


def test_an_interrupted_run_goes_on_with_what_it_measured(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another measurement would find another alignment."""
    turns = itertools.cycle([4, 8])
    monkeypatch.setattr(
        "modegpt.engine.measure_alignments",
        lambda *_: (fastest := next(turns), {one: [2.0 - (one == fastest)] * 2 for one in ALIGNMENTS})[1],
    )
    config = RunConfig.validated(
        model=str(tiny_checkpoint), output=tmp_path / "small", calibration=str(text_file), ratio=0.3, align="auto",
        method="modegpt", samples=8, sequence_length=32, evaluate="none",
    )  # fmt: skip
    report = compress_interrupted(config)
    assert report.alignment is not None
    assert report.alignment.chosen == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--align", "fast"), "--align 'fast'"),
        (("--align", 0), "--align 0: input should be greater than or equal to 1"),
        (("--align", "auto", "--method", "shortgpt"), "--align auto: no channels are removed from layer"),
        (("--align", "auto", "--method", "svd"), "--align auto: --method svd makes two maps of each; give a number"),
        (("--align", "auto", "--target-size", "1MB"), "--align auto goes with --ratio, not --target-size"),
    ],
)
def test_refusals(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, options: tuple[object, ...], problem: str
) -> None:
    command = ["compress", tiny_checkpoint, "--output", tmp_path / "small", "--calibration", text_file, *options]
    ratio = () if "--target-size" in options else ("--ratio", 0.3)
    outcome = run_cli(*command, *ratio)
    assert outcome.code == 2
    assert problem in outcome.err
    assert not (tmp_path / "small").exists()
