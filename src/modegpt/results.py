"""What a compression decided and found, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .budget import LayerRanks, Module


@dataclass(frozen=True)
class ModuleResult:
    """What happened to one module: ``rank`` of ``full`` units, relative output error, kept indices (None if mixed)."""

    rank: int
    full: int
    relative_error: float
    kept: list[int] | list[list[int]] | None


@dataclass(frozen=True)
class LayerResult:
    """What happened to one decoder layer."""

    sparsity: Mapping[Module, float]
    modules: Mapping[Module, ModuleResult]


@dataclass(frozen=True)
class Choice:
    """How much every layer keeps, and why."""

    ranks: list[LayerRanks]
    sparsity: list[dict[Module, float]]
    scores: list[list[float]] | None = None
    """Block-influence scores per layer (one, or attention and MLP), where the allocation used them."""
    temperature: float | None = None
