"""Channels by how much they fluctuate about their mean, which a bias can stand for: FLAP (An et al., arXiv 2312.11983).

Replacing the input channels D of a linear map y = x W + b by their means changes y by (x_D - E[x_D]) W_D, and W_D is
then part of the bias: b <- b + E[x_D] W_D.
"""

from __future__ import annotations

import torch


def fluctuation(moments: torch.Tensor, tokens: int, output: torch.Tensor) -> torch.Tensor:
    """WIFV_j = Var(x_j) ||W_j||^2, what channel j of W = ``output`` (n, d) adds to y besides its mean: (n,) float64.

    ``moments`` (2, n) are the sums of x and of x^2 over so many ``tokens``. (FLAP, eq. 5; the variance is that over all
    tokens.) Summed over channels that do not vary together it is the error per token of replacing them.
    """
    mean, square = moments / max(1, tokens)
    variance: torch.Tensor = (square - mean.square()).clamp_min(0)
    return variance * output.square().sum(1)


def mean_contribution(moments: torch.Tensor, tokens: int, output: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """sum_{j in D} E[x_j] W_j for the ``dropped`` channels D: (d,)."""
    return moments[0, dropped] / max(1, tokens) @ output[dropped]


def standardised(scores: torch.Tensor, width: int = 1) -> torch.Tensor:
    """(s - mean(s)) / std(s) of a layer's channels (n,), averaged over units of ``width`` neighbours: (n / width,)."""
    spread = scores.std(correction=0)
    centred = scores - scores.mean()
    return (centred / spread if spread > 0 else torch.zeros_like(centred)).view(-1, width).mean(1)
