"""One self-contained HTML page about compressed checkpoints: facts, quality, layers, speed, and how to repeat them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from typing_extensions import Self

from .console import duration, millions
from .curve import Curve
from .errors import InvalidRequest
from .files import replace_file, storing
from .model_card import card_rows
from .report import CompressionReport, RunFacts


class _Text(BaseModel):
    perplexity: float
    windows: int
    sequence_length: int


class _Task(BaseModel):
    metrics: dict[str, float]
    errors: dict[str, float | None]
    shown: str
    is_accuracy: bool
    items: int


class _Mean(BaseModel):
    accuracy: float
    error: float | None
    degradation: float | None


class _Scores(BaseModel):
    model: str
    texts: dict[str, _Text]
    tasks: dict[str, _Task]
    mean: _Mean | None = None


class Evaluation(BaseModel):
    """What ``modegpt evaluate --output`` writes, as far as a page needs it."""

    command: str
    models: list[_Scores] = Field(min_length=1)


class _Speeds(BaseModel):
    batch_size: int
    sequence_length: int
    prefill_tokens_per_second: float
    prefill_ratio: tuple[float, float, float]
    decode_tokens_per_second: float
    decode_ratio: tuple[float, float, float]
    first_token_seconds: float
    token_seconds: dict[str, float]
    cache_bytes: int
    peak_bytes: int


class _Speed(BaseModel):
    model: str
    parameters: int
    weight_bytes: int
    macs_per_token: float
    dtype: str
    rows: list[_Speeds] = Field(min_length=1)


class Bench(BaseModel):
    """What ``modegpt bench --output`` writes, as far as a page needs it."""

    command: str
    machine: dict[str, Any]
    models: list[_Speed] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        if len({tuple(row.token_seconds) for one in self.models for row in one.rows}) > 1:
            raise ValueError("token_seconds has other percentiles in some rows than in others")
        return self


@dataclass(frozen=True)
class Table:
    """A table of text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numbers(self) -> list[bool]:
        """Of every column but the first: whether it has nothing but numbers."""
        columns = zip(*self.rows, strict=True)
        return [
            place > 0 and all(cell[:1].isdigit() for cell in column if cell) for place, column in enumerate(columns)
        ]


@dataclass(frozen=True)
class Section:
    """A part of the page that is about all models."""

    title: str
    tables: Sequence[Table] = ()
    plots: Sequence[Any] = ()
    note: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A compressed checkpoint by what its files say."""

    name: str
    report: CompressionReport
    run: RunFacts | None

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        """That in ``directory``; raises :class:`CheckpointError`."""
        return cls(directory.resolve().name, CompressionReport.read(directory), RunFacts.read(directory))

    def facts(self) -> list[tuple[str, str]]:
        """What it is, and what it took."""
        rows = card_rows(self.report)
        if self.report.alignment is not None:
            rows.append(("Ranks are multiples of (measured)", str(self.report.alignment.chosen)))
        if self.run is not None:
            starts = f", since the last of {self.run.starts} starts" if self.run.starts > 1 else ""
            rows.append((f"Time{starts}", duration(sum(self.run.seconds.values()))))
            rows.append(("Peak memory", f"{self.run.peak_memory_bytes / 1e9:,.2f} GB"))
        return rows


@dataclass(frozen=True)
class Page:
    """The page about ``checkpoints``, with what was measured of them.

    Raises :class:`InvalidRequest` where what it is made with is not installed.
    """

    checkpoints: Sequence[Checkpoint]
    evaluations: Sequence[Evaluation] = ()
    benches: Sequence[Bench] = ()
    predicted: Sequence[Curve] = ()

    def __post_init__(self) -> None:
        missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
        if missing:
            raise InvalidRequest(f"a report needs {' and '.join(missing)}; install: pip install {' '.join(missing)}")

    def write(self, path: Path, figures: Path | None = None) -> None:
        """Write the page to ``path`` and, where a directory for ``figures`` is given, each as a PNG and an SVG file."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(loader=PackageLoader("modegpt"), autoescape=True, undefined=StrictUndefined)
        names = _distinct([one.name for one in self.checkpoints])
        sections, plots = self._overall(names), self._layers(names)
        text = environment.get_template("report.html").render(
            title=f"Compressed models: {', '.join(names)}" if len(names) > 1 else f"Compressed model {names[0]}",
            overall=[
                {**vars(section), "plots": [{"svg": p.svg(), "caption": p.caption} for p in section.plots]}
                for section in sections
            ],
            models=[
                {
                    "name": name,
                    "facts": one.facts(),
                    "plots": [{"svg": p.svg(), "caption": p.caption} for p in own],
                    "command": one.report.command,
                    "versions": ", ".join(f"{key} {value}" for key, value in one.report.versions.items()),
                }
                for name, one, own in zip(names, self.checkpoints, plots, strict=True)
            ],
        )
        with storing(f"--output {path}", resumes=False):
            replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
        if figures is not None:
            with storing(f"--figures {figures}", resumes=False):
                for plot in [*(p for section in sections for p in section.plots), *(p for own in plots for p in own)]:
                    plot.write(figures)

    def _layers(self, names: Sequence[str]) -> list[list[Any]]:
        from .figures import layer_plots

        files = [re.sub(r"[^A-Za-z0-9._-]", "_", name) for name in names]
        if len({*files}) < len(files):  # two names can come to one
            files = [f"{place}-{file}" for place, file in enumerate(files, 1)]
        return [layer_plots(one.report, file) for file, one in zip(files, self.checkpoints, strict=True)]

    def _overall(self, names: Sequence[str]) -> list[Section]:
        found = [self._sizes(names), *map(_quality, self.evaluations)]
        found += [_speed(bench, place) for place, bench in enumerate(self.benches, 1)]
        return [section for section in found if section is not None]

    def _sizes(self, names: Sequence[str]) -> Section | None:
        """Several checkpoints beside each other, and what profiles predict, where there are several or any."""
        if len(self.checkpoints) == 1 and not self.predicted:
            return None
        from .figures import size_plot

        known = _distinct([f"predicted for {Path(curve.source).name}" for curve in self.predicted])
        predicted = {
            name: [(point.parameters / 1e6, point.perplexity) for point in curve.points]
            for name, curve in zip(known, self.predicted, strict=True)
        }
        rows, points = [], dict[tuple[str, str, str, int], list[tuple[float, float]]]()
        for name, one in zip(names, self.checkpoints, strict=True):
            report = one.report
            method = str(report.options.get("method"))
            row = [name, method, f"{report.block_parameters.removed:.1%}"]
            row += [millions(report.parameters.compressed)]
            for text, windows, compressed, dense in self._measured(one):
                own = points.setdefault((report.source, method, text, windows), [])
                own.append((report.parameters.compressed / 1e6, compressed))
                row.append(f"{compressed:.2f}")
                if dense is not None:
                    own.append((report.parameters.dense / 1e6, dense))
                    row[-1] += f" ({dense:.2f})"
            rows.append([*row, ""][:5])
        heads = ["", "method", "removed of the blocks", "million parameters", "perplexity (dense)"]
        several = len({source for source, *_ in points}) > 1
        by_text = Counter((source, method, text) for source, method, text, _ in points)  # of how many windows
        lines = {
            ", ".join(
                [method, Path(text).name]
                + [f"{windows} windows"] * (by_text[source, method, text] > 1)
                + [Path(source).name] * several
            ): found
            for (source, method, text, windows), found in points.items()
        }
        plots = [size_plot(lines, predicted)] if lines or predicted else []
        return Section("Size", [Table(heads, rows)], plots, _PREDICTED if predicted else "")

    def _measured(self, one: Checkpoint) -> Iterator[tuple[str, int, float, float | None]]:
        """Texts, their windows and the perplexities of a checkpoint and of the dense model.

        As it was made or, if it was not evaluated then, by the evaluations, where models have the names of directories.
        """
        own, text = one.report.perplexity, one.report.evaluation
        if own and text:
            yield text.source, text.windows, own.compressed, own.dense
            return
        for evaluation in self.evaluations:
            scores = {Path(model.model).name: model.texts for model in evaluation.models}
            dense = scores.get(Path(one.report.source).name, {})
            for name, found in scores.get(one.name, {}).items():
                yield name, found.windows, found.perplexity, dense[name].perplexity if name in dense else None


_PREDICTED = "Predictions are for the text that the profile's sensitivities were measured on, see modegpt curve."


def _quality(evaluation: Evaluation) -> Section:
    names = _distinct([Path(one.model).name for one in evaluation.models])
    first, *_ = evaluation.models
    tables = []
    if first.texts:
        rows = [
            [name, *(f"{one.texts[text].perplexity:.2f}" if text in one.texts else "" for one in evaluation.models)]
            for name, text in zip(_distinct([Path(text).name for text in first.texts]), first.texts, strict=True)
        ]
        tables.append(Table(["Perplexity", *names], rows))
    if first.tasks:
        rows = [
            [f"{task} ({facts.shown})", *(_score(one, task) for one in evaluation.models)]
            for task, facts in first.tasks.items()
        ]
        if first.mean is not None:
            means = [one.mean for one in evaluation.models]
            rows.append(["mean", *("" if one is None else _percent(one.accuracy, one.error) for one in means)])
            lost = [None if one is None else one.degradation for one in means]
            rows.append(["relative degradation", *("" if one is None else f"{one:.1%}" for one in lost)])
        tables.append(Table(["Tasks (accuracies in %)", *names], rows))
    return Section("Quality", tables, note=f"Measured by: {evaluation.command}")


def _score(scores: _Scores, task: str) -> str:
    found = scores.tasks.get(task)
    if found is None or found.shown not in found.metrics:
        return ""
    value, error = found.metrics[found.shown], found.errors.get(found.shown)
    if found.is_accuracy:
        return _percent(value, error)
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def _speed(bench: Bench, number: int) -> Section:
    from .figures import speed_plot

    names = _distinct([Path(one.model).name for one in bench.models])
    sizes, rates, latencies, bars = [], [], [], dict[str, dict[str, float]]()
    several = len({row.sequence_length for one in bench.models for row in one.rows}) > 1
    for name, one in zip(names, bench.models, strict=True):
        weights = f"{one.weight_bytes / 1e6:,.1f} MB ({one.dtype})"
        sizes.append([name, f"{one.parameters / 1e6:,.1f} M", weights, f"{one.macs_per_token / 1e6:,.1f} M"])
        for row in one.rows:
            load = f"{row.batch_size} at once" + f", {row.sequence_length} tokens" * several
            at_once = f"{name}, {load}"
            cells = [f"{row.prefill_tokens_per_second:,.0f}", _ratio(row.prefill_ratio)]
            rates.append([at_once, *cells, f"{row.decode_tokens_per_second:,.1f}", _ratio(row.decode_ratio)])
            seconds = [row.first_token_seconds, *row.token_seconds.values()]
            memory = [f"{count / 1e6:,.1f} MB" for count in (row.cache_bytes, row.peak_bytes)]
            latencies.append([at_once, *(f"{1000 * one:,.1f}" for one in seconds), *memory])
            for kind, ratio in (("prompt", row.prefill_ratio), ("new tokens", row.decode_ratio)):
                bars.setdefault(f"{kind}\n{load}", {})[name] = ratio[0]
    percentiles = [f"p{name}, ms" for name in next((row.token_seconds for one in bench.models for row in one.rows), {})]
    tables = [
        Table(["", "parameters", "weights", "multiplications per token"], sizes),
        Table(["", "prompt tokens/s", "ratio", "new tokens/s", "ratio"], rates),
        Table(["One token", "the first, ms", *percentiles, "cache", "peak memory"], latencies),
    ]
    machine = ", ".join(f"{key} {value}" for key, value in bench.machine.items())
    note = (
        f"Measured by: {bench.command}, on {machine}. Ratios are medians over repeats, with the least and the greatest."
    )
    return Section("Speed", tables, [speed_plot("speed" if number == 1 else f"speed-{number}", bars)], note)


def _ratio(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _distinct(names: Sequence[str]) -> list[str]:
    """``names``, numbered where they repeat."""
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def read_results(path: Path, kind: type[_Parsed], option: str) -> _Parsed:
    """The results file at ``path``; raises :class:`InvalidRequest` for what is none of this ``kind``."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{option} {str(path)!r} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise InvalidRequest(f"{option} {str(path)!r} is no file of that command: {where}: {problem['msg']}") from error


def check_page(output: Path, figures: Path | None) -> None:
    """Refuse places that cannot be written, before anything is."""
    if output.suffix not in (".html", ".htm") or output.is_dir():
        raise InvalidRequest(f"--output {str(output)!r}: name a .html file")
    if not output.resolve().parent.is_dir():
        raise InvalidRequest(f"--output {str(output)!r}: its directory does not exist; make it first")
    if output.exists():
        raise InvalidRequest(f"--output {str(output)!r} is there already; remove it or choose another")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise InvalidRequest(f"--figures {str(figures)!r} is a file; name a directory")
