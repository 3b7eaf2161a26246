"""MoDeGPT as published: Algorithm 1 (Nystroem), Algorithm 2 (CR) and Algorithm 3 (SVD) with appendix B.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
        result = cr_decomposition(statistics.query, statistics.key, rank)
        pairs = result.kept  # (G, r)
        channels = torch.cat((pairs, pairs + weights.key.shape[-1] // 2), dim=-1)  # (G, 2r)

        def select(tensor: torch.Tensor) -> torch.Tensor:
            index = channels.view(-1, *[1] * (tensor.dim() - 2), channels.shape[-1])
            return tensor.gather(-1, index.expand(*tensor.shape[:-1], -1))

        return Solution(
            QueryKeyWeights(
                query=select(weights.query),
                key=select(weights.key),
                query_bias=None if weights.query_bias is None else select(weights.query_bias),
                key_bias=None if weights.key_bias is None else select(weights.key_bias),
            ),
            result.error,
            result.norm,
            pairs,
        )

    def value_output(
        self, weights: ValueOutputWeights, statistics: LayerStatistics, rank: int
    ) -> Solution[ValueOutputWeights]:
        """Algorithm 3, or appendix B.1 where several heads share one value head."""
        value_bias, output_bias = _fold_value_bias(weights, rank)
        result = svd_decomposition(
            statistics.attention_input, weights.value, weights.output, rank, statistics.resolution
        )
        return Solution(
            ValueOutputWeights(
                value=result.value, output=result.output, value_bias=value_bias, output_bias=output_bias
            ),
            result.error,
            result.norm,
        )


def _fold_value_bias(weights: ValueOutputWeights, rank: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Move the value bias into the output bias, where no truncation can reach it.

    A head's attention weights sum to one, so its value bias adds b_v W_o to the output whatever they are.
    """
    if weights.value_bias is None:
        return None, weights.output_bias
    if weights.output_bias is None:
        raise ValueError("a value bias without an output bias has nowhere to go")
    carried = torch.einsum("gh,gnhd->d", weights.value_bias, weights.output)
    return weights.value_bias.new_zeros(weights.value.shape[0], rank), weights.output_bias + carried
