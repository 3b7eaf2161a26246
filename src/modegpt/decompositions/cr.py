"""Type II (query-key): CR decomposition by column selection. Paper: Algorithm 2, Theorem 2, appendix B.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linalg import top_indices


@dataclass(frozen=True)
class CRDecomposition:
    """The kept query-key channels of the heads that share one key head, for one group or for several."""

    kept: torch.Tensor
    """Selected items (pairs, or single channels without rotary): (..., k) int64, ascending."""
    error: float
    """sum over the heads of ||Q K^T - Q S (K S)^T||_F^2, exactly, over all pairs of calibration tokens:
    an upper bound on the paper's sum over pairs within a window."""
    norm: float
    """sum over the heads of ||Q K^T||_F^2."""


def channel_scores(query_gram: torch.Tensor, key_gram: torch.Tensor) -> torch.Tensor:
    """s_i = sqrt(sum_j ||C_q,j^(1/2)[:, i]||^2 ||C_k^(1/2)[i, :]||^2), j over the group's query heads.

    ``query_gram`` (..., g, h, h), ``key_gram`` (..., h, h); returns (..., h). Since ||C^(1/2)[:, i]||^2 = C_ii, no
    matrix root is needed. With g = 1 this is line 3 of Algorithm 2; with more it is appendix B.1.
    """
    energy = query_gram.diagonal(dim1=-2, dim2=-1).sum(-2) * key_gram.diagonal(dim1=-2, dim2=-1)
    return energy.clamp_min(0).sqrt()


def pair_scores(scores: torch.Tensor) -> torch.Tensor:
    """s_p = sqrt(s_i^2 + s_i'^2) for the rotary pair p = (i, i' = i + h/2): (..., h) -> (..., h/2).

    The paper does not say how the two channels of a pair combine; this is its own rule for combining
    the heads of a group, applied to the pair.
    """
    first, second = scores.chunk(2, dim=-1)
    return (first.square() + second.square()).sqrt()


def cr_decomposition(
    query_gram: torch.Tensor, key_gram: torch.Tensor, rank: int, *, rotary: bool = True
) -> CRDecomposition:
    """Keep the ``rank`` rotary pairs (or channels) of largest score: W_q' = W_q S, W_k' = W_k S.

    ``query_gram`` C_q = sum over tokens of q^T q, (..., g, h, h) for the g query heads of a group, and ``key_gram``
    C_k (..., h, h), both float64 and after the rotary embedding; leading axes are groups, each with a selection of
    its own. A pair's two channels are i and i + h/2. Dropping the channels D costs exactly the sum of the block
    [D, D] of sum_j C_q,j o C_k (elementwise).
    """
    cost = query_gram.sum(-3) * key_gram
    scores = channel_scores(query_gram, key_gram)
    kept = top_indices(pair_scores(scores) if rotary else scores, rank)

    channels = torch.cat((kept, kept + key_gram.shape[-1] // 2), dim=-1) if rotary else kept
    dropped = torch.ones_like(scores).scatter_(-1, channels, 0.0)  # (..., h)
    error = (dropped * (cost @ dropped[..., None])[..., 0]).sum(-1)
    return CRDecomposition(kept, error=float(error.clamp_min(0).sum()), norm=float(cost.sum()))
