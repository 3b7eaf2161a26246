"""The paper's method: Algorithms 1, 2 and 3."""

from __future__ import annotations

from ..decompositions import cr_decomposition, nystrom_decomposition, svd_decomposition
from ..statistics import LayerStatistics
from ..weights import MLPWeights, QueryKeyWeights, ValueOutputWeights
from .base import ChannelMethod, Ladder, Ridged, Solution


class ModeGPT(Ridged, ChannelMethod):
    """The paper's three decompositions."""

    name = "modegpt"
    summary = "the paper's algorithms: Nystroem for the MLP, CR for query-key, SVD for value-output"
    allocation = "block-influence"
    calibrated = "sequential"
    statistics = frozenset({"mlp", "attention_input", "query", "key"})

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """Algorithm 1."""

        def at(rank: int) -> Solution[MLPWeights]:
            result = nystrom_decomposition(statistics["mlp"], weights.output, rank, self.ridge, statistics.resolution)
            thin = weights.select(result.kept, result.output)
            return Solution(thin, result.error, result.norm, result.kept, spectrum=result.scores)

        return Ladder(len(weights.output), at)

    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics) -> Ladder[QueryKeyWeights]:
        """Algorithm 2, one selection per key-value head."""

        def at(rank: int) -> Solution[QueryKeyWeights]:
            result = cr_decomposition(
                statistics["query"], statistics["key"], rank, rotary=weights.rotary, neighbours=weights.neighbours
            )
            kept = weights.select(
                result.channels, statistics.squares("query_squares"), statistics.squares("key_squares")
            )
            return Solution(kept, result.error, result.norm, result.channels, result.pairs, spectrum=result.scores)

        return Ladder(weights.full_rank, at)

    def value_output(self, weights: ValueOutputWeights, statistics: LayerStatistics) -> Ladder[ValueOutputWeights]:
        """Algorithm 3, or appendix B.1 where several heads share one value head."""

        def at(rank: int) -> Solution[ValueOutputWeights]:
            result = svd_decomposition(
                statistics["attention_input"], weights.value, weights.output, rank, statistics.resolution
            )
            thin = ValueOutputWeights(value=result.value, output=result.output, output_bias=weights.output_bias)
            return Solution(thin, result.error, result.norm, spectrum=result.singular)

        return Ladder(weights.value.shape[-1], at)
