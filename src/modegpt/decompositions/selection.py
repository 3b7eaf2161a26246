"""Selection by scores that do not depend on what else is selected."""

from __future__ import annotations

import torch


def selection_losses(scores: torch.Tensor) -> torch.Tensor:
    """What is lost when of each row only the r units of largest score stay: their other scores' sum, r = 0, 1, ..., n.

    ``scores`` (..., n), not negative, one row for every selection of the same size; returns (n + 1,) float64, the sum
    over the rows.
    """
    ascending = scores.double().sort(dim=-1).values.reshape(-1, scores.shape[-1]).sum(0)
    return torch.cat((ascending.new_zeros(1), ascending.cumsum(0))).flip(0)
