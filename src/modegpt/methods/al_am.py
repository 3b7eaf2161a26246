"""AL-AM, the allocation of FLAP: the units of lowest standardised score go, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..budget import LayerGeometry, Module, average_sparsity, ranks_from_sparsity
from ..decompositions import fluctuation, standardised
from ..layout import HeadShape
from ..results import Choice
from ..scores import over_layers
from ..statistics import LayerStatistics
from ..weights import read_mlp, read_value_output
from .base import Method

if TYPE_CHECKING:
    from ..activations import Activations
    from ..config import CompressionConfig
    from ..engine import Engine


def al_am(engine: Engine, method: Method, config: CompressionConfig, ratio: float) -> Choice:
    """What every layer keeps when ``ratio`` goes by FLAP's metric, whose statistics are the ``method``'s.

    One pass over the dense layers. The scores are standardised over each layer and module type, and the lowest of all
    go until enough parameters are gone.
    """
    geometry = engine.geometry(method)
    wanted = average_sparsity(geometry, config.modules, ratio, config.alignment) * sum(
        layer.modules[module].parameters for layer in geometry for module in config.modules
    )

    def score(index: int, layer: nn.Module, hidden: Activations) -> dict[Module, torch.Tensor]:
        statistics = engine.calibrate(index, layer, hidden, method.statistics, keep=True)
        return _standardised(engine, layer, statistics, config.modules)

    gone = engine.once("fluctuation", lambda: _lowest(over_layers(engine, "fluctuation", score), geometry, wanted))
    sparsity: list[dict[Module, float]] = [
        {module: row[module] / layer.modules[module].full for module in config.modules}
        for row, layer in zip(gone, geometry, strict=True)
    ]
    return Choice(ranks_from_sparsity(geometry, sparsity, config.alignment), sparsity)


def _standardised(
    engine: Engine, layer: nn.Module, statistics: LayerStatistics, modules: Sequence[Module]
) -> dict[Module, torch.Tensor]:
    """The standardised scores of the units of a layer's ``modules``."""
    family, scores = engine.family.description, dict[Module, torch.Tensor]()
    if "mlp" in modules:
        output = read_mlp(layer, family).output
        scores["mlp"] = standardised(fluctuation(statistics["mlp_moments"], statistics.tokens, output))
    if "heads" in modules:
        output = read_value_output(layer, family, HeadShape.of(layer, engine.dense.model.config, family)).output
        metric = fluctuation(statistics["head_outputs_moments"], statistics.tokens, output.flatten(0, 2))
        scores["heads"] = standardised(metric, len(metric) // len(output))
    return scores


def _lowest(
    scores: Sequence[Mapping[Module, torch.Tensor]], geometry: Sequence[LayerGeometry], wanted: float
) -> list[dict[Module, int]]:
    """How many units of each module go when the lowest of all go until about ``wanted`` parameters are gone."""
    units = sorted(
        (score, index, module)
        for index, layer in enumerate(scores)
        for module, all_of_them in layer.items()
        for score in all_of_them.sort().values[:-1].tolist()
    )
    gone: list[dict[Module, int]] = [dict.fromkeys(layer, 0) for layer in scores]
    finest = min(geometry[index].modules[module].unit_parameters for _, index, module in units)
    for _, index, module in units:
        size = geometry[index].modules[module].unit_parameters
        if wanted >= (size if size > finest else size / 2):  # a coarser one that is too much leaves it to others
            gone[index][module] += 1
            wanted -= size
    return gone
