"""Type I (MLP) by greedy elimination: channels go by what the re-fitted output map loses with them.

The objective is that of Theorem 1, made to prefer the weights as they are where the data do not decide:

    J(S, W') = ||Z W_D - Z S W'||_F^2 + lambda ||W_D - S W'||_F^2 = tr(R^T A R),  R = W_D - S W',  A = C + lambda I

For given channels S the best W' is W_D[S] + (A_SS)^-1 A_SD W_D[D]. Leverage scores (Algorithm 1) do not see W_D. Here
the next channel i to go is the one that raises J least once the others are re-fitted, by

    ||W_i||^2 / [A_SS^-1]_ii,   W <- W - A_SS^-1[:, i] W_i / [A_SS^-1]_ii

(the optimal brain surgeon's step, Hassibi and Stork, 1993, of a linear map with many outputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linalg import cholesky_of_copy, solve_psd

#: Channels that go between two updates of the whole inverse.
BLOCK = 32
#: The inverse is made smaller when fewer than this share of its channels are left.
_COMPACT = 0.8


@dataclass(frozen=True)
class Elimination:
    """In which order the channels of a module go, and what that costs."""

    order: torch.Tensor
    """(m - 1,) int64, the first to go first."""
    errors: torch.Tensor
    """J after the first 0, 1, ..., m - 1 of them: (m,) float64."""

    def kept(self, rank: int) -> torch.Tensor:
        """The ``rank`` channels that stay longest, ascending."""
        mask = torch.ones(len(self.order) + 1, dtype=torch.bool, device=self.order.device)
        mask[self.order[: len(mask) - rank]] = False
        return mask.nonzero().flatten()


def regularised(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """A = C + lambda I with lambda = ``ridge`` * tr(C) / m; C itself where it is zero."""
    result = gram.clone()
    result.diagonal().add_(ridge * gram.diagonal().mean())
    return result


def greedy_elimination(matrix: torch.Tensor, output: torch.Tensor, block: int = BLOCK) -> Elimination:
    """Drop the channels of A (m, m) one by one, each time the cheapest for W_D = ``output`` (m, d); both float64.

    A must be positive definite, as :func:`regularised` makes it. ``block`` channels are found at a time: among the
    2 x ``block`` cheapest, each step is exact, and only then is the inverse updated as a whole, so that
    nearly all work is in matrix products. With ``block`` m every step is the exact greedy one.
    """
    m = len(matrix)
    names = torch.arange(m, device=matrix.device)  # of the channels that the working copies still hold
    inverse, weights = _inverse(matrix), output.clone()
    alive = torch.ones(m, dtype=torch.bool, device=matrix.device)
    order, costs = [], [matrix.new_zeros(1)]
    left = m
    while left > 1:
        scores = weights.square().sum(1) / inverse.diagonal()
        count = min(block, left - 1)
        near = scores.masked_fill(~alive, torch.inf).topk(min(2 * count, left), largest=False).indices
        chosen, cost = _cheapest(inverse[near[:, None], near], weights[near], count)
        gone = near[chosen]
        order.append(names[gone])
        costs.append(cost)
        step = torch.linalg.solve(inverse[gone[:, None], gone], inverse[gone])  # (count, m)
        weights -= step.T @ weights[gone]
        inverse.addmm_(inverse[:, gone], step, alpha=-1)
        alive[gone] = False
        left -= count
        if left < _COMPACT * len(names):
            names, weights = names[alive], weights[alive]
            inverse = inverse[alive][:, alive]
            alive = torch.ones(left, dtype=torch.bool, device=matrix.device)
    return Elimination(torch.cat(order), torch.cat(costs).cumsum(0))


def refit(matrix: torch.Tensor, output: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best W' (k, d) for the ``kept`` channels S, and its J."""
    mask = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    mask[kept] = False
    dropped = mask.nonzero().flatten()
    across = matrix[kept[:, None], dropped] @ output[dropped]  # A_SD W_D
    gain = solve_psd(matrix[kept[:, None], kept], across)
    inner = matrix[dropped[:, None], dropped] @ output[dropped]
    error = float((output[dropped] * inner).sum() - (across * gain).sum())
    return output[kept] + gain, max(0.0, error)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    factor = cholesky_of_copy(matrix)
    if factor is None:
        raise ValueError("the matrix is not positive definite; use a larger ridge")
    inverse: torch.Tensor = torch.cholesky_inverse(factor)
    return inverse


def _cheapest(inverse: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily, ``count`` of the n channels of A_SS^-1[P, P] (n, n) and W[P] (n, d), and what each raises J by."""
    inverse, weights = inverse.clone(), weights.clone()
    gone = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
    chosen, costs = [], []
    for _ in range(count):
        scores = weights.square().sum(1) / inverse.diagonal()
        cost, index = scores.masked_fill(gone, torch.inf).min(0)
        chosen.append(index)
        costs.append(cost)
        gone[index] = True
        ratio = inverse[:, index] / inverse[index, index]
        weights -= ratio[:, None] * weights[index]
        inverse -= ratio[:, None] * inverse[index]
    return torch.stack(chosen), torch.stack(costs)
