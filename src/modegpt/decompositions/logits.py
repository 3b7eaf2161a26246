"""Type II (query-key) judged by the attention that is paid: couples of channels go, those that stay make up for them.

A head's logit of a query t and a key s is a sum over its channels. In terms of features

    phi_i = q_i k_i + q_i' k_i',  phi_i' = q_i' k_i - q_i k_i'      for a rotary pair (i, i')
    phi_i = q_i k_i                                                  for a channel that does not rotate

it is sum_i c_i phi_i with c = 1 at the first of a pair, 0 at the second, and 1 at single channels. Other
coefficients c' are other queries: q_i + sqrt(-1) q_i' times c'_i - sqrt(-1) c'_i', a rotation and scaling of the
pair, which commutes with the rotary embedding. The softmax does not see what is equal for all keys, and hardly what
concerns keys that get no attention. So the objective is the variance of the logits' change over the keys as they are
attended to,

    J(c') = sum_t Var_{s ~ a_t}[sum_i (c - c')_i phi_i(t, s)] + ridge = (c - c')^T A (c - c'),  c' = 0 where dropped,

twice the leading term of the divergence of the new attention weights from a_t. A = F + ridge * diag(F), F the sum over
queries of the features' covariance under a_t. Greedy elimination as in :mod:`modegpt.decompositions.elimination`,
one unit of one or two features at a time, the heads of a group together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogitLadder:
    """Which units (rotary pairs, couples of single channels, or channels) go when, for every key-value head."""

    units: torch.Tensor
    """Channels of every unit: (G, n, s), s = 1 or 2."""
    order: torch.Tensor
    """(G, n - 1) units, the first to go first."""
    errors: torch.Tensor
    """J after the first 0, 1, ..., n - 1 of every group, summed over the heads: (n,) float64."""

    def kept(self, rank: int) -> torch.Tensor:
        """The ``rank`` units that stay longest, (G, rank) ascending."""
        groups, n, _ = self.units.shape
        mask = torch.ones(groups, n, dtype=torch.bool, device=self.order.device)
        mask.scatter_(1, self.order[:, : n - rank], False)
        return mask.nonzero()[:, 1].view(groups, rank)

    @classmethod
    def of(cls, units: torch.Tensor, order: list[torch.Tensor], costs: list[torch.Tensor]) -> LogitLadder:
        """From the unit (G,) of every step and what it cost, 0 before the first."""
        chosen = torch.stack(order, dim=1) if order else units.new_zeros(len(units), 0)
        return cls(units, chosen, torch.stack(costs).cumsum(0))


def logit_ladder(features: torch.Tensor, units: torch.Tensor, target: torch.Tensor, ridge: float) -> LogitLadder:
    """Drop the ``units`` (G, n, s) one by one, each time the cheapest of its group.

    ``features`` F (G, g, h, h) float64, one for each of the g query heads of a group; ``target`` c (h,). The cost of
    unit u is c'_u^T ([A_SS^-1]_uu)^-1 c'_u, summed over the heads, c' being re-fitted after every step.
    """
    groups, n, size = units.shape
    heads, h = features.shape[1], features.shape[-1]
    inverse = torch.linalg.inv(_regularised(features, ridge))
    now = target.expand(groups, heads, h).clone()
    group = torch.arange(groups, device=features.device)
    alive = torch.ones(groups, n, dtype=torch.bool, device=features.device)
    rows, columns = units[:, None, :, :, None], units[:, None, :, None, :]
    order, costs = [], [features.new_zeros(())]
    eye = torch.eye(size, dtype=features.dtype, device=features.device)
    for _ in range(n - 1):
        blocks = inverse[group[:, None, None, None, None], _heads(heads, inverse), rows, columns]  # (G, g, n, s, s)
        blocks = torch.where(alive[:, None, :, None, None], blocks, eye)
        parts = now.gather(-1, units.flatten(1)[:, None].expand(-1, heads, -1)).unflatten(-1, (n, size))
        scores = (parts * torch.linalg.solve(blocks, parts.unsqueeze(-1)).squeeze(-1)).sum((1, 3))  # (G, n)
        cost, unit = scores.masked_fill(~alive, torch.inf).min(1)
        gone = units[group, unit][:, None].expand(-1, heads, -1)  # (G, g, s)
        taken = inverse.gather(-2, gone.unsqueeze(-1).expand(*gone.shape, h))  # rows of the inverse: (G, g, s, h)
        block = taken.gather(-1, gone.unsqueeze(-2).expand(*gone.shape, size))
        step = torch.linalg.solve(block, taken)
        now = now - (step.mT @ now.gather(-1, gone).unsqueeze(-1)).squeeze(-1)
        inverse = inverse - taken.mT @ step
        now.scatter_(-1, gone, 0.0)
        alive[group, unit] = False
        order.append(unit)
        costs.append(cost.sum())
    return LogitLadder.of(units, order, costs)


def selection_ladder(features: torch.Tensor, units: torch.Tensor, target: torch.Tensor, ridge: float) -> LogitLadder:
    """As :func:`logit_ladder`, with c' = c at what is kept: for queries that cannot be turned.

    Dropping a set of units costs the sum of its block of H, H_uv = sum over heads of c_u^T A_uv c_v. So the next to go
    is the u of least H_uu + 2 sum of H_uv over what is gone.
    """
    groups, n, size = units.shape
    summed = (target[:, None] * _regularised(features, ridge) * target).sum(1)  # (G, h, h)
    channels = units.flatten(1)
    rows = summed.gather(1, channels.unsqueeze(-1).expand(-1, -1, summed.shape[-1]))
    square = rows.gather(2, channels.unsqueeze(1).expand(-1, n * size, -1))
    blocks = square.view(groups, n, size, n, size).sum((2, 4))  # H: (G, n, n)
    group = torch.arange(groups, device=features.device)
    alive = torch.ones(groups, n, dtype=torch.bool, device=features.device)
    scores = blocks.diagonal(dim1=1, dim2=2).clone()
    order, costs = [], [features.new_zeros(())]
    for _ in range(n - 1):
        cost, unit = scores.masked_fill(~alive, torch.inf).min(1)
        scores += 2 * blocks[group, unit]
        alive[group, unit] = False
        order.append(unit)
        costs.append(cost.sum())
    return LogitLadder.of(units, order, costs)


def _heads(heads: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(heads, device=like.device)[None, :, None, None, None]


def _regularised(features: torch.Tensor, ridge: float) -> torch.Tensor:
    """A: with the ridge, and positive definite where features are always zero."""
    diagonal = features.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    largest = mean.max()
    floor = 1e-9 * torch.where(mean > 0, mean, torch.where(largest > 0, largest, 1.0))  # a head can have no logits
    return features + torch.diag_embed(ridge * diagonal + floor)


def kept_coefficients(
    features: torch.Tensor,
    units: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
    ridge: float,
    *,
    turned: bool = True,
) -> tuple[torch.Tensor, float]:
    """The best c' (G, g, h) for the ``kept`` units (G, r), or c there where not ``turned``, and its J.

    The rest as for :func:`logit_ladder`.
    """
    groups, heads, h, _ = features.shape
    matrix = _regularised(features, ridge)
    channels = units.gather(1, kept[..., None].expand(-1, -1, units.shape[-1])).flatten(1)
    mask = torch.zeros(groups, 1, h, dtype=torch.bool, device=features.device)
    mask.scatter_(-1, channels[:, None], True)
    # Where nothing is kept, the identity: one system of full size for every head.
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    eye = torch.eye(h, dtype=features.dtype, device=features.device)
    inner = torch.where(both, matrix, eye)
    moment = torch.where(mask, (matrix @ target).expand(groups, heads, h), 0.0)
    fit = torch.linalg.solve(inner, moment.unsqueeze(-1)).squeeze(-1) if turned else (mask * target).expand_as(moment)
    change = target - fit
    return fit, float((change * (matrix @ change.unsqueeze(-1)).squeeze(-1)).sum())


def rotate(x: torch.Tensor, coefficients: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Queries x (..., h) with ``coefficients`` c' (..., h) put in; rotary pairs are (``first``, ``second``)."""
    result = x * coefficients
    one, two = coefficients[..., first], coefficients[..., second]
    result[..., first] = one * x[..., first] + two * x[..., second]
    result[..., second] = one * x[..., second] - two * x[..., first]
    return result
