"""Predicted perplexity against size, from a profile alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from .budget import kept_parameters
from .config import CompressionConfig
from .errors import CheckpointError, InvalidRequest
from .families import check_family, model_geometry
from .kept import open_kept
from .least_loss import losses_at, ranks_from_losses, total_loss
from .methods import METHODS
from .origin import Origin
from .sources import empty_model

#: Of the decoder blocks' parameters.
RATIOS = tuple(step / 100 for step in range(0, 65, 5))
#: Nats of loss, beyond which nothing is left of the model, nor of the prediction.
_WORST = 20.0


@dataclass(frozen=True)
class Point:
    """A model of ``parameters`` parameters, ``ratio`` of those of the decoder blocks removed."""

    ratio: float
    parameters: int
    perplexity: float
    """On the text that sensitivities were measured on: the dense model's times exp of the predicted divergence."""


@dataclass(frozen=True)
class Curve:
    """Points from the dense model down, and the place of the knee among them."""

    source: str
    points: list[Point]
    knee: int
    text: str
    """What calibrated, and what the divergences and the dense model's perplexity were measured on."""


def predicted_curve(directory: Path, align: int = 1) -> Curve:
    """The curve of the profile in ``directory``; ratios out of reach are left out, and those where nothing is left.

    ln ppl(r) = ln ppl(dense) + sum over parts of S + c S^2, S the sum over modules of D(rank at r), see
    :class:`modegpt.results.ModuleProfile` and :meth:`modegpt.results.Profile.interplay`. Raises
    :class:`CheckpointError` for what is no profile.
    """
    origin, kept = Origin.read(directory), open_kept(directory, whole=False)
    profile = kept.profile
    assert profile is not None
    try:
        model_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        check_family(model_config)
        model = empty_model(model_config)
    except Exception as error:  # an untrusted directory can fail anywhere
        raise CheckpointError(f"{str(directory)!r}: its config describes no model: {error}") from error
    settled = {name: origin.options[name] for name in ("method", "ridge", "modules", "joint_only")}
    config = CompressionConfig.validated(**settled, ratio=0.5, align=align)
    layers = model_geometry(model, METHODS[config.method].from_config(config).geometry)
    profile.check(layers, config.modules)
    losses, interplay = profile.losses(), profile.interplay()
    everything = sum(parameter.numel() for parameter in model.parameters())
    blocks = sum(layer.parameters for layer in layers)
    points = [Point(0.0, everything, profile.perplexity)]
    for ratio in RATIOS[1:]:
        try:
            ranks = ranks_from_losses(layers, losses, ratio, align, interplay=interplay)
        except InvalidRequest:  # out of reach
            break
        cost = total_loss(losses_at(losses, ranks), interplay)
        if cost > _WORST:
            break
        parameters = everything - blocks + kept_parameters(layers, ranks)
        points.append(Point(ratio, parameters, profile.perplexity * math.exp(cost)))
    text = f"calibrated on {origin.calibration.tokens:,} tokens of {origin.calibration.source}, measured on "
    text += "the first of these" if origin.probe is None else f"{origin.probe.tokens:,} others"
    return Curve(origin.source, points, knee([math.log(point.perplexity) for point in points]), text)


def knee(heights: list[float]) -> int:
    """The index where a rising convex curve over even steps is farthest below the line from its first to its last."""
    steps, rise = max(1, len(heights) - 1), heights[-1] - heights[0]
    below = [heights[0] + rise * index / steps - height for index, height in enumerate(heights)]
    return below.index(max(below))


def plot(curve: Curve, path: Path) -> None:
    """Draw ``curve`` into an image file; raises :class:`InvalidRequest` without matplotlib or for an unknown kind."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib; install it: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [point.parameters / 1e6 for point in curve.points]
    heights = [point.perplexity for point in curve.points]
    axes.plot(sizes, heights, marker="o")
    axes.plot(sizes[curve.knee], heights[curve.knee], marker="D", color="tab:red", linestyle="none", label="knee")
    axes.set(xlabel="parameters (millions)", ylabel="predicted perplexity", yscale="log", title=curve.source)
    axes.invert_xaxis()
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    if path.is_dir():
        raise InvalidRequest(f"--plot {str(path)!r} is a directory; name a file such as curve.png")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--plot {str(path)!r}: {error}") from error
