"""What has the smallest weights goes: the baseline that needs no calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from .. import costs
from ..budget import Module
from ..decompositions import selection_losses, top_indices
from ..statistics import LayerStatistics
from ..weights import MLPWeights, QueryKeyWeights, ValueOutputWeights
from .base import ChannelMethod, Ladder, Solution, Weights


class Magnitude(ChannelMethod):
    """s_i = sum of the squares of all weights and biases of the linear maps that go with unit i.

    For an intermediate channel: its columns of W_U and W_G and its row of W_D. For a rotary pair of a key-value head:
    its columns of W_k and of the W_q of all query heads that share the key. For a value channel: its column of W_v and
    its rows of W_o in all those heads. The units of largest score stay as they are; every key-value head has its own.
    Nothing is re-fitted, and no statistics are gathered. The error is the share of the squares that goes.

    The structured magnitude baseline of the paper's tables is LLM Surgeon's, second-order pruning with the identity for
    curvature, which comes to the same squares; how it groups them is not stated there, so the groups are our reading.
    """

    name = "magnitude"
    summary = "what has the smallest weights goes, whatever the calibration text"
    statistics = frozenset()

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """A product and a sum for every weight of an MLP or of attention."""
        return 2.0 * costs.layer_parameters(replace(sizes, routed=1)) / len(self.modules)

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """The maps."""
        return costs.selection_bytes(sizes)

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """Of all maps, one selection."""
        scores = _squares((*weights.inputs, weights.output.T), weights.input_biases)
        return _ladder(scores, lambda kept: (weights.select(kept, weights.output[kept]), kept, None))

    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics) -> Ladder[QueryKeyWeights]:
        """Channels that do not rotate go singly, in couples of similar score where others rotate."""
        queries = _squares((weights.query,), (weights.query_bias,)).sum(1)
        scores = _squares((weights.key,), (weights.key_bias,)) + queries
        units = weights.units(scores)

        def thin(kept: torch.Tensor) -> _Thin[QueryKeyWeights]:
            channels, pairs = units.select(kept)
            return weights.select(channels, None, None), channels, pairs

        return _ladder(units.scores(scores), thin)

    def value_output(self, weights: ValueOutputWeights, statistics: LayerStatistics) -> Ladder[ValueOutputWeights]:
        """The values' biases go to the output whole, as with every method."""
        scores = _squares((weights.value,), ()) + weights.output.square().sum((1, 3))
        return _ladder(scores, lambda kept: (weights.select(kept), kept, None))


#: Weights, and which channels and which rotary pairs they kept.
_Thin = tuple[Weights, torch.Tensor, torch.Tensor | None]


def _ladder(scores: torch.Tensor, thin: Callable[[torch.Tensor], _Thin[Weights]]) -> Ladder[Weights]:
    """What ``thin`` makes of the units of largest ``scores`` (..., n)."""
    losses = selection_losses(scores)

    def at(rank: int) -> Solution[Weights]:
        weights, kept, pairs = thin(top_indices(scores, rank))
        return Solution(weights, float(losses[rank]), float(losses[0]), kept, pairs)

    return Ladder(scores.shape[-1], at, losses)


def _squares(maps: Iterable[torch.Tensor], biases: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """The sums of squares (..., n) over the inputs of maps (..., d, n) and of their biases (..., n), in float64."""
    parts = [weight.double().square().sum(-2) for weight in maps]
    return torch.stack([*parts, *(bias.double().square() for bias in biases if bias is not None)]).sum(0)
