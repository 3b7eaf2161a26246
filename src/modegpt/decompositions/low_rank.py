"""Two thin maps in place of one or of several: truncated singular value decompositions, plain and weighted.

For y = x W the rank-k maps A (d, k) and B (k, n) that minimise, over all matrices of that rank,

    J = ||R^T (W - A B)||_F^2

are A = R^-T U_k S_k, B = V_k^T with R^T W = U S V^T (Eckart and Young, 1936), and J is the sum of the squares of the
singular values left out. What R is makes the method:

    identity                        truncation of the weights themselves; with maps that share their input in one W,
                                    W = [W_1 W_2 ...] = A [B_1 B_2 ...], joint truncation (arXiv 2402.16319)
    diag(s), s_i = (size of x_i)^a  ASVD (arXiv 2312.05821)
    L with L L^T = X^T X            SVD-LLM (arXiv 2403.07378): then J = ||X W - X A B||_F^2, the change of the output
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .linalg import cholesky_of_copy

#: a of ASVD: what its paper settles on.
ALPHA = 0.5


def break_even(inputs: int, outputs: int) -> int:
    """The largest rank at which two factors have no more parameters than the map: floor(d n / (d + n))."""
    return inputs * outputs // (inputs + outputs)


@dataclass(frozen=True)
class LowRank:
    """The best factors of one or several maps at every rank up to a limit K."""

    first: torch.Tensor
    """A: (d, K) float64, its columns and the rows of B equally long, and in the order of what they contribute."""
    second: torch.Tensor
    """B: (K, n) float64."""
    widths: tuple[int, ...]
    """n_1, n_2, ...: how many columns of B belong to which map."""
    errors: torch.Tensor
    """J at ranks 0, 1, ..., K: (K + 1,) float64."""

    def share(self, rank: int) -> float:
        """J at ``rank`` over that of losing the maps; zero for maps that are zero."""
        whole = float(self.errors[0])
        return float(self.errors[rank]) / whole if whole > 0 else 0.0

    def at(self, rank: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A (d, k) and B_1, B_2, ... (k, n_i) for k = ``rank``."""
        return self.first[:, :rank], self.second[:rank].split(self.widths, dim=1)


def low_rank(maps: Sequence[torch.Tensor], limit: int, root: torch.Tensor | None = None) -> LowRank:
    """The best A and [B_1 B_2 ...] for [W_1 W_2 ...] at all ranks up to ``limit``.

    ``maps`` are W_i (d, n_i) float64; ``root`` is R: None for the identity, (d,) for a diagonal matrix or a lower
    triangular (d, d), regular and float64, see :func:`activation_scales` and :func:`whitening`.
    """
    whole = torch.cat(list(maps), dim=1)
    if root is not None:
        whole = root[:, None] * whole if root.dim() == 1 else root.mT @ whole
    left, singular, right = torch.linalg.svd(whole, full_matrices=False)
    del whole
    squares = singular.square()
    errors = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))  # from the smallest: no cancellation
    limit = min(limit, len(singular))
    first, second = left[:, :limit] * singular[:limit], right[:limit]
    if root is not None:
        diagonal = root.dim() == 1
        first = first / root[:, None] if diagonal else torch.linalg.solve_triangular(root.mT, first, upper=True)
    size = first.norm(dim=0)  # rows of V^T have length one
    scale = torch.where(size > 0, size.sqrt(), 1.0)
    widths = tuple(weight.shape[1] for weight in maps)
    return LowRank(first / scale, second * scale[:, None], widths, errors[: limit + 1])


def activation_scales(energy: torch.Tensor, ridge: float, alpha: float = ALPHA) -> torch.Tensor:
    """s_i = (c_i + lambda)^(alpha / 2), (d,): the size of every input channel to the power of alpha.

    ``energy`` is c_i = sum of x_i^2 over the tokens, (d,) float64, lambda = ``ridge`` * mean(c), so that a channel that
    is never used keeps a weight. ASVD takes the mean of |x_i|. The root mean square is ours: sums of squares are
    gathered for other methods as well, and only its ratio to other channels' matters. All ones where c is zero.
    """
    mean = energy.mean()
    return (energy + ridge * mean).pow(alpha / 2) if mean > 0 else torch.ones_like(energy)


def whitening(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """L (d, d), lower triangular, with L L^T = C + lambda I, lambda = ``ridge`` * tr(C) / d.

    ``gram`` is C = X^T X (d, d) float64. With lambda, J is ||X W - X A B||_F^2 + lambda ||W - A B||_F^2: C can be
    singular, and what no token excites is then truncated as without data. Where the rounding in C outweighs lambda,
    negative eigenvalues count as zero. The identity where C is zero.
    """
    mean = float(gram.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = cholesky_of_copy(gram, shift=ridge * mean)
    if factor is None:
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * (values.clamp_min(0) + ridge * mean).sqrt()
        factor = torch.linalg.qr(root.mT, mode="r").R.mT
    return factor
