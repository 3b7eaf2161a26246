"""One decoder layer's weights in a common form, whatever the family calls them, and back.

Everything is in the paper's orientation (``y = x W``) and float64, the decompositions' dtype. Notation:
d hidden size, m intermediate size, G key-value heads, g query heads per key-value head, h head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .modeling import Family


@dataclass(frozen=True)
class MLPWeights:
    """sigma(x W_U) W_D. Gated MLPs have two input maps, W_G and W_U, that share one selection."""

    inputs: tuple[torch.Tensor, ...]
    """Each (d, m)."""
    input_biases: tuple[torch.Tensor | None, ...]
    """Each (m,)."""
    output: torch.Tensor
    """W_D (m, d)."""


@dataclass(frozen=True)
class QueryKeyWeights:
    """rho(x W_q + b_q) rho(x W_k + b_k)^T for every head."""

    query: torch.Tensor
    """(G, g, d, h)."""
    key: torch.Tensor
    """(G, d, h)."""
    query_bias: torch.Tensor | None
    """(G, g, h)."""
    key_bias: torch.Tensor | None
    """(G, h)."""


@dataclass(frozen=True)
class ValueOutputWeights:
    """A (x W_v + b_v) W_o + b_o summed over the heads, A the attention weights."""

    value: torch.Tensor
    """(G, d, h)."""
    output: torch.Tensor
    """(G, g, h, d)."""
    value_bias: torch.Tensor | None
    """(G, h)."""
    output_bias: torch.Tensor | None
    """(d,)."""


@dataclass(frozen=True)
class LayerWeights:
    """The compressible weights of one decoder layer."""

    mlp: MLPWeights
    query_key: QueryKeyWeights
    value_output: ValueOutputWeights


def read_layer(layer: nn.Module, family: Family, groups: int, heads: int) -> LayerWeights:
    """Copy the compressible weights of a stock decoder ``layer`` into the common form (float64)."""

    def linear(path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = layer.get_submodule(path)
        bias = module.bias
        weight = module.weight.detach().double().T  # type: ignore[operator]
        return weight, None if bias is None else bias.detach().double()  # type: ignore[operator]

    def attention(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return linear(f"{family.attention}.{name}")

    def bias_per_head(bias: torch.Tensor | None, *sizes: int) -> torch.Tensor | None:
        return None if bias is None else bias.unflatten(0, sizes)

    per_group = heads // groups
    query, query_bias = attention(family.query)
    key, key_bias = attention(family.key)
    value, value_bias = attention(family.value)
    output, output_bias = attention(family.output)
    inputs = [linear(path) for path in family.mlp_inputs]
    return LayerWeights(
        mlp=MLPWeights(
            tuple(weight for weight, _ in inputs), tuple(bias for _, bias in inputs), linear(family.mlp_output)[0]
        ),
        query_key=QueryKeyWeights(
            query=query.unflatten(1, (groups, per_group, -1)).permute(1, 2, 0, 3),
            key=key.unflatten(1, (groups, -1)).permute(1, 0, 2),
            query_bias=bias_per_head(query_bias, groups, per_group, -1),
            key_bias=bias_per_head(key_bias, groups, -1),
        ),
        value_output=ValueOutputWeights(
            value=value.unflatten(1, (groups, -1)).permute(1, 0, 2),
            output=output.unflatten(0, (groups, per_group, -1)),
            value_bias=bias_per_head(value_bias, groups, -1),
            output_bias=output_bias,
        ),
    )


def layer_tensors(weights: LayerWeights, rotary_pairs: torch.Tensor, family: Family) -> dict[str, torch.Tensor]:
    """The compressed ``weights`` under the names and in the orientation of the compressed layer's state dict."""
    qk, vo, mlp = weights.query_key, weights.value_output, weights.mlp
    tensors: dict[str, torch.Tensor | None] = {
        "q_proj.weight": qk.query.permute(0, 1, 3, 2).flatten(0, 2),
        "k_proj.weight": qk.key.permute(0, 2, 1).flatten(0, 1),
        "v_proj.weight": vo.value.permute(0, 2, 1).flatten(0, 1),
        "o_proj.weight": vo.output.flatten(0, 2).T,
        "q_proj.bias": None if qk.query_bias is None else qk.query_bias.flatten(),
        "k_proj.bias": None if qk.key_bias is None else qk.key_bias.flatten(),
        "v_proj.bias": None if vo.value_bias is None else vo.value_bias.flatten(),
        "o_proj.bias": vo.output_bias,
        "rotary_pairs": rotary_pairs,
    }
    tensors = {f"{family.attention}.{name}": tensor for name, tensor in tensors.items()}
    for path, weight, bias in zip(family.mlp_inputs, mlp.inputs, mlp.input_biases, strict=True):
        tensors[f"{path}.weight"], tensors[f"{path}.bias"] = weight.T, bias
    tensors[f"{family.mlp_output}.weight"] = mlp.output.T
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def assign(module: nn.Module, tensors: Mapping[str, torch.Tensor], like: nn.Module) -> None:
    """Give the (meta) ``module`` its weights: ``tensors`` where named, else those of the same name in ``like``.

    Floating-point tensors take the dtype of ``like``'s parameters and everything its device.
    """
    reference = next(like.parameters())
    source = like.state_dict()
    state = {
        name: tensors[name].to(reference.device, reference.dtype if tensors[name].is_floating_point() else None)
        if name in tensors
        else source[name].clone()
        for name in module.state_dict()
    }
    module.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)


def copy_rest(module: nn.Module, source: nn.Module, *, outside: str) -> None:
    """Give ``module`` copies of the parameters and buffers of ``source`` whose name does not begin with ``outside``."""
    for name, parameter in source.named_parameters():  # tied ones once: the model ties them again
        if not name.startswith(outside):
            _set(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    for name, buffer in source.named_buffers():
        if not name.startswith(outside):
            _set(module, name, buffer.clone())


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)
