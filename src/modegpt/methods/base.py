"""What a compression method is: one solver per module type, given the weights, their statistics and a rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch

from ..statistics import LayerStatistics
from ..weights import MLPWeights, QueryKeyWeights, ValueOutputWeights

if TYPE_CHECKING:
    from ..config import CompressionConfig

Weights = TypeVar("Weights", MLPWeights, QueryKeyWeights, ValueOutputWeights)


@dataclass(frozen=True)
class Solution(Generic[Weights]):
    """One compressed module with the exact error of its compression on the calibration tokens."""

    weights: Weights
    error: float
    """Squared Frobenius norm of the change of the module's output, in the method's own objective."""
    norm: float
    """Squared Frobenius norm of the dense module's output, for attention summed over its heads."""
    kept: torch.Tensor | None = None
    """Kept channels, (m',) or of every group (G, d_qk), where the method selects; None where it mixes."""
    pairs: torch.Tensor | None = None
    """Their rotary pairs (G, r), see :func:`modegpt.decompositions.couples`; None without rotary embedding."""

    @property
    def relative_error(self) -> float:
        """||Y - Y'||_F / ||Y||_F, zero for a module whose output is zero."""
        return (self.error / self.norm) ** 0.5 if self.norm > 0 else 0.0


class Method(ABC):
    """A compression method: three solvers, one per module type. Subclasses are registered by name."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_config(cls, config: CompressionConfig) -> Method:
        """The method with those of the run's options that concern it."""

    @abstractmethod
    def mlp(self, weights: MLPWeights, statistics: LayerStatistics, rank: int) -> Solution[MLPWeights]:
        """Keep ``rank`` intermediate channels."""

    @abstractmethod
    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics, rank: int) -> Solution[QueryKeyWeights]:
        """Keep ``rank`` rotary pairs per key-value head."""

    @abstractmethod
    def value_output(
        self, weights: ValueOutputWeights, statistics: LayerStatistics, rank: int
    ) -> Solution[ValueOutputWeights]:
        """Make values ``rank`` wide in every head."""
