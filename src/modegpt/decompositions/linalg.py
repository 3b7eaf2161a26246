"""Linear algebra shared by the decompositions."""

from __future__ import annotations

from collections.abc import Callable

import torch


def cutoff(size: int, resolution: float) -> float:
    """The share of the largest eigenvalue below which one of a Gram matrix is rounding.

    ``resolution`` is the relative precision of the matrix's entries; float64 arithmetic on it adds its own.
    """
    return max(size * torch.finfo(torch.float64).eps, resolution)


def solve_psd(matrix: torch.Tensor, rhs: torch.Tensor, resolution: float = 0.0) -> torch.Tensor:
    """X with A X = B for a symmetric positive semi-definite A, exactly or nearly singular ones included.

    A (n, n), a Gram matrix, and B (n, p) are float64; returns (n, p). A is first scaled to unit diagonal, so that
    the cut-off does not depend on the units of single channels: with D = diag(A),
    X = D^(-1/2) pinv(D^(-1/2) A D^(-1/2)) D^(-1/2) B. This solves every consistent system, and is pinv(A) B
    where A is regular. A zero row of A gives a zero row of X. A well-conditioned A is solved by
    Cholesky; otherwise eigenvalues below :func:`cutoff` of the largest are treated as zero.
    """
    smallest = cutoff(matrix.shape[0], resolution)
    scale = matrix.diagonal().clamp_min(0).sqrt()
    inverse_scale = torch.where(scale > 0, scale.reciprocal(), 0.0)
    scaled_rhs = rhs * inverse_scale[:, None]

    factor = cholesky_of_copy(matrix, inverse_scale)
    # The trace of the inverse bounds the inverse of the smallest eigenvalue; pivots bound nothing.
    if factor is not None and inverse_diagonal(factor).sum() < 1 / smallest:
        # Column-major and in place: the routine then makes no copy of either matrix.
        solution = scaled_rhs.mT.contiguous().mT
        del scaled_rhs
        torch.linalg.solve_triangular(factor, solution, upper=False, out=solution)
        torch.linalg.solve_triangular(factor.mT, solution, upper=True, out=solution)
    else:
        values, vectors = torch.linalg.eigh(matrix * inverse_scale[:, None] * inverse_scale)
        kept = values > smallest * values[-1].clamp_min(1e-300)
        inverse = torch.where(kept, values.reciprocal(), 0.0)
        solution = vectors @ (inverse[:, None] * (vectors.T @ scaled_rhs))
    return solution * inverse_scale[:, None]


def cholesky_of_copy(
    matrix: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | float = 0.0
) -> torch.Tensor | None:
    """L with L L^T = diag(s) A diag(s) + shift I for a symmetric A (n, n), or None where that is not positive definite.

    One n x n matrix beside A is held and no other: these are what limits the size of a model.
    """
    copy = matrix.clone()
    if scale is not None:
        copy.mul_(scale[:, None]).mul_(scale)
    copy.diagonal().add_(shift)
    factor = copy.mT  # the same matrix in the order that the routine works in, so that it can work in place
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if failed else factor


def cholesky_of_psd(matrix: torch.Tensor) -> torch.Tensor:
    """L with L L^T = A (..., n, n), lower triangular and regular, of a symmetric A that only rounding makes indefinite.

    Where A is not positive definite, eigenvalues below n eps of the largest count as that; a zero A as the identity.
    """
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(matrix)
        largest = values[..., -1:]
        least = torch.where(largest > 0, matrix.shape[-1] * torch.finfo(matrix.dtype).eps * largest, 1.0)
        root = vectors * torch.maximum(values, least).sqrt().unsqueeze(-2)
        lower = torch.linalg.qr(root.mT, mode="r").R.mT
    return lower


def conjugate_gradients(
    slope: torch.Tensor,
    products: Callable[[torch.Tensor], torch.Tensor],
    preconditioned: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Towards X with A X = B = ``slope``, from zero, for a positive semi-definite A that only its ``products`` tell.

    ``preconditioned`` applies an approximate inverse of A. Any shape and dtype; sums are float64. Fewer than ``steps``
    where B or the curvature along a step is zero.
    """
    found, direction, last = torch.zeros_like(slope), torch.zeros_like(slope), 1.0
    for _ in range(steps):
        step = preconditioned(slope)
        size = inner_product(step, slope)
        if not size > 0:
            break
        direction = step + direction * (size / last)
        change = products(direction)
        curvature = inner_product(direction, change)
        if not curvature > 0:
            break
        length = size / curvature
        found, slope, last = found + length * direction, slope - length * change, size
    return found


def inner_product(one: torch.Tensor, other: torch.Tensor) -> float:
    """The sum of the elementwise products, in float64."""
    return float((one * other).sum(dtype=torch.float64))


def inverse_diagonal(factor: torch.Tensor, block: int = 512) -> torch.Tensor:
    """diag(A^-1) of A = L L^T, (n,): the squared lengths of the columns of L^-1, a block of columns at a time."""
    n = factor.shape[0]
    result = factor.new_empty(n)
    for start in range(0, n, block):
        width = min(block, n - start)
        columns = factor.new_zeros(n - start, width)  # L^-1 is triangular too: above, its columns are zero
        columns.diagonal().fill_(1)
        for row in range(start, n, block):  # forward substitution, by blocks of rows
            stop = min(row + block, n)
            here = columns[row - start : stop - start]
            here -= factor[row:stop, start:row] @ columns[: row - start]
            here.copy_(torch.linalg.solve_triangular(factor[row:stop, row:stop], here, upper=False))
        result[start : start + width] = columns.square_().sum(0)
    return result


def top_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest entries' indices along the last axis, ascending; ties go to the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
