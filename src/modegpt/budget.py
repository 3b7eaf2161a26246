"""From sparsities to whole ranks: parameter counts and rounding, so that the total is the one asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, cast

from torch import nn
from transformers import PreTrainedConfig

from .errors import InvalidRequest
from .layout import HeadShape, expert_count, intermediate_size, linear, mlp_maps, norms
from .modeling import Family, LayerSizes, head_counts

#: What of a layer is compressed by itself: MLP channels, queries with keys, values with outputs; or whole key-value
#: heads with their queries; or the layer itself; or the directions of the residual stream that it reads. A method has
#: some of them.
Module = Literal["mlp", "qk", "vo", "heads", "layer", "stream"]
#: Those of a method that does not say otherwise.
MODULES: tuple[Module, ...] = ("mlp", "qk", "vo")
_WIDTHS: dict[Module, str] = {"mlp": "intermediate_size", "qk": "qk_head_dim", "vo": "v_head_dim"}
#: Kernels that multiply with all experts at once want rows of a multiple of 16 bytes, in 16-bit formats as well.
EXPERT_MULTIPLE = 8
#: Of itself, what a layer's finest module gives or takes so that the total is right, as long as others can.
_TAKEN = 0.02


@dataclass(frozen=True)
class ModuleGeometry:
    """One compressible module of a layer: ``full`` units of ``unit_parameters`` parameters each.

    A unit is an intermediate channel (mlp, of every expert), a rotary pair in every head (qk; one channel where
    none rotate) or a value channel in every head (vo). A rank of ``r`` units is ``r * channels`` channels wide.
    """

    full: int
    unit_parameters: int
    channels: int = 1
    multiple: int = 1
    """Of channels: what kernels demand of a rank, unless it is full."""

    @property
    def parameters(self) -> int:
        """Parameters that can be removed."""
        return self.parameters_at(self.full)

    def parameters_at(self, rank: int) -> int:
        """Parameters at ``rank`` units."""
        return rank * self.unit_parameters

    def largest_step(self, align: int) -> int:
        """What the next allowed rank has more at most; 0 where there is none."""
        return self.unit_parameters * self.step(align)

    def step(self, align: int) -> int:
        """The units between two allowed ranks."""
        return math.lcm(align, self.channels, self.multiple) // self.channels

    def nearest(self, units: float, align: int) -> int:
        """The allowed rank nearest to ``units``: a multiple of ``align`` channels, at least one, or full."""
        step = self.step(align)
        lower = min(max(1, math.floor(units / step)) * step, self.full)
        upper = min(lower + step, self.full)
        return lower if units - lower <= upper - units else upper

    def taking(self, units: float, wanted: float, align: int, *, limited: bool) -> int:
        """The allowed rank nearest to ``units`` less ``wanted`` parameters, which can be negative.

        Where ``limited``, of no more than a step or a small share of all units.
        """
        room = max(self.step(align), _TAKEN * self.full) if limited else self.full
        return self.nearest(units - min(max(wanted / self.unit_parameters, -room), room), align)


@dataclass(frozen=True)
class LayerGeometry:
    """The parameter counts of one decoder layer; ``parameters`` includes what is never compressed."""

    modules: Mapping[Module, ModuleGeometry]
    parameters: int
    extra: int = 0
    """What the compressed layer has more at full ranks: norms for every head, an output bias for values' biases."""
    dense: LayerSizes | None = None
    """The widths of what no module changes."""

    def sizes(self, rank: LayerRanks) -> LayerSizes:
        """The widths of the compressed layer at these ranks."""
        widths: dict[str, Any] = {
            field: rank[name] * self.modules[name].channels for name, field in _WIDTHS.items() if name in rank
        }
        for name, field in (("heads", "kv_heads"), ("stream", "stream_width")):
            if name in rank:
                widths[field] = rank[name]  # type: ignore[literal-required]
        return LayerSizes(**widths) if self.dense is None else replace(self.dense, **widths)


class LayerRanks(TypedDict, total=False):
    """Kept units of each of a layer's modules, see :class:`ModuleGeometry`."""

    mlp: int
    qk: int
    vo: int
    heads: int
    layer: int
    stream: int


def whole(layer: LayerGeometry) -> LayerRanks:
    """The ranks at which nothing of a layer is removed."""
    return ranks_of({module: shape.full for module, shape in layer.modules.items()})


def ranks_of(units: Mapping[Module, int]) -> LayerRanks:
    """``units`` as ranks."""
    return cast(LayerRanks, dict(units))


def staying(ranks: Sequence[LayerRanks]) -> list[int]:
    """The numbers of the layers of which anything is left."""
    return [index for index, rank in enumerate(ranks) if rank.get("layer", 1)]


def layer_geometry(layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
    """Count the parameters of a stock decoder ``layer`` (which may be on the meta device)."""
    shape = HeadShape.of(layer, config, family)
    heads, groups, head = shape.heads, shape.groups, shape.head
    experts = expert_count(layer, family)
    inputs, down = mlp_maps(layer, family, 0 if experts else None)
    channel = sum(weight.shape[0] + (bias is not None) for weight, bias in inputs) + down.shape[1]

    maps = [linear(layer, f"{family.attention}.{name}") for name in family.input_maps]
    (query, query_bias), (_, key_bias), (_, value_bias) = maps[0], maps[len(maps) // 2], maps[-1]
    output, output_bias = linear(layer, f"{family.attention}.{family.output}")
    hidden, outputs = query.shape[0], output.shape[1]
    pair = heads * (hidden + (query_bias is not None)) + groups * (hidden + (key_bias is not None))
    for norm, count in zip(norms(layer, family, shape), (heads, groups), strict=True):
        pair += 0 if norm is None else count * (2 + (norm.bias is not None))
    value = groups * hidden + heads * outputs
    bias = outputs if output_bias is not None or value_bias is not None else 0
    stock = sum(parameter.numel() for parameter in layer.get_submodule(family.attention).parameters())
    return LayerGeometry(
        {
            "mlp": ModuleGeometry(
                intermediate_size(layer, family),
                max(1, experts) * channel,
                multiple=EXPERT_MULTIPLE if experts else 1,
            ),
            "qk": ModuleGeometry(head // shape.step, shape.step * pair, channels=shape.step),
            "vo": ModuleGeometry(head, value),
        },
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        extra=head * (pair + value) + bias - stock,
        dense=LayerSizes(intermediate_size(layer, family), head, head),
    )


def head_geometry(layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
    """The same where attention loses whole key-value heads, each with its queries, keys, values and outputs."""
    channels = layer_geometry(layer, config, family)
    groups, (qk, vo) = head_counts(config)[1], (channels.modules[module] for module in ("qk", "vo"))
    heads = ModuleGeometry(groups, (qk.parameters + vo.parameters) // groups, channels=vo.full)
    return replace(channels, modules={"mlp": channels.modules["mlp"], "heads": heads})


def biased_head_geometry(layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
    """The same where attention and the MLP get a bias at their output if they have none; not with experts."""
    result = head_geometry(layer, config, family)
    if expert_count(layer, family):
        return result
    assert result.dense is not None
    down, bias = linear(layer, family.mlp_output)
    added = down.shape[1] if bias is None else 0
    output, bias = linear(layer, f"{family.attention}.{family.output}")
    _, value_bias = linear(layer, f"{family.attention}.{family.input_maps[-1]}")
    added += output.shape[1] if bias is None and value_bias is None else 0
    return replace(result, extra=result.extra + added, dense=replace(result.dense, output_biases=True))


def whole_geometry(layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
    """The same where the layer stays or goes as a whole."""
    channels = layer_geometry(layer, config, family)
    return replace(channels, modules={"layer": ModuleGeometry(1, channels.parameters + channels.extra)})


@dataclass(frozen=True)
class Base:
    """What a ratio is of: ratio * ``parameters`` + ``extra`` have to go."""

    parameters: int
    extra: int = 0
    """What compressed layers have more, which has to be made up for."""
    name: str = "the decoder blocks' parameters"

    @classmethod
    def blocks(cls, layers: Sequence[LayerGeometry]) -> Base:
        """All that is in the ``layers``."""
        return cls(sum(layer.parameters for layer in layers), sum(layer.extra for layer in layers))

    @classmethod
    def touched(cls, layers: Sequence[LayerGeometry], modules: Sequence[Module]) -> Base:
        """What of the ``layers`` can be removed with these ``modules``."""
        parameters = sum(layer.modules[module].parameters for layer in layers for module in modules)
        return cls(parameters, name="the touched matrices")


def average_sparsity(
    layers: Sequence[LayerGeometry],
    modules: Sequence[Module],
    ratio: float,
    align: int = 1,
    base: Base | None = None,
) -> float:
    """The share the selected ``modules`` of these ``layers`` must lose so that ``base`` loses ``ratio``.

    That is all parameters of the layers where not given. Raises :class:`InvalidRequest` when the modules, kept at their
    smallest allowed ranks, do not hold that much.
    """
    base = base or Base.blocks(layers)
    selected = sum(layer.modules[module].parameters for layer in layers for module in modules)
    chosen = [layer.modules[module] for layer in layers for module in modules]
    room = selected - sum(geometry.parameters_at(geometry.nearest(0, align)) for geometry in chosen)
    if not 0 < room >= ratio * base.parameters + base.extra:
        largest = max(0, math.floor(1000 * (room - base.extra) / max(1, base.parameters)) / 1000)
        what = f"--ratio {ratio:g} is out of reach" if ratio else "nothing can be removed"  # none was given
        raise InvalidRequest(
            f"{what} with --modules {','.join(modules)} and --align {align}: at most {largest:g} of {base.name} can "
            "go; use less, more modules or layers, or a finer alignment"
        )
    return max(0.0, (ratio * base.parameters + base.extra) / selected)


def ranks_from_sparsity(
    layers: Sequence[LayerGeometry], sparsity: Sequence[Mapping[Module, float]], align: int
) -> list[LayerRanks]:
    """Round every layer's ideal ranks so that the total number of kept parameters is the ideal one.

    ``sparsity`` gives, per layer, the share each selected module loses; modules not named stay whole. The
    coarser modules of a layer go to their nearest allowed rank, and the finest takes up the difference, but no
    more than ``_TAKEN`` of itself: a step of many experts can be as much as a whole attention module. What it
    cannot take is carried on: into the next layers, where it goes to the coarsest module once it is half a step, and
    from the last layer back towards the first, in the end without that limit and to the other modules. With room
    left anywhere, the total is off by at most half a step of the finest module.
    """
    carry = 0.0  # parameters kept too few so far
    units: list[dict[Module, int]] = []
    for layer, shares in zip(layers, sparsity, strict=True):
        kept: dict[Module, int] = {module: shape.full for module, shape in layer.modules.items()}
        finest, *_ = from_finest(layer, shares, align)
        coarsest = max(
            shares, key=lambda module: layer.modules[module].unit_parameters * layer.modules[module].step(align)
        )
        for module in [*(module for module in shares if module != finest), finest]:
            geometry = layer.modules[module]
            ideal, step = (1 - shares[module]) * geometry.full, geometry.step(align)
            due = module == finest or (module == coarsest and abs(carry) >= step * geometry.unit_parameters / 2)
            kept[module] = geometry.taking(ideal, -carry if due else 0.0, align, limited=module == finest)
            carry += (1 - shares[module]) * geometry.parameters - geometry.parameters_at(kept[module])
        units.append(kept)
    for place, limited in ((0, True), (0, False), (1, False), (2, False), (0, False)):
        for layer, shares, kept in reversed(list(zip(layers, sparsity, units, strict=True))):
            for module in from_finest(layer, shares, align)[place : place + 1]:
                geometry, before = layer.modules[module], kept[module]
                kept[module] = geometry.taking(before, -carry, align, limited=limited)
                carry -= geometry.parameters_at(kept[module]) - geometry.parameters_at(before)
    return [ranks_of(kept) for kept in units]


def from_finest(layer: LayerGeometry, modules: Iterable[Module], align: int) -> list[Module]:
    """The modules, from that whose steps are smallest, hence best at meeting a budget."""
    shapes, every = layer.modules, list(modules)
    some = [module for module in every if shapes[module].parameters] or every  # of some a method takes nothing
    return sorted(some, key=lambda module: shapes[module].unit_parameters * shapes[module].step(align))


def kept_parameters(layers: Sequence[LayerGeometry], ranks: Sequence[LayerRanks]) -> int:
    """Parameters of the decoder blocks at these ranks."""
    return sum(
        layer.parameters
        + layer.extra
        - sum(geometry.parameters - geometry.parameters_at(rank[module]) for module, geometry in layer.modules.items())
        for layer, rank in zip(layers, ranks, strict=True)
    )
