"""Whole layers go: those that change their input least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import costs
from ..budget import LayerGeometry, LayerRanks, Module, whole_geometry
from ..errors import InvalidRequest
from ..families import check_removable
from ..modeling import Family
from ..results import Choice
from .base import Method, OwnAllocation, Solver

if TYPE_CHECKING:
    from ..config import CompressionConfig
    from ..engine import Engine


class WholeLayers(Method, OwnAllocation):
    """What methods that remove whole layers have in common: a layer is one unit, and nothing in it changes.

    In the order in which a method gives them up, layers go as long as the parameters removed come nearer to the ratio
    asked for. Such a method decides by itself which layers go.
    """

    modules = ("layer",)
    statistics = frozenset()
    allocation = "own"
    allocations = ("own",)

    def geometry(self, layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
        """One unit."""
        return whole_geometry(layer, config, family)

    def solvers(self) -> Mapping[Module, Solver]:
        """Nothing is solved."""
        return {}

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """Nothing is solved."""
        return 0.0

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """The layer is written with its maps apart."""
        return costs.selection_bytes(sizes)

    def check(
        self, model: PreTrainedModel, geometry: Sequence[LayerGeometry], config: CompressionConfig, ratio: float
    ) -> None:
        """Refuse a ratio to which no layer or all layers come nearest, and layers that cannot be moved."""
        sizes, option = [layer.parameters for layer in geometry], f"--method {self.name}"
        least, most = min(sizes) / sum(sizes) / 2, 1 - min(sizes) / sum(sizes) / 2
        if not least <= ratio <= most:
            raise InvalidRequest(
                f"--ratio {ratio:g}: {option} removes whole layers, which are {2 * least:.3g} of the decoder "
                f"blocks each; use {least:.3g} to {most:.3g}, or another method"
            )
        check_removable(model, option)


def without(order: Sequence[int], geometry: Sequence[LayerGeometry], ratio: float) -> list[LayerRanks]:
    """The ranks with the first layers of ``order`` gone: as many as come nearest to ``ratio``, at least one, not all.

    ``order`` need not have all layers, but those that can be needed.
    """
    sizes = [layer.parameters for layer in geometry]
    removed, best = 0, (float("inf"), 1)
    for count, index in enumerate(order[: len(sizes) - 1], start=1):
        removed += sizes[index]
        best = min(best, (abs(removed - ratio * sum(sizes)), count))
    gone = set(order[: best[1]])
    return [LayerRanks(layer=int(index not in gone)) for index in range(len(sizes))]


class ShortGPT(WholeLayers):
    """The layers of lowest block influence BI = 1 - E[cos(input, output)] go.

    Men et al., arXiv 2403.03853. BI is measured once, on the dense model, over all calibration tokens, as for the
    paper's allocation.
    """

    name = "shortgpt"
    summary = "whole layers go, those that change their input least"

    def choose(self, engine: Engine, config: CompressionConfig, ratio: float) -> Choice:
        """By one pass over the layers."""
        scores = [row[0] for row in engine.block_influence()]
        ranks = without(sorted(range(len(scores)), key=lambda index: scores[index]), engine.geometry(self), ratio)
        return Choice(ranks, [{"layer": float(1 - rank["layer"])} for rank in ranks], [[score] for score in scores])
