"""Linear algebra shared by the decompositions."""

from __future__ import annotations

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
    unit = matrix * inverse_scale[:, None] * inverse_scale
    scaled_rhs = rhs * inverse_scale[:, None]

    factor, failed = torch.linalg.cholesky_ex(unit)
    # The trace of the inverse bounds the inverse of the smallest eigenvalue; pivots bound nothing.
    if not failed and torch.cholesky_inverse(factor).diagonal().sum() < 1 / smallest:
        solution = torch.cholesky_solve(scaled_rhs, factor)
    else:
        values, vectors = torch.linalg.eigh(unit)
        kept = values > smallest * values[-1].clamp_min(1e-300)
        inverse = torch.where(kept, values.reciprocal(), 0.0)
        solution = vectors @ (inverse[:, None] * (vectors.T @ scaled_rhs))
    return solution * inverse_scale[:, None]


def top_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest entries' indices along the last axis, ascending; ties go to the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
