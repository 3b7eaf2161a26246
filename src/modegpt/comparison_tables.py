"""What ``evaluate`` and ``bench`` print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .bench import KIND, PERCENTILES, Load, Ratio, Speed, Timing
from .comparison import ModelScores, TextScore
from .console import gigabytes, megabytes, millions, say
from .tasks import TaskScore, degradation, mean


def print_scores(console: Console, scores: Sequence[ModelScores]) -> None:
    """One model on one text is a line, all else is a table."""
    texts = scores[0].texts
    if len(scores) == len(texts) == 1:
        (name, score), *_ = texts.items()
        say(console, f"perplexity {score.perplexity:.4f} on {name} ({_windows(score)})")
    elif texts:
        console.print(text_table(scores))
    if scores[0].tasks:
        console.print(task_table(scores))


def text_table(scores: Sequence[ModelScores]) -> Table:
    """A row for every text, a column for every model, with the change from the first."""
    table = _table("Perplexity", ("text", ""), scores)
    for name, score in scores[0].texts.items():
        found = [one.texts[name] for one in scores]
        table.add_row(
            escape(name), _windows(score), _perplexity(score), *(_perplexity(one, score) for one in found[1:])
        )
    return table


def _perplexity(score: TextScore, first: TextScore | None = None) -> str:
    """With the change from the ``first`` model's, but where that reads the text as other tokens."""
    value = score.perplexity
    shown = f"{value:.3f}" if value < 1e4 else f"{value:.1e}"
    if first is None or value >= 100 * first.perplexity:
        return shown
    change = f"{value / first.perplexity - 1:+.1%}" if score.sha256 == first.sha256 else "other tokens"
    return f"{shown} ({change})"


def task_table(scores: Sequence[ModelScores]) -> Table:
    """A row for every task, with standard errors, their mean, and what of it each model lost over the first."""
    table = _table("Accuracy in percent, with standard errors", ("task", "metric", "items"), scores)
    first = scores[0].tasks
    for name, score in first.items():
        table.add_row(escape(name), score.shown, f"{score.items:,}", *(_accuracy(one.tasks[name]) for one in scores))
    means = [mean(one.tasks) for one in scores]
    if len(first) > 1 and any(means):
        table.add_section()
        table.add_row("mean", "", "", *("" if found is None else _percent(*found) for found in means))
    lost = [degradation(one.tasks, first) for one in scores[1:]]
    if any(value is not None for value in lost):
        shown = ["" if value is None else f"{value:.1%}" for value in lost]
        table.add_row("relative degradation", "", "", "", *shown)
    return table


def print_speeds(console: Console, speeds: Sequence[Speed], load: Load) -> None:
    """What the models are, and how fast, with ratios to the first."""
    names = model_names([speed.model for speed in speeds])
    table = Table(title="Size", title_justify="left", box=SIMPLE_HEAD)
    columns = (
        "model",
        "dtype",
        "parameters",
        "weights",
        "multiplications per token",
        f"widths not divisible by {KIND}",
    )
    for head in columns:
        table.add_column(head, justify="left" if head == "model" else "right", overflow="fold")
    for name, speed in zip(names, speeds, strict=True):
        count, macs = (f"{millions(one)} M" for one in (speed.parameters, speed.macs_per_token))
        table.add_row(escape(name), speed.dtype, count, _bytes(speed.weight_bytes), macs, f"{speed.odd:.0%}")
    console.print(table)
    lengths = " or ".join(map(str, load.sequence_lengths))
    title = f"Prompts of {lengths} tokens, then {load.new_tokens} one by one; times as fast as the first model"
    rates = ("prompt tokens/s", "times", "new tokens/s", "times")
    console.print(_by_load(title, rates, names, speeds, lambda own, first: _speed_cells(own, first, load)))
    latencies = [f"p{percent}" for percent in PERCENTILES]
    heads = ("first token", *latencies, "cache", "peak memory")
    console.print(_by_load("Milliseconds of one token, and memory", heads, names, speeds, _latency_cells))


def _by_load(
    title: str,
    heads: Sequence[str],
    names: Sequence[str],
    speeds: Sequence[Speed],
    cells: Callable[[Timing, Timing], list[str]],
) -> Table:
    """For each load a line for every model, with the ``cells`` of its timing and the first model's."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    several = len({timing.sequence_length for timing in speeds[0].timings}) > 1
    for head in (*["tokens"] * several, "sequences", "model", *heads):
        table.add_column(head, justify="left" if head == "model" else "right", overflow="fold")
    for place, first in enumerate(speeds[0].timings):
        for name, speed in zip(names, speeds, strict=True):
            own = speed.timings[place]
            load = [str(own.sequence_length)] * several + [str(own.batch_size)]
            table.add_row(*load, escape(name), *cells(own, first))
        table.add_section()
    return table


def _speed_cells(own: Timing, first: Timing, load: Load) -> list[str]:
    prompt, further = own.speeds(load)
    ratios = [Ratio.of(own.prefill, first.prefill), Ratio.of(own.decode, first.decode)]
    shown = [f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.greatest:.2f})" for ratio in ratios]
    return [f"{prompt:,.0f}", shown[0], f"{further:,.1f}", shown[1]]


def _latency_cells(own: Timing, _: Timing) -> list[str]:
    latencies = [f"{1000 * seconds:.1f}" for seconds in (own.first_token, *own.latencies())]
    return [*latencies, _bytes(own.cache_bytes), _bytes(own.peak_bytes)]


def _bytes(count: float) -> str:
    return gigabytes(count) if count >= 1e9 else megabytes(count)


def _table(title: str, heads: Sequence[str], scores: Sequence[ModelScores]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right" if head == "items" else "left", overflow="fold")
    for name in model_names([one.model for one in scores]):
        table.add_column(escape(name), justify="right", overflow="fold")
    return table


def model_names(addresses: Sequence[str]) -> list[str]:
    """The last part of every address, or all of it where that is not enough to tell them apart."""
    short = [Path(address).name for address in addresses]
    return short if len(set(short)) == len(short) else list(addresses)


def _windows(score: TextScore) -> str:
    strided = "" if score.stride is None else f", one every {score.stride}"
    return f"{score.windows} window{'s' * (score.windows > 1)} of {score.sequence_length} tokens{strided}"


def _accuracy(score: TaskScore) -> str:
    value, error = score.metrics[score.shown], score.errors[score.shown]
    if score.is_accuracy:
        return _percent(value, error)
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"
