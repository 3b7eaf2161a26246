"""Type I (MLP): Nystroem approximation with ridge leverage scores. Paper: Algorithm 1, Theorem 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linalg import cholesky_of_copy, inverse_diagonal, solve_psd, top_indices


@dataclass(frozen=True)
class NystromDecomposition:
    """The kept channels and the re-fitted output map of one MLP."""

    kept: torch.Tensor
    """S as indices: (k,) int64, ascending."""
    output: torch.Tensor
    """W_D' of :func:`nystrom_decomposition`: (k, d) float64."""
    error: float
    """||Z W_D - Z S W_D'||_F^2 over the calibration tokens, exactly."""
    norm: float
    """||Z W_D||_F^2 over the calibration tokens."""
    scores: torch.Tensor | None = None
    """The ridge leverage scores (m,); None at full rank, where they are not needed."""


def ridge_leverage_scores(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """s_i = [C (C + lambda I)^-1]_ii, the ridge leverage score of channel i, in [0, 1].

    ``gram`` C = Z^T Z (m, m), float64. lambda = ``ridge`` * tr(C) / m, so that a score depends neither on
    the number of calibration tokens nor on the scale of the activations. (The paper sets lambda = 1
    without fixing the normalisation of C.) Computed as 1 - lambda [(C + lambda I)^-1]_ii.

    Raises ``ValueError`` unless ``ridge`` is positive. An all-zero C has all-zero scores.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    m = gram.shape[0]
    strength = ridge * gram.diagonal().mean()
    if strength <= 0:
        return torch.zeros(m, dtype=gram.dtype, device=gram.device)
    factor = cholesky_of_copy(gram, shift=strength)
    if factor is None:  # rounding in C outweighs lambda
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        scores: torch.Tensor = vectors.square() @ (values / (values + strength))
        return scores.clamp(0, 1)
    return (1 - strength * inverse_diagonal(factor)).clamp(0, 1)


def nystrom_decomposition(
    gram: torch.Tensor, output: torch.Tensor, rank: int, ridge: float, resolution: float = 0.0
) -> NystromDecomposition:
    """Keep the ``rank`` channels of largest ridge leverage and re-fit the output map to them.

    W_U' = W_U S, W_D' = pinv(S^T C S) S^T C W_D: the least-squares optimum for the given S. It is computed
    as W_D[S] + pinv(C_SS) C_SD W_D[D]: the same map, but where C_SS is singular it keeps the original
    weights in the directions that no calibration token excites.

    ``gram`` is C = Z^T Z (m, m) of the activations Z = sigma(X W_U) that enter ``output`` W_D (m, d), both
    float64; ``rank`` k is from 1 to m; ``resolution`` is the relative precision of C's entries. The error is
    that of the dropped channels D against their best prediction from the kept ones,
    tr(W_D[D]^T (C_DD - C_DS pinv(C_SS) C_SD) W_D[D]); what is below 1e-12
    of the norm is rounding.
    """
    m = gram.shape[0]
    norm = float((output * (gram @ output)).sum())
    if rank == m:
        everything = torch.arange(m, device=gram.device)
        return NystromDecomposition(everything, output.clone(), error=0.0, norm=norm)

    scores = ridge_leverage_scores(gram, ridge)
    kept = top_indices(scores, rank)
    mask = torch.ones(m, dtype=torch.bool, device=gram.device)
    mask[kept] = False
    dropped = mask.nonzero().flatten()

    across = gram[kept[:, None], dropped]  # C_SD
    prediction = solve_psd(
        gram[kept[:, None], kept], across, resolution
    )  # pinv(C_SS) C_SD: dropped channels from kept ones
    residual = gram[dropped[:, None], dropped] - across.T @ prediction
    dropped_output = output[dropped]
    return NystromDecomposition(
        kept,
        output[kept] + prediction @ dropped_output,
        error=max(0.0, float((dropped_output * (residual @ dropped_output)).sum())),
        norm=norm,
        scores=scores,
    )
