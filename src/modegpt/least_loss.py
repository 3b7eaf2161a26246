"""The ranks of least total loss for a budget in parameters, from what every module loses at each of its ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch

from .budget import Base, LayerGeometry, LayerRanks, Module, ModuleGeometry, average_sparsity, from_finest, ranks_of
from .errors import InvalidRequest

#: Modules whose losses add up to more than their sum.
Part = Literal["attention", "mlp"]
Losses = Sequence[Mapping[Module, torch.Tensor]]
"""Per layer and module that may be compressed, what is lost at ranks 0, 1, ..., full by this module alone."""
Interplay = Mapping[Part, float]
"""c of every part, see :func:`total_loss`; 0 where not given."""
_Step = tuple[float, int, Module, int]
"""Loss per parameter, layer, module, and its rank afterwards."""
#: Rounds in which the weights of the parts settle; each moves half of the way, in logarithms.
_ROUNDS = 11


def part_of(module: Module) -> Part:
    """The part of a layer that ``module`` belongs to."""
    return "mlp" if module == "mlp" else "attention"


def by_part(losses: Sequence[Mapping[Module, float]]) -> dict[Part, float]:
    """S: the losses of all layers' modules, summed over each part."""
    sums: dict[Part, float] = {}
    for layer in losses:
        for module, loss in layer.items():
            sums[part_of(module)] = sums.get(part_of(module), 0.0) + loss
    return sums


def total_loss(losses: Sequence[Mapping[Module, float]], interplay: Interplay) -> float:
    """The sum over parts of S + c S^2, S the sum of the losses of the part's modules in all layers."""
    return sum(own + interplay.get(part, 0.0) * own**2 for part, own in by_part(losses).items())


def ranks_from_losses(
    layers: Sequence[LayerGeometry],
    losses: Losses,
    ratio: float,
    align: int,
    base: Base | None = None,
    interplay: Interplay | None = None,
) -> list[LayerRanks]:
    """The ranks of least :func:`total_loss` that remove ``ratio`` of ``base``, see :func:`average_sparsity`.

    Where the total is the plain sum, modules go down the lower convex hulls of their losses over parameters, always
    the one that loses least per parameter next: the optimum among the hulls' corners for the budgets that are met at a
    corner (Lagrange), and what is left of a budget is met within the last segment, then by the finest modules, those
    that are whole last. Otherwise a part's losses count 1 + 2 c S times, the derivative of its total, at the S that
    follows from it. Of the ranks on the way there the best are taken, so the total is never above that of the plain
    sum's. Raises :class:`InvalidRequest` as :func:`average_sparsity` does.
    """
    interplay = {part: c for part, c in (interplay or {}).items() if c > 0}
    steps = _steps(layers, losses, align)
    weights: dict[Part, float] = {}

    def descend() -> list[LayerRanks]:
        return _down(layers, list(losses[0]), sorted(steps, key=weighted), ratio, align, base)

    def weighted(step: _Step) -> tuple[float, _Step]:
        return step[0] * weights.get(part_of(step[2]), 1.0), step

    best = descend()
    lost = losses_at(losses, best)
    least = total_loss(lost, interplay)
    for _ in range(_ROUNDS if interplay else 0):
        for part, own in by_part(lost).items():
            wanted = 1 + 2 * interplay.get(part, 0.0) * own
            weights[part] = math.sqrt(weights.get(part, 1.0) * wanted)
        found = descend()
        lost = losses_at(losses, found)
        if (total := total_loss(lost, interplay)) < least:
            best, least = found, total
    return best


def losses_at(losses: Losses, ranks: Sequence[LayerRanks]) -> list[dict[Module, float]]:
    """What every module loses at these ``ranks``."""
    return [
        {module: float(loss[rank[module]]) for module, loss in layer.items()}
        for layer, rank in zip(losses, ranks, strict=True)
    ]


def largest_ratio(
    layers: Sequence[LayerGeometry],
    losses: Losses,
    limit: float,
    align: int,
    base: Base | None = None,
    interplay: Interplay | None = None,
) -> float:
    """The largest ratio, in thousandths, whose ranks by :func:`ranks_from_losses` lose no more than ``limit`` in all.

    Raises :class:`InvalidRequest` where even a thousandth loses more, or is more than can be removed.
    """

    def lost(thousandths: int) -> float:
        try:
            ranks = ranks_from_losses(layers, losses, thousandths / 1000, align, base, interplay)
        except InvalidRequest:  # out of reach
            return math.inf
        return total_loss(losses_at(losses, ranks), interplay or {})

    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lost(middle) <= limit else (low, middle)
    if low == 0:
        ranks_from_losses(layers, losses, 1 / 1000, align, base, interplay)  # refuses what is out of reach
        raise InvalidRequest(
            f"--max-perplexity-increase {math.expm1(limit):.3g}: removing a thousandth is predicted to cost "
            f"{math.expm1(min(lost(1), 700.0)):.3g} already; allow more"
        )
    return low / 1000


def _steps(layers: Sequence[LayerGeometry], losses: Losses, align: int) -> list[_Step]:
    """What can go next from every module, on its way down the hull."""
    return [
        (slope, index, module, rank)
        for index, (layer, own) in enumerate(zip(layers, losses, strict=True))
        for module, curve in own.items()
        for slope, rank in _descent(layer.modules[module], curve, align)
    ]


def _down(
    layers: Sequence[LayerGeometry],
    modules: Sequence[Module],
    steps: Sequence[_Step],
    ratio: float,
    align: int,
    base: Base | None,
) -> list[LayerRanks]:
    """The ranks after as many of the ``steps``, in their order, as the budget asks for."""
    base = base or Base.blocks(layers)
    average_sparsity(layers, modules, ratio, align, base)  # refuses what is out of reach
    wanted = ratio * base.parameters + base.extra
    kept: list[dict[Module, int]] = [
        {module: shape.full for module, shape in layer.modules.items()} for layer in layers
    ]
    for _, index, module, rank in steps:
        shape, before = layers[index].modules[module], kept[index][module]
        last = shape.parameters_at(before) - shape.parameters_at(rank) >= wanted
        if last:
            rank = shape.nearest(before - wanted / shape.unit_parameters, align)
        wanted -= shape.parameters_at(before) - shape.parameters_at(rank)
        kept[index][module] = rank
        if last:
            break
    for places in _takers(layers, modules, kept, align):  # less than half a step of the last module is left
        for limited, (index, module) in itertools.product((True, False), places):
            shape, before = layers[index].modules[module], kept[index][module]
            rank = shape.taking(before, wanted, align, limited=limited)
            wanted -= shape.parameters_at(before) - shape.parameters_at(rank)
            kept[index][module] = rank
    return [ranks_of(ranks) for ranks in kept]


def _takers(
    layers: Sequence[LayerGeometry], modules: Sequence[Module], kept: Sequence[Mapping[Module, int]], align: int
) -> tuple[list[tuple[int, Module]], list[tuple[int, Module]]]:
    """What takes up the rest of a budget, every layer's modules from the finest; and what is whole, if that must."""
    every = [(index, module) for index, layer in enumerate(layers) for module in from_finest(layer, modules, align)]
    cut = [(index, module) for index, module in every if kept[index][module] < layers[index].modules[module].full]
    return cut, [place for place in every if place not in cut]


def _descent(shape: ModuleGeometry, losses: torch.Tensor, align: int) -> list[tuple[float, int]]:
    """The corners of the lower convex hull of the losses at allowed ranks, from full down: slope before it, and rank.

    The slope is the loss per removed parameter.
    """
    step, values = shape.step(align), losses.tolist()
    allowed = [shape.full, *range((shape.full - 1) // step * step, 0, -step)]
    corners: list[tuple[int, float]] = []
    for rank in allowed:
        loss = values[rank]
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], (rank, loss)):
            corners.pop()
        corners.append((rank, loss))
    return [(_slope(before, after) / shape.unit_parameters, after[0]) for before, after in pairwise(corners)]


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (before[0] - after[0])
