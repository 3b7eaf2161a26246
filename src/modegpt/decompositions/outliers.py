"""Outliers of a layer: the score of OWL (Yin et al., arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Maps = Iterable[tuple[torch.Tensor, torch.Tensor]]


def outlier_share(maps: Callable[[], Maps], threshold: float) -> float:
    """D = the share of the entries of A above M mean(A), A_ij = |W_ij| ||x_j||_2, over all maps of a layer together.

    ``maps`` is called twice, for the mean and for the count, and gives weights W (in, out), in any floating-point
    dtype, with the norms (in,) over the tokens of what enters their input channels j. ``threshold`` is M.
    """
    total, count = 0.0, 0
    for weight, norms in maps():
        total += float((weight.double().abs().sum(1) * norms).sum())
        count += weight.numel()
    limit = threshold * total / count
    above = sum(int(_above(weight, norms, limit).sum()) for weight, norms in maps())
    return above / count


def _above(weight: torch.Tensor, norms: torch.Tensor, limit: float) -> torch.Tensor:
    """Compared row by row with |W_ij| so that A need not be made; a channel that is always zero has no outliers."""
    limits = torch.where(norms > 0, limit / norms, torch.inf)
    return weight.abs() > limits[:, None]
