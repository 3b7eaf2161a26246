"""How much every layer keeps: from a run's options, and from scores or sensitivities where these ask for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .allocation import allocate, bounded_allocation
from .budget import (
    LayerGeometry,
    LayerRanks,
    Module,
    average_sparsity,
    largest_ratio,
    ranks_from_losses,
    ranks_from_sparsity,
    whole,
)
from .config import CompressionConfig
from .results import Choice, Profile


def average(config: CompressionConfig, geometry: Sequence[LayerGeometry]) -> float:
    """The share that the chosen modules of the chosen layers lose, see :func:`average_sparsity`, which may refuse."""
    assert config.ratio is not None
    chosen, base = _chosen(config, geometry), config.base(geometry)
    return average_sparsity(chosen, config.modules, config.ratio, config.align, base)


def choose(
    config: CompressionConfig,
    geometry: Sequence[LayerGeometry],
    *,
    influence: Sequence[tuple[float, float, float]] | None = None,
    profile: Profile | None = None,
    outliers: Sequence[float] | None = None,
) -> Choice:
    """The ranks of all layers of this ``geometry``; those that are not chosen stay whole.

    The block-influence allocations need the ``influence`` of every layer, that by sensitivity the ``profile``, and
    OWL's the share of ``outliers`` of every layer.
    """
    layers = _chosen(config, geometry)
    if config.allocation == "sensitivity":
        assert profile is not None
        known = [profile.layers[index] for index in config.chosen_layers(len(geometry))]
        losses = [{module: one.losses() for module, one in layer.items()} for layer in known]
        ratio, base = config.ratio, config.base(geometry)
        if ratio is None:
            assert config.max_perplexity_increase is not None
            ratio = largest_ratio(layers, losses, math.log1p(config.max_perplexity_increase), config.align, base)
        ranks = ranks_from_losses(layers, losses, ratio, config.align, base)
        removed = [
            {module: 1 - rank[module] / layer.modules[module].full for module in config.modules}
            for layer, rank in zip(layers, ranks, strict=True)
        ]
        choice = _everywhere(config, geometry, ranks, removed)
        divergence = profile.divergence(choice.ranks)
        return Choice(choice.ranks, choice.sparsity, divergence=divergence, ratio=ratio)
    share = average(config, geometry)
    if config.allocation == "uniform":
        uniform = [dict.fromkeys(config.modules, share) for _ in layers]
        return _everywhere(config, geometry, ranks_from_sparsity(layers, uniform, config.align), uniform)

    chosen = config.chosen_layers(len(geometry))
    if config.allocation == "owl":
        assert outliers is not None
        weights = [sum(layer.modules[module].parameters for module in config.modules) for layer in layers]
        shares = bounded_allocation([outliers[index] for index in chosen], weights, share, config.owl_reach)
        by_layer = [dict.fromkeys(config.modules, one) for one in shares]
        choice = _everywhere(config, geometry, ranks_from_sparsity(layers, by_layer, config.align), by_layer)
        return Choice(choice.ranks, choice.sparsity, [[one] for one in outliers])

    assert influence is not None
    # Which of a layer's three scores speaks for which modules.
    split = config.allocation == "block-influence-split"
    slots = [(2 if module == "mlp" else 1) if split else 0 for module in config.modules]
    parts = [
        (slot, [module for module, own in zip(config.modules, slots, strict=True) if own == slot])
        for slot in sorted(set(slots))
    ]
    scores = [[row[slot] for slot, _ in parts] for row in influence]
    speaking = [score for index in chosen for score in scores[index]]
    weights = [sum(layer.modules[module].parameters for module in part) for layer in layers for _, part in parts]

    temperature = None if config.temperature == "auto" else config.temperature
    shares, temperature = allocate(speaking, weights, share, temperature)
    remaining = iter(shares)
    sparsity = [
        {module: share for (_, part), share in zip(parts, remaining, strict=False) for module in part} for _ in layers
    ]
    choice = _everywhere(config, geometry, ranks_from_sparsity(layers, sparsity, config.align), sparsity)
    return Choice(choice.ranks, choice.sparsity, scores, temperature)


def _chosen(config: CompressionConfig, geometry: Sequence[LayerGeometry]) -> list[LayerGeometry]:
    return [geometry[index] for index in config.chosen_layers(len(geometry))]


def _everywhere(
    config: CompressionConfig,
    geometry: Sequence[LayerGeometry],
    ranks: Sequence[LayerRanks],
    sparsity: Sequence[Mapping[Module, float]],
) -> Choice:
    """The choice for all layers, from that for the chosen ones."""
    every = [whole(layer) for layer in geometry]
    removed: list[dict[Module, float]] = [{} for _ in geometry]
    for index, rank, lost in zip(config.chosen_layers(len(geometry)), ranks, sparsity, strict=True):
        every[index], removed[index] = rank, dict(lost)
    return Choice(every, removed)
