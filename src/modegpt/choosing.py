"""How much every layer keeps: from scores, profiles and budgets to ranks, by the allocation that is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .allocation import allocate, bounded_allocation
from .budget import (
    LayerGeometry,
    Module,
    average_sparsity,
    largest_ratio,
    ranks_from_losses,
    ranks_from_sparsity,
)
from .config import CompressionConfig
from .methods import METHODS
from .results import Choice, Profile
from .scores import outlier_shares

if TYPE_CHECKING:
    from .engine import Engine

#: Block influence of a layer, of its attention and of its MLP.
Influence = Sequence[tuple[float, float, float]]


def choose_ranks(
    engine: Engine, config: CompressionConfig, influence: Influence | None = None, profile: Profile | None = None
) -> Choice:
    """The ranks that ``config`` asks for; what is given need not be measured."""
    method = METHODS[config.method].from_config(config)
    geometry = engine.geometry(method)
    method.check(engine.dense.model, geometry, config, config.ratio or 0.0)
    if config.allocation == "sensitivity":
        return _by_sensitivity(geometry, config, profile or engine.profile(config))
    assert config.ratio is not None
    if config.allocation == "own":
        return method.choose(engine, config, config.ratio)
    average = average_sparsity(geometry, config.modules, config.ratio, config.align)
    if config.allocation == "uniform":
        uniform = [dict.fromkeys(config.modules, average) for _ in geometry]
        return Choice(ranks_from_sparsity(geometry, uniform, config.align), uniform)
    if config.allocation == "owl":
        outliers = engine.once("outliers", lambda: outlier_shares(engine, config.owl_threshold))
        return _by_outliers(geometry, config, average, outliers)
    return _by_influence(geometry, config, average, influence or engine.block_influence())


def _by_sensitivity(geometry: Sequence[LayerGeometry], config: CompressionConfig, profile: Profile) -> Choice:
    losses = [{module: one.losses() for module, one in layer.items()} for layer in profile.layers]
    ratio = config.ratio
    if ratio is None:
        assert config.max_perplexity_increase is not None
        ratio = largest_ratio(geometry, losses, math.log1p(config.max_perplexity_increase), config.align)
    ranks = ranks_from_losses(geometry, losses, ratio, config.align)
    removed = [
        {module: 1 - rank[module] / layer.modules[module].full for module in config.modules}
        for layer, rank in zip(geometry, ranks, strict=True)
    ]
    return Choice(ranks, removed, divergence=profile.divergence(ranks), ratio=ratio)


def _by_outliers(
    geometry: Sequence[LayerGeometry], config: CompressionConfig, average: float, outliers: Sequence[float]
) -> Choice:
    weights = _parameters(geometry, [config.modules])
    shares = bounded_allocation(outliers, weights, average, config.owl_reach)
    sparsity = [dict.fromkeys(config.modules, share) for share in shares]
    ranks = ranks_from_sparsity(geometry, sparsity, config.align)
    return Choice(ranks, sparsity, [[share] for share in outliers])


def _by_influence(
    geometry: Sequence[LayerGeometry], config: CompressionConfig, average: float, influence: Influence
) -> Choice:
    # Which of a layer's three scores speaks for which modules.
    split = config.allocation == "block-influence-split"
    slots = [(2 if module == "mlp" else 1) if split else 0 for module in config.modules]
    chosen = [
        (slot, [module for module, own in zip(config.modules, slots, strict=True) if own == slot])
        for slot in sorted(set(slots))
    ]
    scores = [[row[slot] for slot, _ in chosen] for row in influence]
    weights = _parameters(geometry, [part for _, part in chosen])
    temperature = None if config.temperature == "auto" else config.temperature
    shares, temperature = allocate([score for row in scores for score in row], weights, average, temperature)
    remaining = iter(shares)
    sparsity = [
        {module: share for (_, part), share in zip(chosen, remaining, strict=False) for module in part}
        for _ in geometry
    ]
    return Choice(ranks_from_sparsity(geometry, sparsity, config.align), sparsity, scores, temperature)


def _parameters(geometry: Sequence[LayerGeometry], parts: Sequence[Sequence[Module]]) -> list[int]:
    """The parameters of every layer's ``parts``, layer by layer."""
    return [sum(layer.modules[module].parameters for module in part) for layer in geometry for part in parts]
