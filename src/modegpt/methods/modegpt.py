"""MoDeGPT as published: Algorithm 1 (Nystroem), Algorithm 2 (CR) and Algorithm 3 (SVD) with appendix B.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..decompositions import cr_decomposition, nystrom_decomposition, svd_decomposition
from ..statistics import LayerStatistics
from ..weights import MLPWeights, QueryKeyWeights, ValueOutputWeights
from .base import Method, Solution

if TYPE_CHECKING:
    from ..config import CompressionConfig


class ModeGPT(Method):
    """The paper's three decompositions. ``ridge`` is lambda in units of the mean activation energy."""

    name = "modegpt"
    summary = "the paper's algorithms: Nystroem for the MLP, CR for query-key, SVD for value-output"

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    @classmethod
    def from_config(cls, config: CompressionConfig) -> ModeGPT:
        """With the ridge that ``config`` gives."""
        return cls(config.ridge)

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics, rank: int) -> Solution[MLPWeights]:
        """Algorithm 1."""
        result = nystrom_decomposition(statistics.mlp, weights.output, rank, self.ridge, statistics.resolution)
        kept = result.kept
        return Solution(
            MLPWeights(
                inputs=tuple(weight[:, kept] for weight in weights.inputs),
                input_biases=tuple(None if bias is None else bias[kept] for bias in weights.input_biases),
                output=result.output,
            ),
            result.error,
            result.norm,
            kept,
        )

    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics, rank: int) -> Solution[QueryKeyWeights]:
        """Algorithm 2, one selection per key-value head."""
        result = cr_decomposition(
            statistics.query, statistics.key, rank, rotary=weights.rotary, neighbours=weights.neighbours
        )
        kept = weights.select(result.channels, statistics.query_squares, statistics.key_squares)
        return Solution(kept, result.error, result.norm, result.channels, result.pairs)

    def value_output(
        self, weights: ValueOutputWeights, statistics: LayerStatistics, rank: int
    ) -> Solution[ValueOutputWeights]:
        """Algorithm 3, or appendix B.1 where several heads share one value head."""
        result = svd_decomposition(
            statistics.attention_input, weights.value, weights.output, rank, statistics.resolution
        )
        return Solution(
            ValueOutputWeights(value=result.value, output=result.output, output_bias=weights.output_bias),
            result.error,
            result.norm,
        )
