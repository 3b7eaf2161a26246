"""Type III (value-output) from what the heads put out: a basis for every value head, one output map fitted to all.

Head j puts out Z_j = A_j (X W_v), A_j its attention weights. Values of k channels are X W_v P with P (h, k), and since
A_j acts on tokens alone, the head then puts out Z_j P. For Z = [Z_1 ... Z_H], C = Z^T Z, the objective is

    J(P, W_o') = ||Z W_o - Z P W_o'||_F^2 + lambda ||W_o - P W_o'||_F^2,  P block-diagonal, W_o' (H k, d)

where Algorithm 3 has X in place of A_j X and each head by itself. Within the g heads of a value head, P is taken from
one SVD of L^T [W_o,1 ... W_o,g], L L^T the mean of their blocks of A = C + lambda I: the best P for heads
that agree in A and do not overlap. W_o' is then the least-squares optimum over all heads together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linalg import cholesky_of_psd


@dataclass(frozen=True)
class ValueLadder:
    """Bases and output maps of every rank at once."""

    basis: torch.Tensor
    """P of every group: (G, h, h) float64; rank k takes the first k columns."""
    factor: torch.Tensor
    """L with L L^T = P^T A P: (h H, h H), rank-major, so that its first k H rows belong to rank k."""
    projected: torch.Tensor
    """L^-1 P^T A W_o: (h H, d)."""
    errors: torch.Tensor
    """J at ranks 0, 1, ..., h: (h + 1,)."""

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """P (G, h, k) and W_o' (G, g, k, d) of ``rank`` k."""
        groups, h, _ = self.basis.shape
        heads = len(self.factor) // h
        size = rank * heads
        output = torch.linalg.solve_triangular(self.factor[:size, :size].mT, self.projected[:size], upper=True)
        return self.basis[..., :rank], output.view(rank, groups, heads // groups, -1).permute(1, 2, 0, 3)


def group_bases(matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """P (G, h, h) of A = ``matrix`` (H h, H h) and W_o = ``output`` (G, g, h, d), the most important column first."""
    factor = cholesky_of_psd(_mean_blocks(matrix, output))  # L
    seen = factor.mT @ output.permute(0, 2, 1, 3).flatten(2)  # L^T [W_o,1 ... W_o,g]: (G, h, g d)
    left, _, _ = torch.linalg.svd(seen @ seen.mT)
    bases: torch.Tensor = torch.linalg.solve_triangular(factor.mT, left, upper=True)
    return bases


def energy_bases(matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """P (G, h, h) by the energy of the values alone, as in appendix B.1: it does not see W_o."""
    values, vectors = torch.linalg.eigh(_mean_blocks(matrix, output))
    least = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:].clamp_min(1e-300)
    bases: torch.Tensor = vectors / torch.maximum(values, least).sqrt().unsqueeze(-2)
    return bases.flip(-1)


def _mean_blocks(matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The mean of A's diagonal blocks over the heads of each group: (G, h, h)."""
    groups, per_group, h, _ = output.shape
    blocks = matrix.view(groups * per_group, h, groups * per_group, h).diagonal(dim1=0, dim2=2)  # (h, h, H)
    mean: torch.Tensor = blocks.permute(2, 0, 1).unflatten(0, (groups, per_group)).mean(1)
    return mean


def value_ladder(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor) -> ValueLadder:
    """Every rank's best W_o' for the given ``basis`` (G, h, h).

    ``matrix`` is A (H h, H h), positive definite, ``output`` W_o (G, g, h, d); all float64. With the columns of P
    sorted by rank first, one Cholesky factor holds those of all ranks, and the error of rank k is what the rows
    of L^-1 P^T A W_o after the first k H still explain.
    """
    groups, per_group, h, d = output.shape
    heads = groups * per_group
    basis_of_head = basis.repeat_interleave(per_group, 0)  # (H, h, h)
    rows = matrix.view(heads, h, heads * h)
    rotated = torch.einsum("ahk,ahj->kaj", basis_of_head, rows)  # P^T A: (h, H, H h)
    inner = torch.einsum("kabh,bhl->kalb", rotated.unflatten(2, (heads, h)), basis_of_head)
    factor = cholesky_of_psd(inner.reshape(h * heads, h * heads))
    moment = rotated.flatten(0, 1) @ output.reshape(heads * h, d)  # P^T A W_o
    projected = torch.linalg.solve_triangular(factor, moment, upper=False)
    explained = projected.square().sum(1).view(h, heads).sum(1)
    errors = torch.cat((explained.flip(0).cumsum(0).flip(0), explained.new_zeros(1)))
    return ValueLadder(basis, factor, projected, errors)
