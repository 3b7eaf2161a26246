"""Figures of reports, with matplotlib: each is drawn once and can be kept as SVG and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .budget import Module
from .report import CompressionReport, LayerFacts
from .results import ModuleResult, thinned

#: Text and axes are drawn in it, and in a page in the colour of its text.
_INK = "#010101"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "modegpt",
    "text.parse_math": False,  # labels come from files
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8888884d",
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": _INK for part in ("edge", "label")},
    "axes.facecolor": "none",
    "legend.frameon": False,
}
#: Of the largest of a spectrum: below, it is not drawn.
_FAINT = 1e-4
_EACH = "a line for each layer (early ones dark), the cut at the dot."
#: What is in :attr:`ModuleResult.spectrum`.
_SPECTRA: Mapping[Module, str] = {
    "mlp": "ridge leverage scores of the channels, the largest first",
    "qk": "scores of the rotary pairs (size of queries times size of keys), the largest first",
    "vo": "singular values, the largest first",
    "stream": "sizes of the stream along its principal directions, the largest first",
}
_NO_METADATA: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
#: Letters of a label in a legend.
_LABEL = 24
#: Told apart on white, on black and by people who see no red and green.
_COLOURS = ("#2f7fd6", "#e0742a", "#2a9d6f", "#b64fc8", "#c9a227", "#d64f5f")


@dataclass(frozen=True)
class Plot:
    """A figure, its name among files, and what it shows."""

    name: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """An ``svg`` element in the colour of the text around it, with ids that no other figure of a page has."""
        file = io.StringIO()
        with mpl.rc_context(_STYLE):
            self.figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
        text = file.getvalue().replace(_INK, "currentColor")
        text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # is for a whole page
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", text)
        described = f'<svg role="img" aria-label="{escape(self.caption)}"'
        return text[text.index("<svg") :].replace("<svg", described, 1)

    def write(self, directory: Path) -> None:
        """Keep it as ``directory/NAME.svg`` and ``.png``, on white."""
        directory.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(_STYLE):
            for kind in ("svg", "png"):
                path = directory / f"{self.name}.{kind}"
                self.figure.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if kind == "svg" else {})


def _plot(name: str, caption: str, draw: Callable[[Any], None], labels: tuple[str, str]) -> Plot:
    """``draw`` on one pair of axes with these ``labels``."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
    return Plot(name, caption, figure)


def _by_module(report: CompressionReport, value: Callable[[LayerFacts, Module], float | None]) -> dict[Module, Any]:
    """For each module the layers that have a value, and the values."""
    found: dict[Module, Any] = {}
    for module in report.layers[0].modules:
        pairs = [(index, value(layer, module)) for index, layer in enumerate(report.layers) if module in layer.modules]
        if known := [(index, one) for index, one in pairs if one is not None]:
            found[module] = tuple(zip(*known, strict=True))
    return found


def _short(label: str) -> str:
    """What fits into a legend, which leaves out labels that begin with an underscore."""
    half = _LABEL // 2
    return f" {label}" if len(label) <= _LABEL else f" {label[:half]}...{label[-half:]}"


def _lines(values: Mapping[Module, Any]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for (module, (layers, height)), colour in zip(values.items(), cycle(_COLOURS), strict=False):
            axes.plot(layers, height, "o-", ms=3, lw=1.4, color=colour, label=module.upper())
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def layer_plots(report: CompressionReport, name: str) -> list[Plot]:
    """What every layer kept and lost, why, and the curves that were cut; ``name`` begins the names of files."""
    kept = _by_module(
        report, lambda layer, module: 100 * layer.modules[module].rank / max(1, layer.modules[module].full)
    )
    errors = _by_module(report, lambda layer, module: layer.modules[module].relative_error)
    plots = [
        _plot(f"{name}-ranks", "Kept of each layer's modules.", _lines(kept), ("layer", "kept, %")),
        _plot(
            f"{name}-errors",
            "Relative error of each compressed module by itself, in the method's own objective.",
            _lines(errors),
            ("layer", "relative error"),
        ),
    ]
    losses = _by_module(report, lambda layer, module: (layer.divergence or {}).get(module))
    if losses:
        caption = "What each compressed module was predicted to cost by itself, in nats per token."
        plots.append(_plot(f"{name}-losses", caption, _lines(losses), ("layer", "nats per token")))
    if all(layer.scores for layer in report.layers):
        plots.append(_scores(report, name))
    return plots + _curves(report, name)


def _scores(report: CompressionReport, name: str) -> Plot:
    columns = list(zip(*(layer.scores or [] for layer in report.layers), strict=False))
    kinds = ["attention", "MLP"] if len(columns) == 2 else [str(report.options.get("allocation"))]

    def draw(axes: Any) -> None:
        for kind, column, colour in zip(kinds, columns, cycle(_COLOURS), strict=False):
            axes.plot(column, "o-", ms=3, lw=1.4, color=colour, label=kind)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _plot(f"{name}-scores", "Scores of the layers, by which they shared the loss.", draw, ("layer", "score"))


def _curves(report: CompressionReport, name: str) -> list[Plot]:
    """For each module the error against rank in every layer and the spectra, with a dot at the cut."""
    plots = []
    for module in report.layers[0].modules:
        facts = [layer.modules[module] for layer in report.layers if module in layer.modules]
        if errors := _lines_of(facts, lambda one: (one.curve, 0)):
            what = f"{module.upper()}: relative error against what is kept, {_EACH}"
            plots.append(_plot(f"{name}-curve-{module}", what, _cut(errors), ("kept, %", "relative error")))
        if spectra := _lines_of(facts, lambda one: (one.spectrum if any(one.spectrum or ()) else None, 1)):
            what = f"{module.upper()}: {_SPECTRA.get(module, 'spectrum')}, {_EACH}"
            powers = module != "mlp"  # of leverage scores, which are at most 1, all can be near it
            labels = ("largest, %", "share of the largest" if powers else "leverage score")
            plots.append(_plot(f"{name}-spectrum-{module}", what, _cut(spectra, powers=powers), labels))
    return plots


_Line = tuple[ModuleResult, list[int], list[float]]


def _lines_of(
    facts: Sequence[ModuleResult], heights: Callable[[ModuleResult], tuple[list[float] | None, int]]
) -> list[_Line]:
    """For every layer the ranks and the thinned ``heights`` over them, given with the first rank."""
    found = []
    for one in facts:
        known, first = heights(one)
        ranks = [first + place for place in thinned(one.full - first, len(known) - 1)] if known else []
        if known and one.full > 0 and len(known) == len(ranks):
            found.append((one, ranks, known))
    return found


def _cut(lines: Sequence[_Line], *, powers: bool = False) -> Callable[[Any], None]:
    """A line for every layer; of ``powers``, over its largest value and on a logarithmic scale."""

    def draw(axes: Any) -> None:
        for place, (one, ranks, heights) in enumerate(lines):
            colour = mpl.colormaps["viridis"](0.15 + 0.75 * place / max(1, len(lines) - 1))
            shown = [height / max(heights) for height in heights] if powers else heights
            axes.plot([100 * rank / one.full for rank in ranks], shown, lw=0.8, color=colour)
            axes.plot(100 * one.rank / one.full, numpy.interp(one.rank, ranks, shown), "o", ms=4, color=colour)
        if powers:
            _logarithmic(axes)
            axes.set_ylim(bottom=max(_FAINT, axes.get_ylim()[0]))

    return draw


#: From the least to the greatest number of a logarithmic axis with few powers of ten and their multiples.
_NARROW = 6


def _logarithmic(axes: Any) -> None:
    """A logarithmic scale with plain numbers, also within one power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > _NARROW * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


_Sizes = Sequence[tuple[float, float]]


def size_plot(points: Mapping[str, _Sizes], predicted: Mapping[str, _Sizes]) -> Plot:
    """Perplexity against millions of parameters: as measured on each text, and as each profile has it."""

    def draw(axes: Any) -> None:
        lines = [("o-", *one) for one in points.items()] + [("--", *one) for one in predicted.items()]
        for (style, name, found), colour in zip(lines, cycle(_COLOURS), strict=False):
            axes.plot(*zip(*sorted(set(found)), strict=True), style, ms=4, lw=1.4, color=colour, label=_short(name))
        _logarithmic(axes)

    caption = "Perplexity against the parameters of the whole model, dense on the right."
    return _plot("size", caption, draw, ("million parameters", "perplexity"))


def speed_plot(name: str, bars: Mapping[str, Mapping[str, float]]) -> Plot:
    """Times the first model's speed: for each load, by model."""
    models = list(dict.fromkeys(model for load in bars.values() for model in load))
    width = 0.8 / max(1, len(models))

    def draw(axes: Any) -> None:
        for place, (model, colour) in enumerate(zip(models, cycle(_COLOURS), strict=False)):
            heights = [load.get(model, 0.0) for load in bars.values()]
            axes.bar([one + (place - (len(models) - 1) / 2) * width for one in range(len(bars))], heights, width * 0.92,
                     color=colour, label=_short(model))  # fmt: skip
        axes.axhline(1, lw=1, color=_INK)
        axes.set_xticks(range(len(bars)), list(bars))

    return _plot(name, "Speed over that of the first model.", draw, ("", "times as fast"))
