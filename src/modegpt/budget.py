"""From sparsities to whole ranks: parameter counts and rounding, so that the total is the one asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedConfig

from .errors import InvalidRequest
from .modeling import Family, LayerSizes

Module = Literal["mlp", "qk", "vo"]
MODULES: tuple[Module, ...] = get_args(Module)


@dataclass(frozen=True)
class ModuleGeometry:
    """One compressible module of a layer: ``full`` units of ``unit_parameters`` parameters each.

    A unit is an intermediate channel (mlp), a rotary pair in every head (qk) or a value channel in every
    head (vo). A rank of ``r`` units is ``r * channels`` channels wide.
    """

    full: int
    unit_parameters: int
    channels: int = 1

    @property
    def parameters(self) -> int:
        """Parameters that can be removed."""
        return self.full * self.unit_parameters

    def nearest(self, units: float, align: int) -> int:
        """The allowed rank nearest to ``units``: a multiple of ``align`` channels, at least one, or full."""
        step = math.lcm(align, self.channels) // self.channels
        lower = min(max(1, math.floor(units / step)) * step, self.full)
        upper = min(lower + step, self.full)
        return lower if units - lower <= upper - units else upper


@dataclass(frozen=True)
class LayerGeometry:
    """The parameter counts of one decoder layer; ``parameters`` includes what is never compressed."""

    modules: Mapping[Module, ModuleGeometry]
    parameters: int


@dataclass(frozen=True)
class LayerRanks:
    """Kept units of one layer: intermediate channels, rotary pairs per head, value channels per head."""

    mlp: int
    qk: int
    vo: int

    def sizes(self) -> LayerSizes:
        """The widths these ranks give the compressed layer."""
        return LayerSizes(intermediate_size=self.mlp, qk_head_dim=2 * self.qk, v_head_dim=self.vo)


def layer_geometry(layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
    """Count the parameters of a stock decoder ``layer`` (which may be on the meta device)."""

    def cost(paths: Sequence[str], outputs: Sequence[str]) -> int:
        """Parameters of one channel: a row (with its bias) in each of ``paths``, a column in each of ``outputs``."""
        rows = [layer.get_submodule(path) for path in paths]
        columns = [layer.get_submodule(path) for path in outputs]
        return sum(row.in_features + (row.bias is not None) for row in rows) + sum(  # type: ignore[misc, operator]
            column.out_features  # type: ignore[misc]
            for column in columns
        )

    query, key, value, output = (f"{family.attention}.{name}" for name in family.attention_maps)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = layer.get_submodule(key).out_features // groups
    return LayerGeometry(
        {
            "mlp": ModuleGeometry(
                layer.get_submodule(family.mlp_output).in_features,  # type: ignore[arg-type]
                cost(family.mlp_inputs, [family.mlp_output]),
            ),
            "qk": ModuleGeometry(head_dim // 2, 2 * (heads * cost([query], []) + groups * cost([key], [])), channels=2),
            "vo": ModuleGeometry(head_dim, groups * cost([value], []) + heads * cost([], [output])),
        },
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
    )


def average_sparsity(layers: Sequence[LayerGeometry], modules: Sequence[Module], ratio: float, align: int = 1) -> float:
    """The share the selected ``modules`` must lose so that the decoder blocks lose ``ratio`` of their parameters.

    Raises :class:`InvalidRequest` when the modules, kept at their smallest allowed ranks, do not hold that much.
    """
    blocks = sum(layer.parameters for layer in layers)
    selected = sum(layer.modules[module].parameters for layer in layers for module in modules)
    chosen = [layer.modules[module] for layer in layers for module in modules]
    smallest = sum(geometry.nearest(0, align) * geometry.unit_parameters for geometry in chosen)
    if ratio * blocks > selected - smallest:
        largest = math.floor(1000 * (selected - smallest) / blocks) / 1000
        raise InvalidRequest(
            f"--ratio {ratio:g} is out of reach with --modules {','.join(modules)} and --align {align}: "
            f"at most {largest:g} of the decoder blocks' parameters can go; use less, more modules or a finer alignment"
        )
    return ratio * blocks / selected


def ranks_from_sparsity(
    layers: Sequence[LayerGeometry], sparsity: Sequence[Mapping[Module, float]], align: int
) -> list[LayerRanks]:
    """Round every layer's ideal ranks so that the total number of kept parameters is the ideal one.

    ``sparsity`` gives, per layer, the share each selected module loses; modules not named stay whole. The
    coarser modules of a layer go to their nearest allowed rank, and the finest takes up the difference.
    What it cannot take is carried into the next layer, and from the last back towards the first. With room
    left anywhere, the total is off by at most half a step of the finest module.
    """
    carry = 0.0  # parameters kept too few so far
    units: list[dict[Module, int]] = []
    for layer, shares in zip(layers, sparsity, strict=True):
        kept: dict[Module, int] = {module: layer.modules[module].full for module in MODULES}
        finest = _finest(layer, shares)
        for module in [*(module for module in shares if module != finest), finest]:
            geometry = layer.modules[module]
            ideal = (1 - shares[module]) * geometry.full
            kept[module] = geometry.nearest(
                ideal + carry / geometry.unit_parameters if module == finest else ideal, align
            )
            carry += (ideal - kept[module]) * geometry.unit_parameters
        units.append(kept)
    for layer, shares, kept in reversed(list(zip(layers, sparsity, units, strict=True))):
        module = _finest(layer, shares)
        geometry = layer.modules[module]
        before = kept[module]
        kept[module] = geometry.nearest(before + carry / geometry.unit_parameters, align)
        carry -= (kept[module] - before) * geometry.unit_parameters
    return [LayerRanks(**kept) for kept in units]


def _finest(layer: LayerGeometry, modules: Iterable[Module]) -> Module:
    """The module whose units are smallest, hence best at meeting a budget."""
    return min(modules, key=lambda module: layer.modules[module].unit_parameters)


def kept_parameters(layers: Sequence[LayerGeometry], ranks: Sequence[LayerRanks]) -> int:
    """Parameters of the decoder blocks at these ranks."""
    return sum(
        layer.parameters
        - sum(
            (geometry.full - getattr(rank, module)) * geometry.unit_parameters
            for module, geometry in layer.modules.items()
        )
        for layer, rank in zip(layers, ranks, strict=True)
    )
