"""The optimal brain surgeon for structures: MLP channels and whole heads, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import costs
from ..budget import Module
from ..decompositions import Elimination, eliminated, refit, regularised, unit_channels
from ..statistics import LayerStatistics
from ..weights import HeadWeights, MLPWeights
from .base import HeadMethod, Ladder, Ridged, Solution, rising


class OBC(Ridged, HeadMethod):
    """Input columns of the output maps go one structure at a time, the cheapest first, and the others are re-fitted.

    See :mod:`modegpt.decompositions.elimination`, on the MLP's output map with its channels for structures, and on
    attention's output map with the columns of one key-value head, that is of all query heads that share it. What
    leaves the output map leaves the maps before it.

    Kurtic et al., ZipLM, arXiv 2302.04089, after Hassibi and Stork, 1993. ZipLM has heads with a key each; that shared
    keys go with all their heads, the ridge, and the number of structures in each layer, which ZipLM finds by timing
    them, are our reading; so are steps of several MLP channels between two updates.
    """

    name = "obc"
    summary = "MLP channels and whole heads go one by one, what stays in the output maps is re-fitted"
    calibrated = "sequential"
    statistics = frozenset({"mlp", "head_outputs"})

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """What takes most of the fits and the eliminations."""
        eliminations = costs.elimination_bytes(sizes), costs.head_elimination_bytes(sizes)
        return max(costs.solve_bytes(sizes, tokens, kept), *eliminations)

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """Of the MLP the elimination and the fit at one rank."""
        if module != "mlp":
            return costs.solve_flops(module, sizes, kept)
        return costs.elimination_flops(sizes) + costs.refit_flops(sizes, kept)

    def kept_flops(self, module: Module, sizes: costs.Sizes) -> float:
        """The elimination of the MLP's channels."""
        return costs.elimination_flops(sizes) if module == "mlp" else 0.0

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """A structure is one channel."""
        ladder = _Eliminated(statistics["mlp"], weights.output, 1, self.ridge, statistics.eliminations)

        def at(rank: int) -> Solution[MLPWeights]:
            kept, fitted, error = ladder.at(rank)
            return Solution(weights.select(kept, fitted), error, ladder.norm, kept)

        return Ladder(len(weights.output), at, ladder.errors, elimination=ladder.result)

    def heads(self, weights: HeadWeights, statistics: LayerStatistics) -> Ladder[HeadWeights]:
        """A structure is a key-value head with its queries, keys, values and outputs."""
        groups, per_group, head, _ = weights.value_output.output.shape
        stacked = weights.value_output.output.flatten(0, 2)
        ladder = _Eliminated(statistics["head_outputs"], stacked, per_group * head, self.ridge)
        squares = statistics.squares("query_squares"), statistics.squares("key_squares")

        def at(rank: int) -> Solution[HeadWeights]:
            kept, fitted, error = ladder.at(rank)
            output = fitted.unflatten(0, (rank, per_group, head))
            return Solution(weights.select(kept, output, *squares), error, ladder.norm, kept)

        return Ladder(groups, at, ladder.errors)


class _Eliminated:
    """Which units of an output map (m, d), ``width`` channels each, stay at every rank, and what they are fitted to."""

    def __init__(
        self, gram: torch.Tensor, output: torch.Tensor, width: int, ridge: float, known: Sequence[Elimination] = ()
    ) -> None:
        self._gram, self._output, self._width, self._ridge = gram, output, width, ridge
        self.result = eliminated(regularised(gram, ridge), output, known, width)
        self.norm = float((output * (gram @ output)).sum())
        self.errors = rising(self.result.errors, self.norm)

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The units that stay (rank,), their part of the output map (rank * width, d), and the error."""
        kept = self.result.kept(rank)
        if rank * self._width == len(self._output):
            return kept, self._output, 0.0
        matrix = regularised(self._gram, self._ridge)  # made again: of many experts, all would be held at once
        return kept, *refit(matrix, self._output, unit_channels(kept, self._width))
