"""Norms of queries and keys that lose channels: what their mean square is, from those that stay."""

from __future__ import annotations

import torch

ITERATIONS = 200


def norm_energy(squares: torch.Tensor, kept: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Argmin over e >= 0 of sum over tokens of (sum_{i in S} e_i u_i / n - 1)^2, u_i = n x_i^2 / sum_j x_j^2.

    An RMS norm divides by the root mean square of its n channels. Where only the channels S are left,
    sum_{i in S} e_i x_i^2 / n takes the place of the mean square, and the sum above is its squared relative error
    over the calibration tokens. ``squares`` U = sum over tokens of u^T u (..., n, n) float64 says it all: since
    sum_j u_j = n, sum over tokens of u_i = sum_j U_ij / n. ``kept`` S is (..., k) indices; returns e (..., k).

    The problem has no negative numbers, so multiplicative updates e <- e U_S1 / (U_SS e) keep e from becoming
    negative and never increase the sum (Lee and Seung, 2001). They start from the best constant e, hence end no
    worse than a calibrated constant per norm. Where what is dropped is always zero, e = 1 exactly.
    """
    n = squares.shape[-1]
    if kept.shape[-1] == n:
        return torch.ones_like(kept, dtype=squares.dtype)
    rows = squares.gather(-2, kept.unsqueeze(-1).expand(*kept.shape, n))
    within = rows.gather(-1, kept.unsqueeze(-2).expand(*kept.shape, kept.shape[-1]))  # U_SS
    target = rows.sum(-1)  # U_S 1 = n times the sum over tokens of u_i
    total = within.sum((-2, -1), keepdim=True)[..., 0]
    energy = torch.where(total > 0, target.sum(-1, keepdim=True) / total, 1.0).expand_as(target)
    for _ in range(iterations):
        now = (within @ energy.unsqueeze(-1)).squeeze(-1)
        energy = torch.where(now > 0, energy * target / now, energy)
    return energy
