"""What a compression decided and found, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .budget import LayerRanks, Module


@dataclass(frozen=True)
class ModuleResult:
    """What happened to one module: ``rank`` of ``full`` units, and its relative output error."""

    rank: int
    full: int
    relative_error: float
    kept: list[int] | list[list[int]] | None
    """Kept channels: of the MLP, of each expert, or of the queries and keys of each key-value head; None if mixed."""
    expert_tokens: list[int] | None = None
    """Tokens that calibrated each expert, where there are experts."""

    @property
    def experts_short_of_tokens(self) -> list[int]:
        """The experts that saw fewer tokens than they have channels, so that statistics alone could not decide."""
        return [expert for expert, tokens in enumerate(self.expert_tokens or ()) if tokens < self.full]


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
