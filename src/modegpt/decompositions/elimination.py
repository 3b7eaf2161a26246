"""Greedy elimination: channels, or blocks of them, go by what the re-fitted output map loses with them.

The objective is that of Theorem 1, made to prefer the weights as they are where the data do not decide:

    J(S, W') = ||Z W_D - Z S W'||_F^2 + lambda ||W_D - S W'||_P^2 = tr(R^T A R),  R = W_D - S W',  A = C + lambda P

with ||R||_P^2 = tr(R^T P R), P = diag(p) the identity or what the weights suggest (:func:`weight_energies`).

For given channels S the best W' is W_D[S] + (A_SS)^-1 A_SD W_D[D]. Leverage scores (Algorithm 1) do not see W_D. Here
the next unit u to go, one channel or a block of neighbouring ones, is the one that raises J least once the others are
re-fitted, by

    tr(W_u^T ([A_SS^-1]_uu)^-1 W_u),   W <- W - [A_SS^-1]_:u ([A_SS^-1]_uu)^-1 W_u

(the optimal brain surgeon's step, Hassibi and Stork, 1993, of a linear map with many outputs; for structures of
several channels ZipLM, arXiv 2302.04089). For one channel i the cost is ||W_i||^2 / [A_SS^-1]_ii.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .linalg import cholesky_of_copy, cholesky_of_psd, solve_psd

#: Units that go between two updates of the whole inverse.
BLOCK = 32
#: The inverse is made smaller when fewer than this share of its units are left.
_COMPACT = 0.8
#: Diagonals that differ less are of one matrix: some steps of float32.
_SAME = 1e-6


@dataclass(frozen=True)
class Elimination:
    """In which order the n units of a module go, and what that costs."""

    order: torch.Tensor
    """(n - 1,) int64, the first to go first."""
    errors: torch.Tensor
    """J after the first 0, 1, ..., n - 1 of them: (n,) float64."""
    diagonal: torch.Tensor
    """Of A, by which it is known again: (m,) float64."""

    def is_of(self, matrix: torch.Tensor) -> bool:
        """Whether it is that of ``matrix`` A, which may have been rounded to float32 since."""
        own = matrix.diagonal()
        return own.shape == self.diagonal.shape and torch.allclose(own, self.diagonal, rtol=_SAME, atol=0.0)

    def kept(self, rank: int) -> torch.Tensor:
        """The ``rank`` units that stay longest, ascending."""
        mask = torch.ones(len(self.order) + 1, dtype=torch.bool, device=self.order.device)
        mask[self.order[: len(mask) - rank]] = False
        return mask.nonzero().flatten()


def regularised(
    gram: torch.Tensor, ridge: float, profile: torch.Tensor | None = None, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """A = C + lambda diag(p) with lambda = ``ridge`` * tr(C) / m; 1 where C is zero.

    ``profile`` p (m,) is of mean 1; ones where not given. With ``kept`` S (k,), A_SS alone.
    """
    mean = gram.diagonal().mean()
    strength = torch.where(mean > 0, ridge * mean, 1.0)
    added = strength.expand(len(gram)) if profile is None else strength * profile
    result = gram.clone() if kept is None else gram[kept[:, None], kept]
    result.diagonal().add_(added if kept is None else added[kept])
    return result


def greedy_elimination(matrix: torch.Tensor, output: torch.Tensor, block: int = BLOCK, width: int = 1) -> Elimination:
    """Drop the units of A (m, m) one by one, each time the cheapest for W_D = ``output`` (m, d); both float64.

    A unit is ``width`` neighbouring channels, the first unit the first of them. A must be positive definite but for
    rounding, as :func:`regularised` makes it. ``block`` units are found at a time: among the 2 x ``block`` cheapest,
    each step is exact, and only then is the inverse updated as a whole, so that nearly all work is in matrix products.
    With as many as there are units every step is the exact greedy one.
    """
    left = len(matrix) // width
    names = torch.arange(left, device=matrix.device)  # of the units that the working copies still hold
    inverse, weights = _inverse(matrix), output.clone()
    alive = torch.ones(left, dtype=torch.bool, device=matrix.device)
    order, costs = [], [matrix.new_zeros(1)]
    while left > 1:
        scores = _costs(inverse, weights, width)
        count = min(block, left - 1)
        near = scores.masked_fill(~alive, torch.inf).topk(min(2 * count, left), largest=False).indices
        channels = unit_channels(near, width)
        chosen, cost = _cheapest(inverse[channels[:, None], channels], weights[channels], count, width)
        order.append(names[near[chosen]])
        costs.append(cost)
        gone = unit_channels(near[chosen], width)
        step = torch.linalg.solve(inverse[gone[:, None], gone], inverse[gone])  # (count * width, m)
        weights -= step.T @ weights[gone]
        inverse.addmm_(inverse[:, gone], step, alpha=-1)
        alive[near[chosen]] = False
        left -= count
        if left < _COMPACT * len(names):
            staying = unit_channels(alive.nonzero().flatten(), width)
            names, weights = names[alive], weights[staying]
            inverse = inverse[staying][:, staying]
            alive = torch.ones(left, dtype=torch.bool, device=matrix.device)
    gone_first = torch.cat(order) if order else names[:0]
    return Elimination(gone_first, torch.cat(costs).cumsum(0), matrix.diagonal().clone())


def eliminated(matrix: torch.Tensor, output: torch.Tensor, known: Sequence[Elimination], width: int = 1) -> Elimination:
    """That of A among the ``known``, otherwise :func:`greedy_elimination`."""
    found = next((one for one in known if one.is_of(matrix)), None)
    return greedy_elimination(matrix, output, width=width) if found is None else found


def unit_channels(units: torch.Tensor, width: int) -> torch.Tensor:
    """The channels (n * ``width``,) of the ``units`` (n,)."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def refit(matrix: torch.Tensor, output: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best W' (k, d) for the ``kept`` channels S, and its J."""
    mask = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    mask[kept] = False
    dropped = mask.nonzero().flatten()
    if not len(dropped):
        return output[kept], 0.0
    across = matrix[kept[:, None], dropped] @ output[dropped]  # A_SD W_D
    gain = solve_psd(matrix[kept[:, None], kept], across)
    inner = matrix[dropped[:, None], dropped] @ output[dropped]
    error = float((output[dropped] * inner).sum() - (across * gain).sum())
    return output[kept] + gain, max(0.0, error)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    factor = cholesky_of_copy(matrix)
    inverse: torch.Tensor = torch.cholesky_inverse(cholesky_of_psd(matrix) if factor is None else factor)
    return inverse


def _costs(inverse: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """What each unit raises J by: (n,). Of units that are gone, anything."""
    if width == 1:
        return weights.square().sum(1) / inverse.diagonal()
    units = len(weights) // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (n, width, width)
    parts = weights.view(units, width, -1)
    solved, _ = torch.linalg.solve_ex(blocks, parts)  # which, unlike solve, lets singular blocks of what is gone pass
    costs: torch.Tensor = (parts * solved).sum((1, 2))
    return costs


def _cheapest(
    inverse: torch.Tensor, weights: torch.Tensor, count: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily, ``count`` of the units of A_SS^-1[P, P] and W[P], and what each raises J by."""
    inverse, weights = inverse.clone(), weights.clone()
    gone = torch.zeros(len(inverse) // width, dtype=torch.bool, device=inverse.device)
    chosen, costs = [], []
    for _ in range(count):
        cost, index = _costs(inverse, weights, width).masked_fill(gone, torch.inf).min(0)
        chosen.append(index)
        costs.append(cost)
        gone[index] = True
        unit = slice(int(index) * width, (int(index) + 1) * width)
        step = torch.linalg.solve(inverse[unit, unit], inverse[unit])  # (width, n * width)
        weights -= step.T @ weights[unit]
        inverse -= step.T @ inverse[unit]
    return torch.stack(chosen), torch.stack(costs)
