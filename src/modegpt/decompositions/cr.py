"""Type II (query-key): CR decomposition by column selection. Paper: Algorithm 2, Theorem 2, appendix B.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linalg import top_indices


@dataclass(frozen=True)
class CRDecomposition:
    """The kept query-key channels of the heads that share one key head, for one group or for several."""

    channels: torch.Tensor
    """Selected channels (..., k) int64. With rotary pairs, k = 2r: each one's first channel, then each one's second."""
    pairs: torch.Tensor | None
    """Their pairs (..., r), ascending; None without rotary. R / 2 stands for two channels that do not rotate."""
    error: float
    """sum over the heads of ||Q K^T - Q S (K S)^T||_F^2, exactly, over all pairs of calibration tokens:
    an upper bound on the paper's sum over pairs within a window."""
    norm: float
    """sum over the heads of ||Q K^T||_F^2."""
    scores: torch.Tensor
    """Of all couples (or channels, where none rotate): (..., h / 2) or (..., h)."""


def channel_scores(query_gram: torch.Tensor, key_gram: torch.Tensor) -> torch.Tensor:
    """s_i = sqrt(sum_j ||C_q,j^(1/2)[:, i]||^2 ||C_k^(1/2)[i, :]||^2), j over the group's query heads.

    ``query_gram`` (..., g, h, h), ``key_gram`` (..., h, h); returns (..., h). Since ||C^(1/2)[:, i]||^2 = C_ii, no
    matrix root is needed. With g = 1 this is line 3 of Algorithm 2; with more it is appendix B.1.
    """
    energy = query_gram.diagonal(dim1=-2, dim2=-1).sum(-2) * key_gram.diagonal(dim1=-2, dim2=-1)
    return energy.clamp_min(0).sqrt()


def couples(scores: torch.Tensor, rotary: int, neighbours: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two channels of every couple that is kept or dropped together, and its rotary pair: each (..., h / 2).

    Of the ``rotary`` first channels R of ``scores`` (..., h), pair p is (p, p + R / 2), or (2p, 2p + 1) if
    ``neighbours``. Those after them may go singly, in any couples: the two of largest score, the next two and so on,
    so that keeping the best couples keeps the best channels. Their pair is R / 2.
    """
    h = scores.shape[-1]
    pairs = torch.arange(rotary // 2, device=scores.device).expand(*scores.shape[:-1], -1)
    first, second = (2 * pairs, 2 * pairs + 1) if neighbours else (pairs, pairs + rotary // 2)
    order = rotary + scores[..., rotary:].sort(dim=-1, descending=True, stable=True).indices
    still = pairs.new_full((*scores.shape[:-1], (h - rotary) // 2), rotary // 2)
    return (
        torch.cat((first, order[..., ::2]), dim=-1),
        torch.cat((second, order[..., 1::2]), dim=-1),
        torch.cat((pairs, still), dim=-1),
    )


def cr_decomposition(
    query_gram: torch.Tensor, key_gram: torch.Tensor, rank: int, *, rotary: int | None = None, neighbours: bool = False
) -> CRDecomposition:
    """Keep the ``rank`` couples (or channels, where none rotate) of largest score: W_q' = W_q S, W_k' = W_k S.

    ``query_gram`` C_q = sum over tokens of q^T q, (..., g, h, h) for the g query heads of a group, and ``key_gram``
    C_k (..., h, h), both float64 and after the rotary embedding; leading axes are groups, each with a selection of
    its own. ``rotary`` R is the number of channels that rotate (all by default), see :func:`couples`. A couple's score
    is s_p = sqrt(s_i^2 + s_i'^2): the paper does not say how the two channels of a pair combine; this is its own
    rule for combining the heads of a group, applied to the pair. Dropping the channels D costs exactly the sum of the
    block [D, D] of sum_j C_q,j o C_k (elementwise).
    """
    cost = query_gram.sum(-3) * key_gram
    scores = channel_scores(query_gram, key_gram)
    pairs, ranked = None, scores
    if rotary == 0:
        channels = top_indices(scores, rank)
    else:
        first, second, pair = couples(scores, scores.shape[-1] if rotary is None else rotary, neighbours)
        ranked = (scores.gather(-1, first).square() + scores.gather(-1, second).square()).sqrt()
        best = top_indices(ranked, rank)
        channels = torch.cat((first.gather(-1, best), second.gather(-1, best)), dim=-1)
        pairs = pair.gather(-1, best)
    dropped = torch.ones_like(scores).scatter_(-1, channels, 0.0)  # (..., h)
    error = (dropped * (cost @ dropped[..., None])[..., 0]).sum(-1)
    lost, norm = float(error.clamp_min(0).sum()), float(cost.sum())
    return CRDecomposition(channels, pairs, lost, norm, ranked)
