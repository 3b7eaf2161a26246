"""What a person sees: progress while a run goes on, tables at its end."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from .curve import Curve
from .families import family_rows
from .plan import Plan
from .progress import Progress
from .report import CompressionReport, RunFacts

if TYPE_CHECKING:
    from .exports.export import ExportFacts

PHASES = {
    "text": "Reading text",
    "load": "Loading the model",
    "sample": "Sampling text from the model",
    "scores": "Scoring layers",
    "profile": "Profiling layers",
    "compress": "Compressing layers",
    "evaluate": "Measuring perplexity",
    "tasks": "Reading tasks",
    "answers": "Answering tasks",
    "export": "Writing the model",
    "bench": "Measuring speed",
}
#: Seconds between two lines of a log about the same phase.
_EVERY = 5.0


def choose_progress(console: Console, quiet: bool) -> Progress:
    """A live display on a terminal, plain lines elsewhere, nothing when ``quiet``."""
    if quiet:
        return Progress()
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class LiveProgress(Progress):
    """A line for every phase, the current one rewritten: step, what is being done, time spent and left."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bar = self._new_bar()

    def note(self, text: str) -> None:
        say(self._console, text)

    def detail(self, text: str) -> None:
        self._bar.update(TaskID(0), detail=text)

    def advance(self) -> None:
        self._bar.advance(TaskID(0))

    def _start(self, name: str, steps: int) -> None:
        self._bar = self._new_bar()
        self._bar.add_task(PHASES.get(name, name), total=steps, detail="")
        self._bar.start()

    def _stop(self) -> None:
        self._bar.stop()

    def _new_bar(self) -> Bar:
        return Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )


class PlainProgress(Progress):
    """A line for finished steps, for logs: of the last of a phase, and of others every few seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._name, self._steps, self._done = "", 0, 0
        self._started = self._said = 0.0

    def note(self, text: str) -> None:
        self._print(text)

    def advance(self) -> None:
        self._done += 1
        now = time.perf_counter()
        spent = now - self._started
        left = spent / self._done * (self._steps - self._done)
        if self._steps == 1 or (self._done < self._steps and now - self._said < _EVERY):
            return
        self._said = now
        self._print(f"{self._name}: {self._done} of {self._steps} ({spent:.0f} s, {left:.0f} s left)")

    def _start(self, name: str, steps: int) -> None:
        self._name, self._steps, self._done = PHASES.get(name, name), steps, 0
        self._started = self._said = time.perf_counter()
        self._print(f"{self._name} ...")

    def _print(self, line: str) -> None:
        say(self._console, line)


def say(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, not coloured, and nothing in it taken for markup."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def plan_line(plan: Plan) -> str:
    """The plan in one line."""
    parts = [f"peak memory {gigabytes(plan.host_peak)}"]
    if plan.device:
        parts.append(f"GPU memory {gigabytes(plan.device_peak)}")
    parts.append(f"disk {gigabytes(plan.disk_peak + plan.offload)}")
    parts.append(f"{plan.flops / 1e12:,.1f} TFLOP")
    if plan.seconds is not None:
        parts.append(f"about {duration(plan.seconds)}")
    return f"Plan: {', '.join(parts)}"


def export_line(facts: ExportFacts) -> str:
    """What an export has become, in one line."""
    line, plain = f"Exported: {facts.parameters:,} parameters", facts.plain
    if plain is None:
        return line
    widths = " to ".join(f"{width:,}" for width in sorted({min(facts.widths), max(facts.widths)}))
    return (
        f"{line} as {facts.exported:,} ({facts.exported / facts.parameters - 1:+.1%}), heads of {plain.head} channels, "
        f"MLPs of {widths}, the same model up to {plain.context:,} tokens"
    )


def plan_table(plan: Plan) -> Table:
    """The plan in full."""
    table = Table(title="Plan (for each process)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    sums = [("Peak memory", plan.host), ("Peak GPU memory", plan.device), ("Disk", plan.disk)]
    for title, parts in sums:
        for part in parts:
            table.add_row(f"  {part.name}", gigabytes(part.bytes), "")
        if parts:
            total = gigabytes(sum(part.bytes for part in parts))
            table.add_row(f"[bold]{title}", f"[bold]{total}", "", end_section=True)
    if plan.offload:
        table.add_row("[bold]Offload folder", f"[bold]{gigabytes(plan.offload)}", "", end_section=True)
    for phase in plan.phases:
        seconds = "" if phase.seconds is None else duration(phase.seconds)
        table.add_row(f"  {phase.name}", f"{phase.flops / 1e12:,.2f} TFLOP", seconds)
    total = "" if plan.seconds is None else f"[bold]{duration(plan.seconds)}"
    table.add_row("[bold]All phases", f"[bold]{plan.flops / 1e12:,.2f} TFLOP", total)
    return table


def gigabytes(count: float) -> str:
    """Bytes in decimal gigabytes."""
    return f"{count / 1e9:,.2f} GB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as they suit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary_table(report: CompressionReport, run: RunFacts | None = None) -> Table:
    """The outcome of a compression."""
    table = Table(title="Compression", show_header=True, title_justify="left")
    for column in ("", "dense", "compressed", "removed"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("Ratio aimed at", "", "", f"{report.requested_ratio:.2%}")
    for name, pair in (("Decoder-block parameters", report.block_parameters), ("All parameters", report.parameters)):
        table.add_row(name, f"{pair.dense:,.0f}", f"{pair.compressed:,.0f}", f"{pair.removed:.2%}")
    size = report.bytes
    table.add_row(
        escape(f"Weights on disk ({report.dtype})"),
        megabytes(size.dense),
        megabytes(size.compressed),
        f"{size.removed:.2%}",
    )
    if report.alignment is not None:
        table.add_row("Ranks are multiples of (measured)", "", str(report.alignment.chosen), "")
    if report.predicted_loss is not None:
        times = f"{math.exp(min(report.predicted_loss, 700.0)):.3f} times"
        table.add_row("Perplexity on such text as calibrates, predicted", "", times, "")
    for text, pair in report.measured().items():
        table.add_row(escape(f"Perplexity ({text})"), f"{pair.dense:.3f}", f"{pair.compressed:.3f}", "")
    if run is not None:
        table.add_section()
        for name, seconds in run.seconds.items():
            table.add_row(escape(f"Time: {PHASES.get(name, name).lower()}"), "", f"{seconds:.1f} s", "")
        table.add_row("Peak memory", "", megabytes(run.peak_memory_bytes), "")
        if run.peak_device_memory_bytes is not None:
            table.add_row("Peak device memory", "", megabytes(run.peak_device_memory_bytes), "")
    return table


def layer_table(report: CompressionReport) -> Table:
    """Per layer and module: kept of full units, and the relative output error."""
    table = Table(
        title="Kept of each layer, and the relative error of the module's output", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("layer", justify="right")
    modules = list(report.layers[0].modules)
    for module in modules:
        sizes = {layer.modules[module].full for layer in report.layers}
        table.add_column(f"{module.upper()}\nof {' or '.join(map(str, sorted(sizes)))}", justify="right")
        table.add_column("\nkept", justify="right", style="dim")
        table.add_column("\nerror", justify="right")
    for index, layer in enumerate(report.layers):
        cells = []
        for module in modules:
            facts = layer.modules[module]
            error = f"[{_colour(facts.relative_error)}]{facts.relative_error:.3f}"
            cells += [str(facts.rank), f"{facts.rank / facts.full:.0%}", error]
        table.add_row(str(index), *cells)
    return table


def experts_lines(report: CompressionReport) -> list[str]:
    """A line for every layer some of whose experts saw too few tokens to be calibrated by them alone."""
    lines = []
    for index, layer in enumerate(report.layers):
        mlp = layer.modules.get("mlp")
        few, tokens = (mlp.experts_short_of_tokens, mlp.expert_tokens or []) if mlp else ([], [])
        if few:
            which = ", ".join(f"{expert} ({tokens[expert]})" for expert in few)
            lines.append(f"Layer {index}: experts calibrated on fewer tokens than they have channels: {which}")
    return lines


def curve_table(curve: Curve) -> Table:
    """Predicted perplexity against size."""
    title, caption = f"Predicted for {escape(curve.source)}", escape(f"By a profile {curve.text}.")
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    for column in ("removed of the blocks", "parameters", "perplexity", "against dense", ""):
        table.add_column(column, justify="right")
    for index, point in enumerate(curve.points):
        table.add_row(
            f"{point.ratio:.0%}",
            f"{point.parameters:,}",
            f"{point.perplexity:.2f}",
            f"{point.perplexity / curve.points[0].perplexity:.2f}x",
            "knee" if index == curve.knee else "",
        )
    return table


def families_table() -> Table:
    """The supported families."""
    table = Table(title="Supported families", title_justify="left", box=SIMPLE_HEAD)
    for column in family_rows()[0]:
        table.add_column(column)
    for row in family_rows()[1:]:
        table.add_row(*map(escape, row))
    return table


def _colour(error: float) -> str:
    return "green" if error < 0.1 else "yellow" if error < 0.3 else "red"


def millions(count: float) -> str:
    """In millions, with at least three digits."""
    return f"{count / 1e6:,.1f}" if count >= 1e7 else f"{count / 1e6:.3g}"


def megabytes(count: float) -> str:
    """Bytes in decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"
