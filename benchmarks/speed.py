"""How long a compression takes, against plain dense forward passes over the same tokens, by what it does.

    python benchmarks/speed.py MODEL.gguf TEXT

A GGUF file is first made a safetensors directory: what is measured is the compression, not how long it takes to read
a vocabulary in that format. Everything is measured in one process, the forward passes before and after the
compressions: the paper's method with two allocations, the default method, and that from a profile that was made before.
"forward" is the time inside the stock model, in all passes; "Gram" that of adding up statistics; the rest is named by
the engine.

Writes ``results/speed.json`` and ``results/speed.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modegpt import RunConfig, compress_to_directory
from modegpt.config import ProfileConfig
from modegpt.data import TokenWindows, random_windows, read_text, tokenize
from modegpt.pipeline import plan_request, profile_to_directory
from modegpt.progress import Progress
from modegpt.report import peak_memory, versions
from modegpt.sources import ModelSource
from modegpt.statistics import GramSum
from results_file import RESULTS

WHAT = {
    "reading the layer": "load",
    "block influence": "forward: scores",
    "calibrating": "forward: calibrate",
    "solving mlp": "solve: MLP",
    "solving qk": "solve: query-key",
    "solving vo": "solve: value-output",
    "fitting mlp": "fit: MLP",
    "fitting qk": "fit: query-key",
    "fitting vo": "fit: value-output",
    "keeping the layer": "write",
    "passing on": "forward: pass on",
    "divergence": "predictions",
    "reading the statistics": "load",
}
#: The options of every compression.
SETTINGS: dict[str, dict[str, Any]] = {
    "modegpt, sequential, block-influence": {
        "method": "modegpt",
        "statistics": "sequential",
        "allocation": "block-influence",
    },
    "modegpt, dense, uniform": {"method": "modegpt", "statistics": "dense", "allocation": "uniform"},
    "greedy, dense, sensitivity": {"method": "greedy"},
}
PROFILE, FROM_PROFILE = "greedy, a profile", "greedy, from the profile"


class Stopwatch(Progress):
    """Adds up the time between the engine's announcements of what it does next."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = defaultdict(float)
        self._doing: str | None = None
        self._since = time.perf_counter()

    def detail(self, text: str) -> None:
        self._switch(WHAT[text])

    def move(self, seconds: float, to: str) -> None:
        """Count ``seconds`` of what is being done as something else."""
        self.spent[self._doing or "other"] -= seconds
        self.spent[to] += seconds

    def _start(self, name: str, steps: int) -> None:
        self._switch({"text": "text", "load": "load"}.get(name, "other"))

    def _stop(self) -> None:
        self._switch("write")  # after the last phase comes the checkpoint

    def _switch(self, to: str | None) -> None:
        now = time.perf_counter()
        if self._doing is not None:
            self.spent[self._doing] += now - self._since
        self._doing, self._since = to, now


@contextmanager
def timing_gram(stopwatch: Stopwatch) -> Iterator[None]:
    """Tell the time of adding up statistics from that of the forward pass around it (CPU only: nothing is queued)."""
    add = GramSum.add

    def timed(self: GramSum, x: torch.Tensor) -> None:
        started = time.perf_counter()
        add(self, x)
        stopwatch.move(time.perf_counter() - started, "Gram")

    GramSum.add = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        GramSum.add = add  # type: ignore[method-assign]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        measure(arguments, as_directory(ModelSource(arguments.model), Path(directory) / "dense"))


def as_directory(source: ModelSource, directory: Path) -> ModelSource:
    """``source`` itself, or a safetensors directory made from its GGUF file."""
    if not source.is_gguf:
        return source
    source.model().save_pretrained(directory)
    source.tokenizer().save_pretrained(directory)
    return ModelSource(str(directory))


def measure(arguments: argparse.Namespace, source: ModelSource) -> None:
    """Measure and write the results."""
    ids = tokenize(source.tokenizer(), read_text(str(arguments.text)))
    windows = random_windows(ids, arguments.samples, arguments.sequence_length, 0, what="TEXT")
    rounds: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        row: dict[str, Any] = {"forward": [dense_passes(source, windows)]}
        for name, options in SETTINGS.items():
            row[name] = measured(arguments, source.address, **options)
        with tempfile.TemporaryDirectory() as directory:
            profile = Path(directory) / "profile"
            row[PROFILE] = measured(arguments, source.address, profile, method="greedy")
            row[FROM_PROFILE] = measured(arguments, source.address, profile_from=profile)
        row["forward"].append(dense_passes(source, windows))
        rounds.append(row)
        print(json.dumps(row), flush=True)
    results = {
        "command": command(arguments),
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
        "model": Path(arguments.model).name,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "tokens_sha256": windows.sha256(),
        "rounds": rounds,
        "peak_memory_bytes": peak_memory(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(results))
    print(arguments.output.with_suffix(".md").read_text())


@torch.no_grad()
def dense_passes(source: ModelSource, windows: TokenWindows) -> dict[str, float]:
    """Seconds of plain dense forward passes, with the output head and without."""
    model = source.model()

    def passes(run: Callable[..., Any]) -> float:
        started = time.perf_counter()
        for batch in windows.batches(1):
            run(input_ids=batch.ids, use_cache=False)
        return time.perf_counter() - started

    model(input_ids=windows.ids[:1], use_cache=False)  # the first call of a kernel takes longer
    return {"with head": passes(model), "decoder only": passes(model.base_model)}


def measured(arguments: argparse.Namespace, model: str, profile: Path | None = None, **options: Any) -> dict[str, Any]:
    """Seconds of a compression, from the model's file to the checkpoint, or of a ``profile``, also by what is done."""
    with tempfile.TemporaryDirectory() as directory:
        texts = {"samples": arguments.samples, "sequence_length": arguments.sequence_length}
        texts |= {"calibration": str(arguments.text)}
        if "profile_from" not in options:
            options |= texts
        if profile is not None:
            config: RunConfig = ProfileConfig.validated(model=model, output=profile, **options)
            run: Callable[..., Any] = profile_to_directory
        else:
            output = Path(directory) / "compressed"
            config = RunConfig.validated(model=model, output=output, ratio=arguments.ratio, evaluate="none", **options)
            run = compress_to_directory
        planned = plan_request(config)[2]
        stopwatch = Stopwatch()
        started = time.perf_counter()
        with timing_gram(stopwatch):
            run(config, stopwatch)
        seconds = time.perf_counter() - started
        stopwatch._switch(None)
    parts = {name: round(value, 3) for name, value in stopwatch.spent.items()}
    parts["check"] = round(seconds - sum(parts.values()), 3)
    return {
        "seconds": round(seconds, 3),
        "parts": parts,
        "planned": {phase.name: round(phase.seconds or 0.0, 3) for phase in planned.phases},
    }


def command(arguments: argparse.Namespace) -> str:
    """The command that repeats the measurement."""
    return (
        f"python benchmarks/speed.py {Path(arguments.model).name} {arguments.text.name} --ratio {arguments.ratio} "
        f"--samples {arguments.samples} --sequence-length {arguments.sequence_length} --repeats {arguments.repeats}"
    )


def table(results: dict[str, Any]) -> str:
    """Of each the median over the rounds, in seconds and against the dense forward passes of the same round."""
    names = [name for name in results["rounds"][0] if name != "forward"]
    title = f"{results['model']}, {results['samples']} windows of {results['sequence_length']} tokens"
    lines = [
        f"# Time of a compression: {title}",
        "",
        f"`{results['command']}`, {results['machine']['threads']} threads. Ratios are to the mean of the plain dense",
        "forward passes before and after, in the same round; of several rounds the median is shown.",
        "",
        "| compression | seconds | ratio to dense forward | to decoder only | planned seconds |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        seconds = [row[name]["seconds"] for row in results["rounds"]]
        to = {
            kind: [row[name]["seconds"] / mean([one[kind] for one in row["forward"]]) for row in results["rounds"]]
            for kind in ("with head", "decoder only")
        }
        planned = [sum(row[name]["planned"].values()) for row in results["rounds"]]
        lines.append(
            f"| {name} | {median(seconds):.1f} | {median(to['with head']):.2f} | {median(to['decoder only']):.2f} "
            f"| {median(planned):.1f} |"
        )
    parts = sorted({part for row in results["rounds"] for name in names for part in row[name]["parts"]})
    lines += ["", "Where the time goes, in units of one dense forward pass (output head included):", ""]
    lines += [f"| part | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for part in parts:
        cells = [
            median(
                [
                    row[name]["parts"].get(part, 0.0) / mean([one["with head"] for one in row["forward"]])
                    for row in results["rounds"]
                ]
            )
            for name in names
        ]
        lines.append(f"| {part} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def median(values: list[float]) -> float:
    """The middle value, or the mean of the middle two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


if __name__ == "__main__":
    main()
