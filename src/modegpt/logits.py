"""The attention a head pays, and how its logits depend on single channels: what Type II is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .layout import HeadShape, rotary_pairs

#: Queries of every window whose attention is looked at, evenly spread.
QUERIES = 128
#: Keys that stand for all that a query attends to: the quantiles of its attention, evenly spread.
KEYS = 64


@dataclass(frozen=True)
class Attended:
    """One head's attention from some queries of one window."""

    head: int
    weights: torch.Tensor
    """a_t, for every query: (P, S), rows sum to 1. Where there are more than ``KEYS`` keys, each of ``KEYS`` that are
    drawn by a_t has the same weight."""
    slope: torch.Tensor
    """How much of a change of the score gets through to the softmax: (P, S), 1 without a soft cap."""
    query: torch.Tensor
    """(P, h), scaled as the scores are."""
    key: torch.Tensor
    """(S, h), or for every query its own (P, S, h)."""


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    real: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    count: int = QUERIES,
) -> Iterator[tuple[float, Attended]]:
    """Every head of every window with how many queries each one that is looked at stands for.

    ``query`` (B, H, T, h) and ``key`` (B, G, S, h) after the rotary embedding; ``mask`` as attention functions get it:
    (B or 1, 1, T, S), boolean or added to the scores, None for causal attention. ``real`` (B, T) are the tokens that
    count, all where None.
    """
    windows, heads, length, _ = query.shape
    per_group = heads // key.shape[1]
    for window in range(windows):
        places = torch.arange(length, device=query.device)
        if real is not None:
            places = places[real[window].to(places.device)]
        if not len(places):
            continue
        stands_for = max(1.0, len(places) / count)
        chosen = places[((torch.arange(min(count, len(places)), device=places.device) + 1) * stands_for).long() - 1]
        seen = _rows(mask, window, chosen, key.shape[2])
        for head in range(heads):
            rows = _wide(query[window, head, chosen]) * scaling
            columns = _wide(key[window, head // per_group])
            scores = rows @ columns.T
            slope = torch.ones_like(scores)
            if softcap is not None:
                bounded = torch.tanh(scores / softcap)
                scores, slope = softcap * bounded, 1 - bounded.square()
            yield stands_for, _drawn(Attended(head, (scores + seen).softmax(-1), slope, rows, columns))


def _drawn(attention: Attended) -> Attended:
    """The keys at evenly spread quantiles of each query's attention in place of all keys, where there are many."""
    weights = attention.weights
    if weights.shape[1] <= KEYS:
        return attention
    shares = weights.cumsum(-1)
    places = (torch.arange(KEYS, device=weights.device) + 0.5) / KEYS * shares[:, -1:]
    chosen = torch.searchsorted(shares, places).clamp_max(weights.shape[1] - 1)  # (P, KEYS)
    return replace(
        attention,
        weights=torch.full_like(places, 1 / KEYS),
        slope=attention.slope.gather(1, chosen),
        key=attention.key[chosen],
    )


def _rows(mask: torch.Tensor | None, window: int, chosen: torch.Tensor, keys: int) -> torch.Tensor:
    """What is added to the scores of the ``chosen`` queries: (P, S) float32."""
    if mask is None:
        allowed = torch.arange(keys, device=chosen.device) <= chosen[:, None]
    else:
        own = mask[min(window, len(mask) - 1), 0, chosen]
        if own.dtype != torch.bool:
            return own.float()
        allowed = own
    return torch.zeros(allowed.shape, device=chosen.device).masked_fill(~allowed, -torch.inf)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def logit_features(attention: Attended, shape: HeadShape) -> torch.Tensor:
    """sqrt(a) (phi - E_a[phi]), (P S, h): its Gram matrix is the covariance of the features summed over the queries.

    phi as in :mod:`modegpt.decompositions.logits`, at the place of each channel.
    """
    query, key = attention.query[:, None], attention.key
    features = query * key
    first, second = rotary_pairs(shape.rotary, shape.neighbours, query.device)
    if len(first):
        one, two = query[..., first], query[..., second]
        features[..., first] = one * key[..., first] + two * key[..., second]
        features[..., second] = two * key[..., first] - one * key[..., second]
    features *= attention.slope[..., None]
    weights = attention.weights[..., None]
    features -= (weights * features).sum(1, keepdim=True)
    return (features * weights.sqrt()).flatten(0, 1)
