"""What fluctuates least about its mean goes, and a bias takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import costs
from ..budget import LayerGeometry, Module, biased_head_geometry
from ..decompositions import (
    fluctuation,
    mean_contribution,
    selection_losses,
    top_indices,
    unit_channels,
)
from ..errors import InvalidRequest
from ..families import decoder_layers, family_of
from ..modeling import Family, has_experts
from ..results import Choice
from ..statistics import LayerStatistics
from ..weights import HeadWeights, MLPWeights
from .al_am import al_am
from .base import SHARED_ALLOCATIONS, HeadMethod, Ladder, OwnAllocation, Solution

if TYPE_CHECKING:
    from ..config import CompressionConfig
    from ..engine import Engine


class FLAP(HeadMethod, OwnAllocation):
    """MLP channels and heads of smallest WIFV_j = Var(x_j) ||W_j||^2 go, and their means join the biases.

    An et al., arXiv 2312.11983: the metric (:func:`modegpt.decompositions.fluctuation`), summed over the channels of a
    head; the bias compensation; and AL-AM, the method's ``own`` allocation, which standardises the scores of every
    layer and module type, compares all of them, and takes the lowest until enough parameters are gone. As in the
    authors' code, channels of heads are standardised one by one and then averaged over the head.

    Ours: a head is a key-value head with all its query heads, means and variances are those of all real tokens, the
    best unit of every module stays, and with another allocation the metric ranks within each module. The error is the
    sum of the metric over what goes, which leaves out that channels vary together. Every attention and every MLP has a
    bias at its output, zero where nothing goes. Experts, whose outputs are weighted token by token, have no such bias.
    """

    name = "flap"
    summary = "MLP channels and whole heads that vary least go, and a bias takes their mean's place"
    allocation = "own"
    allocations = (*SHARED_ALLOCATIONS, "own")
    statistics = frozenset({"mlp_moments", "head_outputs_moments"})

    def geometry(self, layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
        """Channels and heads, and two more biases where there are none."""
        return biased_head_geometry(layer, config, family)

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """The maps."""
        return costs.selection_bytes(sizes)

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """Norms and means over an output map."""
        return 4.0 * sizes.hidden * (sizes.intermediate if module == "mlp" else sizes.heads * sizes.head)

    def check(
        self, model: PreTrainedModel, geometry: Sequence[LayerGeometry], config: CompressionConfig, ratio: float
    ) -> None:
        """Refuse experts as well."""
        family = family_of(model)
        if any(has_experts(layer, family.description) for layer in decoder_layers(model, family)):
            raise InvalidRequest("--method flap: MODEL has experts, which have no bias to make up for what goes")
        super().check(model, geometry, config, ratio)

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """A unit is one channel."""
        units = _Units(statistics["mlp_moments"], statistics.tokens, weights.output, 1)

        def at(rank: int) -> Solution[MLPWeights]:
            kept, bias = units.at(rank, weights.output_bias)
            thin = replace(weights.select(kept, weights.output[kept]), output_bias=bias)
            return Solution(thin, float(units.losses[rank]), float(units.losses[0]), kept)

        return Ladder(len(weights.output), at, units.losses)

    def heads(self, weights: HeadWeights, statistics: LayerStatistics) -> Ladder[HeadWeights]:
        """A unit is a key-value head with its queries, keys, values and outputs."""
        values = weights.value_output
        groups, per_group, head, _ = values.output.shape
        moments = statistics["head_outputs_moments"]
        units = _Units(moments, statistics.tokens, values.output.flatten(0, 2), per_group * head)
        squares = statistics.squares("query_squares"), statistics.squares("key_squares")

        def at(rank: int) -> Solution[HeadWeights]:
            kept, bias = units.at(rank, values.output_bias)
            thin = weights.select(kept, values.output[kept], *squares)
            thin = replace(thin, value_output=replace(thin.value_output, output_bias=bias))
            return Solution(thin, float(units.losses[rank]), float(units.losses[0]), kept)

        return Ladder(groups, at, units.losses)

    def choose(self, engine: Engine, config: CompressionConfig, ratio: float) -> Choice:
        """AL-AM."""
        return al_am(engine, self, config, ratio)


class _Units:
    """Which units of an output map (n, d), ``width`` channels each, stay at every rank, and the bias for the others."""

    def __init__(self, moments: torch.Tensor, tokens: int, output: torch.Tensor, width: int) -> None:
        self._moments, self._tokens, self._output, self._width = moments, tokens, output, width
        self._scores = fluctuation(moments, tokens, output).view(-1, width).sum(1)
        self.losses = tokens * selection_losses(self._scores)

    def at(self, rank: int, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The units that stay, ascending, and the bias with what the others put out on average."""
        kept = top_indices(self._scores, rank)
        left = torch.ones(len(self._scores), dtype=torch.bool, device=kept.device)
        left[kept] = False
        dropped = unit_channels(left.nonzero().flatten(), self._width)
        means = mean_contribution(self._moments, self._tokens, self._output, dropped)
        return kept, means if bias is None else bias + means
