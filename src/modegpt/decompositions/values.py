"""Type III (value-output) from what the heads put out: a basis for every value head, one output map fitted to all.

Head j puts out Z_j = A_j (X W_v), A_j its attention weights. Values of k channels are X W_v P with P (h, k), and since
A_j acts on tokens alone, the head then puts out Z_j P. For Z = [Z_1 ... Z_H], C = Z^T Z, the objective is

    J(P, W_o') = ||Z W_o - Z P W_o'||_F^2 + lambda ||W_o - P W_o'||_F^2,  P block-diagonal, W_o' (H k, d)

where Algorithm 3 has X in place of A_j X and each head by itself. Within the g heads of a value head, P is taken from
one SVD of L^T [W_o,1 ... W_o,g], L L^T the mean of their blocks of A = C + lambda I: the best P for heads that agree in
A and do not overlap; or it is one of the paper's, where that is better. W_o' is then the least-squares optimum over all
heads together, and from there both are improved in turn: for given W_o' the best P is the solution of a least-squares
problem as well.
"""

from __future__ import annotations

import torch

from .linalg import cholesky_of_psd, conjugate_gradients

#: Of :func:`alternating_fit`: what further rounds gain is hundredths of what these do.
ROUNDS = 8
#: Of conjugate gradients for P in every round.
STEPS = 2
#: How far P goes of what they find. Up to 2, J falls all along: they minimise it on the line that they end on.
OVER = 1.7


def group_bases(blocks: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """P (G, h, h) for L L^T = ``blocks`` (G, h, h) and W_o = ``output`` (G, g, h, d), the most important column first.

    With W_v^T C W_v for the blocks and one head per group, W_v P is Algorithm 3's W_v'.
    """
    factor = cholesky_of_psd(blocks)  # L
    seen = factor.mT @ output.permute(0, 2, 1, 3).flatten(2)  # L^T [W_o,1 ... W_o,g]: (G, h, g d)
    left, _, _ = torch.linalg.svd(seen @ seen.mT)
    bases: torch.Tensor = torch.linalg.solve_triangular(factor.mT, left, upper=True)
    return bases


def energy_bases(blocks: torch.Tensor) -> torch.Tensor:
    """P (G, h, h) by the energy in ``blocks`` (G, h, h) alone, as in appendix B.1: it does not see W_o.

    With W_v^T C W_v for the blocks, W_v P is B.1's W_v'.
    """
    values, vectors = torch.linalg.eigh(blocks)
    largest = values[..., -1:]
    least = torch.where(largest > 0, values.shape[-1] * torch.finfo(values.dtype).eps * largest, 1.0)
    bases: torch.Tensor = vectors / torch.maximum(values, least).sqrt().unsqueeze(-2)
    return bases.flip(-1)


def mean_blocks(matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The mean of A's diagonal blocks over the heads of each group: (G, h, h)."""
    groups, per_group, h, _ = output.shape
    blocks = matrix.view(groups * per_group, h, groups * per_group, h).diagonal(dim1=0, dim2=2)  # (h, h, H)
    mean: torch.Tensor = blocks.permute(2, 0, 1).unflatten(0, (groups, per_group)).mean(1)
    return mean


def value_errors(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """J at ranks 0, 1, ..., h, (h + 1,), of the first columns of the given ``basis`` (G, h, h) with the best W_o'.

    ``matrix`` is A (H h, H h), positive definite, ``output`` W_o (G, g, h, d); all float64. With the columns of P
    sorted by rank first, one Cholesky factor L of P^T A P holds those of all ranks, and the error of rank k is what the
    rows of L^-1 P^T A W_o after the first k H still explain.
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
    return torch.cat((explained.flip(0).cumsum(0).flip(0), explained.new_zeros(1)))


def output_fit(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The best W_o' (G, g, k, d) for P = ``basis`` (G, h, k), see :func:`value_errors`."""
    fitted, _ = _Alternation(matrix, output).output_map(basis)
    return fitted


def alternating_fit(
    matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """P (G, h, k) and W_o' (G, g, k, d) from P = ``basis`` (G, h, k), each fitted to the other in turn, and their J.

    ``matrix`` is A (H h, H h), positive definite, ``output`` W_o (G, g, h, d); all float64. J never rises.
    """
    problem = _Alternation(matrix, output)
    fitted, loss = problem.output_map(basis)
    for _ in range(ROUNDS):
        turned = basis + OVER * problem.step(basis, fitted)
        other, now = problem.output_map(turned)
        if not now < loss:
            break
        basis, fitted, loss = turned, other, now
    return basis, fitted, max(0.0, loss)


class _Alternation:
    """The two least-squares problems that J is, for given P and for given W_o'."""

    def __init__(self, matrix: torch.Tensor, output: torch.Tensor) -> None:
        self.groups, self.per_group, h, d = output.shape
        self.heads = self.groups * self.per_group
        self._blocks = matrix.view(self.heads, h, self.heads, h)
        self._moment = (matrix @ output.reshape(-1, d)).view(self.heads, h, d)  # A W_o
        self._norm = float((output.reshape(self.heads, h, d) * self._moment).sum())
        self._root = cholesky_of_psd(mean_blocks(matrix, output))

    def output_map(self, basis: torch.Tensor) -> tuple[torch.Tensor, float]:
        """W_o' with P^T A P W_o' = P^T A W_o, and J."""
        rank, of_heads = basis.shape[-1], basis.repeat_interleave(self.per_group, 0)
        inner = torch.einsum("ahj,ahbk->ajbk", of_heads, self._times(basis)).reshape(2 * [self.heads * rank])
        seen = (of_heads.mT @ self._moment).flatten(0, 1)
        fitted = torch.cholesky_solve(seen, cholesky_of_psd(inner))
        return fitted.view(self.groups, self.per_group, rank, -1), self._norm - float((seen * fitted).sum())

    def step(self, basis: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """From P towards the solution of its own normal equations, by conjugate gradients.

        For the P_a of group a they are

            sum over j in a, all l:  A_jl P_l W_l W_j^T = sum over j in a:  (A W_o)_j W_j^T

        with W_j the part of W_o' of head j and P_l that of the group of head l.
        """
        parts, rank = output.flatten(0, 1), basis.shape[-1]
        square = (parts.flatten(0, 1) @ parts.flatten(0, 1).mT).view(self.heads, rank, self.heads, rank)
        scale = cholesky_of_psd(self._of_groups(square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)))

        def products(p: torch.Tensor) -> torch.Tensor:
            return self._of_groups(torch.einsum("ahbk,bkaj->ahj", self._times(p), square))

        slope = self._of_groups(self._moment @ parts.mT) - products(basis)

        def preconditioned(p: torch.Tensor) -> torch.Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(p, self._root).mT, scale).mT

        return conjugate_gradients(slope, products, preconditioned, STEPS)

    def _times(self, basis: torch.Tensor) -> torch.Tensor:
        """A P, every head's columns with its group's part: (H, h, H, k)."""
        return torch.einsum("ahbl,blk->ahbk", self._blocks, basis.repeat_interleave(self.per_group, 0))

    def _of_groups(self, x: torch.Tensor) -> torch.Tensor:
        return torch.unflatten(x, 0, (self.groups, self.per_group)).sum(1)
