"""Where a stock decoder layer keeps its weights, in the paper's orientation, whatever its family calls and packs them.

Notation: d hidden size, m intermediate size, H query heads, G key-value heads, g = H / G, h head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .errors import InvalidRequest
from .modeling import Family, features, has_experts, head_counts, is_joint, norm_parts


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of a layer."""

    heads: int
    groups: int
    head: int
    rotary: int
    """Channels of a head that the rotary embedding turns: the first ones, or none."""
    neighbours: bool
    """Whether a rotary pair is two neighbouring channels, not i and i + rotary / 2."""

    @classmethod
    def of(cls, layer: nn.Module, config: PreTrainedConfig, family: Family) -> HeadShape:
        """The heads of a stock ``layer`` (which may be on the meta device)."""
        heads, groups = head_counts(config)
        head = features(layer.get_submodule(f"{family.attention}.{family.output}"))[0] // heads
        rotary = rotary_channels(config, family, head)
        if (head - rotary) % 2 and rotary:
            raise InvalidRequest(
                f"MODEL has heads of {head} channels of which {rotary} rotate; the others must be an even number"
            )
        return cls(heads, groups, head, rotary, family.rotary == "neighbours")

    @property
    def step(self) -> int:
        """Channels that queries and keys lose at once."""
        return 2 if self.rotary else 1


def rotary_pairs(rotary: int, neighbours: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of every rotary pair of a head: (R / 2,) each, see :class:`HeadShape`."""
    index = torch.arange(rotary // 2, device=device)
    return (2 * index, 2 * index + 1) if neighbours else (index, index + rotary // 2)


def rotary_channels(config: PreTrainedConfig, family: Family, head: int) -> int:
    """How many of the ``head`` channels of a head a rotary embedding turns."""
    if family.rotary is None or not family.partial_rotary:
        return 0 if family.rotary is None else head
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head * parameters.get("partial_rotary_factor", 1.0))


Map = tuple[torch.Tensor, torch.Tensor | None]


def linear(layer: nn.Module, path: str) -> Map:
    """W (in, out) of y = x W + b, and b (out,) or None: views of the weights."""
    module: Any = layer.get_submodule(path)
    weight = module.weight.detach()
    return weight if isinstance(module, Conv1D) else weight.T, None if module.bias is None else module.bias.detach()


def query_key_value(layer: nn.Module, family: Family, shape: HeadShape) -> tuple[Map, Map, Map]:
    """W_q (d, H, h), W_k (d, G, h) and W_v (d, G, h), and their biases without the first axis; float64."""
    found: list[Map] = []
    for name in family.input_maps:
        weight, bias = linear(layer, f"{family.attention}.{name}")
        weights = _split(weight.double(), family, shape)
        biases = [None] * len(weights) if bias is None else _split(bias.double(), family, shape)
        found += zip(weights, biases, strict=True)
    query, key, value = found
    return query, key, value


def _split(x: torch.Tensor, family: Family, shape: HeadShape) -> list[torch.Tensor]:
    """The outputs (..., out) of one input map as (..., heads, h): one tensor, or query, key and value."""
    heads = x.unflatten(-1, (-1, shape.head))
    if family.fused is None:
        return [heads]
    per_group = shape.heads // shape.groups
    if not family.fused_by_group:
        return list(heads.split([shape.heads, shape.groups, shape.groups], dim=-2))
    query, key, value = heads.unflatten(-2, (shape.groups, per_group + 2)).split([per_group, 1, 1], dim=-2)
    return [part.flatten(-3, -2) for part in (query, key, value)]


@dataclass(frozen=True)
class Norm:
    """A stock norm of queries or keys: its weight and bias for every head (heads, h), as they are stored."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    joint: bool
    """Whether the mean square is that of all heads' channels together."""


def norms(layer: nn.Module, family: Family, shape: HeadShape) -> tuple[Norm | None, Norm | None]:
    """The norms of queries and keys, where the layer has them."""
    attention = layer.get_submodule(family.attention)
    found = (getattr(attention, name, None) if name else None for name in family.norms)
    query, key = (
        None if norm is None else _norm(norm, heads, shape.head)
        for norm, heads in zip(found, (shape.heads, shape.groups), strict=True)
    )
    return query, key


def _norm(norm: nn.Module, heads: int, head: int) -> Norm:
    parts = norm_parts(norm)

    def gather(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name).detach().reshape(-1, head) for part in parts]).expand(heads, head)

    bias = None if getattr(parts[0], "bias", None) is None else gather("bias")
    return Norm(gather("weight"), bias, is_joint(norm, heads, head))


def expert_count(layer: nn.Module, family: Family) -> int:
    """The number of a layer's experts; 0 for a plain MLP."""
    return int(_experts(layer, family).down_proj.shape[0]) if has_experts(layer, family) else 0


def intermediate_size(layer: nn.Module, family: Family) -> int:
    """m, of the MLP or of each expert."""
    if has_experts(layer, family):
        return int(_experts(layer, family).down_proj.shape[-1])
    return features(layer.get_submodule(family.mlp_output))[0]


def is_gated(layer: nn.Module, family: Family) -> bool:
    """Whether two maps go into the MLP's intermediate space, one of them a gate; not of experts."""
    return not has_experts(layer, family) and len(mlp_maps(layer, family)[0]) == 2


def mlp_maps(layer: nn.Module, family: Family, expert: int | None = None) -> tuple[list[Map], torch.Tensor]:
    """The maps into the intermediate space, each (d, m), and W_D (m, d): of the MLP, or of one ``expert``."""
    if expert is not None:
        experts = _experts(layer, family)
        gate_up = experts.gate_up_proj.detach()[expert].T
        return [(part, None) for part in gate_up.chunk(2, dim=1)], experts.down_proj.detach()[expert].T
    output, _ = linear(layer, family.mlp_output)
    width, inputs = len(output), []
    for path in family.mlp_inputs:
        weight, bias = linear(layer, path)
        biases = [None] * (weight.shape[1] // width) if bias is None else bias.split(width)
        inputs += list(zip(weight.split(width, dim=1), biases, strict=True))
    return inputs, output


@dataclass(frozen=True)
class MapShape:
    """A linear map of a layer as its compressed form stores it."""

    inputs: int
    outputs: int
    parts: int = 1
    """Maps that it holds: two where gate and up are one."""


_Modules = Literal["mlp", "qk", "vo"]


def map_shapes(layer: nn.Module, config: PreTrainedConfig, family: Family) -> dict[_Modules, list[MapShape]]:
    """The linear maps of a layer's modules, in the order of their weights' ``maps``; not of one with experts."""
    shape = HeadShape.of(layer, config, family)
    query, output = (linear(layer, f"{family.attention}.{name}")[0] for name in (family.input_maps[0], family.output))
    inputs, down = mlp_maps(layer, family)
    d, (m, outputs), parts = len(query), down.shape, len(inputs) // len(family.mlp_inputs)
    heads, groups = shape.heads * shape.head, shape.groups * shape.head
    return {
        "mlp": [*(MapShape(len(inputs[0][0]), parts * m, parts) for _ in family.mlp_inputs), MapShape(m, outputs)],
        "qk": [MapShape(d, heads), MapShape(d, groups)],
        "vo": [MapShape(d, groups), MapShape(*output.shape)],
    }


def map_paths(family: Family, module: str) -> tuple[str, ...]:
    """Where a compressed layer has the maps of ``module``, in the same order."""
    names = {"qk": ("q_proj", "k_proj"), "vo": ("v_proj", "o_proj")}
    if module == "mlp":
        return (*family.mlp_inputs, family.mlp_output)
    return tuple(f"{family.attention}.{name}" for name in names[module])


def _experts(layer: nn.Module, family: Family) -> Any:
    assert family.experts is not None
    return layer.get_submodule(family.experts)
