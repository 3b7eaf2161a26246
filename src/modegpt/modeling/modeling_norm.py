"""Query and key norms with fewer channels: a part of the runtime of a compressed model, see ``modeling_modegpt.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init


class CompactNorm(nn.Module):
    """x_i / sqrt(sum_j e_j x_j^2 / n + eps) w_i + b_i: a norm of ``n`` channels of which only some are there.

    ``energy`` e says for how many of the n channels each one that is there stands; all ones where none is missing.
    Sums go over one head's channels or, if ``joint``, over all heads'. A layer norm is one of centred channels,
    and the maps before it do the centring.
    """

    def __init__(self, heads: int, channels: int, like: Any, dense: tuple[int, int], offset: float) -> None:
        """For (..., ``heads``, ``channels``) in place of the stock norm ``like`` of ``dense`` heads and channels."""
        super().__init__()
        parts = norm_parts(like)
        first = parts[0]
        self.offset = offset
        self.eps = float(first.variance_epsilon if hasattr(first, "variance_epsilon") else first.eps)
        self.joint = is_joint(like, *dense)
        self.full = dense[0] * dense[1] if self.joint else dense[1]
        shape, options = (heads, channels), {"device": first.weight.device, "dtype": first.weight.dtype}
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.energy = nn.Parameter(torch.empty(shape, **options), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if getattr(first, "bias", None) is not None:
            self.bias = nn.Parameter(torch.empty(shape, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, channels) to the same shape, computed in float32."""
        values = x.float()
        total = (values.square() * self.energy.float()).sum((-2, -1) if self.joint else -1, keepdim=True)
        values = values * torch.rsqrt(total / self.full + self.eps) * (self.weight.float() + self.offset)
        return (values if self.bias is None else values + self.bias.float()).to(x.dtype)

    def reset(self) -> None:
        """The state of a fresh norm."""
        init.constant_(self.weight, 1 - self.offset)
        init.ones_(self.energy)
        if self.bias is not None:
            init.zeros_(self.bias)


def norm_parts(norm: Any) -> list[Any]:
    """The norms that a stock query or key norm consists of: itself, or one for each head."""
    return list(norm.norms) if hasattr(norm, "norms") else [norm]


def is_joint(norm: Any, heads: int, head_dim: int) -> bool:
    """Whether a stock query or key norm takes the mean square of all heads' channels together."""
    return bool(norm_parts(norm)[0].weight.shape == (heads * head_dim,)) and heads > 1
