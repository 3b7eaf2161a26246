"""How much every layer keeps: from scores, profiles and budgets to ranks, by the allocation that is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .allocation import allocate, bounded_allocation
from .budget import (
    LayerGeometry,
    LayerRanks,
    Module,
    average_sparsity,
    ranks_from_sparsity,
    whole,
)
from .config import CompressionConfig
from .least_loss import largest_ratio, ranks_from_losses, total_loss
from .methods import METHODS, OwnAllocation
from .results import Choice, Profile
from .scores import outlier_shares
from .tied import tied_choice

if TYPE_CHECKING:
    from .engine import Engine

#: Block influence of a layer, of its attention and of its MLP.
Influence = Sequence[tuple[float, float, float]]


def choose_ranks(
    engine: Engine, config: CompressionConfig, influence: Influence | None = None, profile: Profile | None = None
) -> Choice:
    """The ranks that ``config`` asks for; what is given need not be measured. Layers that are not chosen stay whole."""
    method = METHODS[config.method].from_config(config)
    geometry = engine.geometry(method)
    method.check(engine.dense.model, geometry, config, config.ratio or 0.0)
    if config.allocation == "own":
        assert isinstance(method, OwnAllocation)
        assert config.ratio is not None
        return method.choose(engine, config, config.ratio)
    if config.profile != "full":
        return tied_choice(engine, geometry, config, profile or engine.profile(config))
    if config.allocation == "sensitivity":
        return _by_sensitivity(geometry, config, profile or engine.profile(config))
    share = average(config, geometry)
    if config.allocation == "uniform":
        chosen = _chosen(config, geometry)
        return _from_sparsity(geometry, config, [dict.fromkeys(config.modules, share) for _ in chosen])
    if config.allocation == "owl":
        outliers = engine.once("outliers", lambda: outlier_shares(engine, config.owl_threshold))
        return _by_outliers(geometry, config, share, outliers)
    return _by_influence(geometry, config, share, influence or engine.block_influence())


def average(config: CompressionConfig, geometry: Sequence[LayerGeometry]) -> float:
    """The share that the chosen modules of the chosen layers lose, see :func:`average_sparsity`, which may refuse."""
    assert config.ratio is not None
    chosen, base = _chosen(config, geometry), config.base(geometry)
    return average_sparsity(chosen, config.modules, config.ratio, config.alignment, base)


def _by_sensitivity(geometry: Sequence[LayerGeometry], config: CompressionConfig, profile: Profile) -> Choice:
    layers, base, ratio = _chosen(config, geometry), config.base(geometry), config.ratio
    everywhere, interplay = profile.losses(), profile.interplay()
    losses = [everywhere[index] for index in config.chosen_layers(len(geometry))]
    if ratio is None:
        assert config.max_perplexity_increase is not None
        limit = math.log1p(config.max_perplexity_increase)
        ratio = largest_ratio(layers, losses, limit, config.alignment, base, interplay)
    ranks = ranks_from_losses(layers, losses, ratio, config.alignment, base, interplay)
    removed = [
        {module: 1 - rank[module] / layer.modules[module].full for module in config.modules}
        for layer, rank in zip(layers, ranks, strict=True)
    ]
    choice = _everywhere(geometry, config, ranks, removed)
    divergence = profile.divergence(choice.ranks)
    return replace(choice, divergence=divergence, loss=total_loss(divergence, interplay), ratio=ratio)


def _by_outliers(
    geometry: Sequence[LayerGeometry], config: CompressionConfig, share: float, outliers: Sequence[float]
) -> Choice:
    chosen = config.chosen_layers(len(geometry))
    weights = _parameters(_chosen(config, geometry), [config.modules])
    shares = bounded_allocation([outliers[index] for index in chosen], weights, share, config.owl_reach)
    choice = _from_sparsity(geometry, config, [dict.fromkeys(config.modules, one) for one in shares])
    return replace(choice, scores=[[one] for one in outliers])


def _by_influence(
    geometry: Sequence[LayerGeometry], config: CompressionConfig, share: float, influence: Influence
) -> Choice:
    # Which of a layer's three scores speaks for which modules.
    split = config.allocation == "block-influence-split"
    slots = [(2 if module == "mlp" else 1) if split else 0 for module in config.modules]
    parts = [
        (slot, [module for module, own in zip(config.modules, slots, strict=True) if own == slot])
        for slot in sorted(set(slots))
    ]
    scores = [[row[slot] for slot, _ in parts] for row in influence]
    speaking = [score for index in config.chosen_layers(len(geometry)) for score in scores[index]]
    chosen = _chosen(config, geometry)
    temperature = None if config.temperature == "auto" else config.temperature
    shares, temperature = allocate(speaking, _parameters(chosen, [part for _, part in parts]), share, temperature)
    remaining = iter(shares)
    sparsity = [
        {module: one for (_, part), one in zip(parts, remaining, strict=False) for module in part} for _ in chosen
    ]
    return replace(_from_sparsity(geometry, config, sparsity), scores=scores, temperature=temperature)


def _from_sparsity(
    geometry: Sequence[LayerGeometry], config: CompressionConfig, sparsity: Sequence[Mapping[Module, float]]
) -> Choice:
    """The choice by what the modules of the chosen layers lose."""
    return _everywhere(
        geometry, config, ranks_from_sparsity(_chosen(config, geometry), sparsity, config.alignment), sparsity
    )


def _everywhere(
    geometry: Sequence[LayerGeometry],
    config: CompressionConfig,
    ranks: Sequence[LayerRanks],
    sparsity: Sequence[Mapping[Module, float]],
) -> Choice:
    """The choice for all layers, from that for the chosen ones."""
    every = [whole(layer) for layer in geometry]
    removed: list[dict[Module, float]] = [{} for _ in geometry]
    for index, rank, lost in zip(config.chosen_layers(len(geometry)), ranks, sparsity, strict=True):
        every[index], removed[index] = rank, dict(lost)
    return Choice(every, removed)


def _chosen(config: CompressionConfig, geometry: Sequence[LayerGeometry]) -> list[LayerGeometry]:
    return [geometry[index] for index in config.chosen_layers(len(geometry))]


def _parameters(layers: Sequence[LayerGeometry], parts: Sequence[Sequence[Module]]) -> list[int]:
    """The parameters of every layer's ``parts``, layer by layer."""
    return [sum(layer.modules[module].parameters for module in part) for layer in layers for part in parts]
