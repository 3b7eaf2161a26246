"""What costs least goes, one by one, and what stays is fitted to make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from typing_extensions import Self

from .. import costs
from ..budget import Module
from ..decompositions import (
    GatedRows,
    alternating_fit,
    balance,
    channel_scores,
    eliminated,
    energy_bases,
    gated_fit,
    group_bases,
    kept_coefficients,
    logit_ladder,
    mean_blocks,
    output_fit,
    refit,
    regularised,
    ridge_leverage_scores,
    selection_ladder,
    top_indices,
    value_errors,
    weight_energies,
)
from ..statistics import LayerStatistics
from ..weights import MLPWeights, QueryKeyWeights, ValueOutputWeights
from .base import ChannelMethod, Ladder, Method, Ridged, Solution, rising

if TYPE_CHECKING:
    from ..results import Choice

#: Of the logits' features, in units of each one's variance.
LOGIT_RIDGE = 1e-2
#: What the ridge takes a channel's energy to be at least, in units of the mean: one with weights of zero has none.
DEAD = 1e-2
#: An MLP that keeps more of its channels is not fitted once more: it would take longest and gain least.
WORTH = 15 / 16


class Greedy(Ridged, ChannelMethod):
    """Greedy elimination and joint least-squares fits, each on an objective the paper's algorithm bounds or leaves out.

    A greedy choice can be worse than another one. So at the rank asked for the choice of the paper's rule is fitted
    as well, and the better of both is taken.
    """

    name = "greedy"
    summary = "channels and rotary pairs go one by one, those that stay are re-fitted; values as heads put them out"
    allocation = "sensitivity"
    default_ridge = 1e-2
    tied = True
    statistics = frozenset({"mlp", "mlp_rows", "query", "key", "value", "logits", "head_outputs"})

    def __init__(self, ridge: float, pairs: Sequence[int] | None = None) -> None:
        """With one list of rotary ``pairs`` for all heads, where they have to keep the same."""
        super().__init__(ridge)
        self._pairs = pairs

    def following(self, choice: Choice) -> Self:
        """With the pairs that all heads keep."""
        return type(self)(self.ridge, choice.pairs)

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """The most of the MLP's elimination, its fit at one rank and its second fit, and of the values' fit."""
        mlp = costs.solve_bytes(sizes, tokens, kept), costs.gated_fit_bytes(sizes, tokens, kept)
        return max(costs.elimination_bytes(sizes), costs.value_fit_bytes(sizes), *mlp)

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """Of the MLP the elimination, and the fits and scores at one rank; of the values their fits, also the last."""
        if module == "vo":
            return costs.value_fit_flops(sizes, kept)
        if module != "mlp":
            return costs.solve_flops(module, sizes, kept)
        scores = costs.factor_flops(sizes.intermediate)  # of the paper's choice
        return costs.elimination_flops(sizes) + scores + 2 * costs.refit_flops(sizes, kept)

    def kept_flops(self, module: Module, sizes: costs.Sizes) -> float:
        """The elimination."""
        return costs.elimination_flops(sizes) if module == "mlp" else 0.0

    def finish_flops(self, sizes: costs.Sizes, tokens: int, kept: float) -> float:
        """The second fit of the MLP."""
        return costs.gated_fit_flops(sizes, tokens, kept) if kept <= WORTH else 0.0

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """:mod:`modegpt.decompositions.elimination`, or Algorithm 1's channels."""
        gram, output = statistics["mlp"], weights.output
        profile = weight_energies(weights.inputs).clamp_min(DEAD)
        result = eliminated(regularised(gram, self.ridge, profile), output, statistics.eliminations)
        norm = float((output * (gram @ output)).sum())

        def at(rank: int) -> Solution[MLPWeights]:
            matrix = regularised(gram, self.ridge, profile)  # made again: of many experts, all would be held at once
            choices = [result.kept(rank)]
            if rank < len(output):
                # With the ridge of the paper's method: Type I's own is part of the objective.
                choices.append(top_indices(ridge_leverage_scores(gram, Method.default_ridge), rank))
            fits = [(kept, *refit(matrix, output, kept)) for kept in choices]
            kept, fitted, error = min(fits, key=lambda fit: fit[2])
            return Solution(weights.select(kept, fitted), error, norm, kept)

        def finished(solution: Solution[MLPWeights]) -> Solution[MLPWeights]:
            return self.finished_mlp(solution, statistics, profile)

        return Ladder(len(output), at, rising(result.errors, norm), finished, result)

    def finished_mlp(
        self, solution: Solution[MLPWeights], statistics: LayerStatistics, profile: torch.Tensor
    ) -> Solution[MLPWeights]:
        """:mod:`modegpt.decompositions.gated`, where the MLP is; the error falls as that of held-out rows does."""
        thin, kept = solution.weights, solution.kept
        if statistics.rows is None or statistics.passed is None or kept is None or len(kept) > WORTH * len(profile):
            return solution
        gates, channels, outputs = statistics.passed(kept)
        output, rows = thin.output.to(gates.dtype), statistics.rows.to(gates.dtype)
        seen = GatedRows(rows, gates, channels, outputs.addmm_(channels, output, alpha=-1))
        matrix = regularised(statistics["mlp"], self.ridge, profile, kept)
        fit = gated_fit(seen, output, matrix)
        up = thin.inputs[-1]
        fitted = replace(
            thin,
            inputs=(*thin.inputs[:-1], (up.to(rows.dtype) + fit.change).to(up.dtype)),
            output=thin.output + fit.output,
        )
        return replace(solution, weights=fitted, error=solution.error * fit.share)

    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics) -> Ladder[QueryKeyWeights]:
        """:mod:`modegpt.decompositions.logits`, or Algorithm 2's pairs.

        Queries that are normed cannot be turned: their pairs are only chosen.
        """
        features, turned = statistics["logits"], weights.query_norm is None
        target = torch.ones(features.shape[-1], dtype=features.dtype, device=features.device)
        if weights.rotary:
            target[weights.rotary_pairs()[1]] = 0.0
        units = weights.units(features.diagonal(dim1=-2, dim2=-1).sum(1))
        ladder = (logit_ladder if turned else selection_ladder)(features, units.channels, target, LOGIT_RIDGE)
        full, norm = units.channels.shape[1], _quadratic(features, target)

        def at(rank: int) -> Solution[QueryKeyWeights]:
            """The better of the elimination's pairs and the paper's, or those given."""
            choices = [(units, ladder.kept(rank))]
            if rank < full and self._pairs is not None:  # units are pairs, of which all heads have all
                choices = [(units, torch.tensor(self._pairs, device=features.device).expand(len(features), -1))]
            elif rank < full:
                scores = channel_scores(statistics["query"], statistics["key"]).square()
                papers = weights.units(scores)
                choices.append((papers, top_indices(papers.scores(scores), rank)))
            fits = [
                (kept_coefficients(features, one.channels, kept, target, LOGIT_RIDGE, turned=turned), one.select(kept))
                for one, kept in choices
            ]
            (coefficients, error), (channels, pairs) = min(fits, key=lambda fit: fit[0][1])
            fitted = weights.turned(coefficients) if turned and rank < full else weights
            thin = fitted.select(channels, statistics.squares("query_squares"), statistics.squares("key_squares"))
            return Solution(thin, error, norm, channels, pairs)

        return Ladder(full, at, rising(ladder.errors, norm))

    def value_output(self, weights: ValueOutputWeights, statistics: LayerStatistics) -> Ladder[ValueOutputWeights]:
        """:mod:`modegpt.decompositions.values`, with the bases of a joint SVD or those that the paper takes.

        Of what the heads put out by appendix B.1, and of the values themselves as the paper does.
        """
        gram, output, inputs = statistics["head_outputs"], weights.output, statistics["value"]
        matrix = regularised(gram, self.ridge)
        blocks = mean_blocks(matrix, output)
        papers = group_bases(inputs, output) if output.shape[1] == 1 else energy_bases(inputs)
        starts = torch.stack((group_bases(blocks, output), energy_bases(blocks), papers))
        errors = torch.stack([value_errors(matrix, output, basis) for basis in starts])
        full, stacked = output.shape[-2], output.flatten(0, 2)
        norm = float((stacked * (gram @ stacked)).sum())

        def start(rank: int) -> torch.Tensor:
            return starts[errors[:, rank].argmin()][..., :rank]

        def at(rank: int) -> Solution[ValueOutputWeights]:
            if rank == full:
                return Solution(weights, 0.0, norm)
            basis = start(rank)
            fitted = output_fit(regularised(gram, self.ridge), output, basis)  # made again rather than held
            return Solution(_with_basis(weights, basis, fitted), float(errors[:, rank].min()), norm)

        def finished(solution: Solution[ValueOutputWeights]) -> Solution[ValueOutputWeights]:
            rank = solution.weights.output.shape[-2]
            if rank == full:
                return solution
            basis, fitted, error = alternating_fit(regularised(gram, self.ridge), output, start(rank))
            return Solution(_with_basis(weights, basis, fitted), error, norm)

        least = errors.amin(0)
        least[0] = norm
        return Ladder(full, at, least, finished)


def _quadratic(features: torch.Tensor, target: torch.Tensor) -> float:
    """The sum over the heads of c^T F c."""
    return float((target * (features @ target)).sum())


def _with_basis(weights: ValueOutputWeights, basis: torch.Tensor, output: torch.Tensor) -> ValueOutputWeights:
    value, output = balance(weights.value @ basis, output)
    return replace(weights, value=value, output=output)
