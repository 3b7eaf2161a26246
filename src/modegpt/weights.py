"""One decoder layer's weights in a common form, whatever the family calls them, and back.

Everything is in the paper's orientation (``y = x W``) and float64, the decompositions' dtype. Notation:
d hidden size, m intermediate size, G key-value heads, g query heads per key-value head, h head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .modeling import Family


@dataclass(frozen=True)
class MLPWeights:
    """sigma(x W_U) W_D. Gated MLPs have two input maps, W_G and W_U, that share one selection.

    The input maps stay in the model's dtype: behind a nonlinearity, their channels can be chosen but not mixed.
    """

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


def read_mlp(layer: nn.Module, family: Family) -> MLPWeights:
    """Copy a stock layer's MLP into the common form."""
    inputs = [_linear(layer, path, double=False) for path in family.mlp_inputs]
    return MLPWeights(
        inputs=tuple(weight for weight, _ in inputs),
        input_biases=tuple(bias for _, bias in inputs),
        output=_linear(layer, family.mlp_output)[0],
    )


def mlp_tensors(mlp: MLPWeights, family: Family) -> dict[str, torch.Tensor]:
    """A compressed MLP under the names and in the orientation of the compressed layer's state dict."""
    tensors = {f"{family.mlp_output}.weight": mlp.output.T}
    for path, weight, bias in zip(family.mlp_inputs, mlp.inputs, mlp.input_biases, strict=True):
        tensors |= _named(path, weight.T, bias)
    return tensors


def read_query_key(layer: nn.Module, family: Family, groups: int, heads: int) -> QueryKeyWeights:
    """Copy a stock layer's queries and keys into the common form."""
    per_group = heads // groups
    query, query_bias = _linear(layer, f"{family.attention}.{family.query}")
    key, key_bias = _linear(layer, f"{family.attention}.{family.key}")
    return QueryKeyWeights(
        query=query.unflatten(1, (groups, per_group, -1)).permute(1, 2, 0, 3),
        key=key.unflatten(1, (groups, -1)).permute(1, 0, 2),
        query_bias=_per_head(query_bias, groups, per_group, -1),
        key_bias=_per_head(key_bias, groups, -1),
    )


def query_key_tensors(qk: QueryKeyWeights, rotary_pairs: torch.Tensor, family: Family) -> dict[str, torch.Tensor]:
    """Compressed queries and keys, and the pairs they keep, as in the compressed layer's state dict."""
    attention = family.attention
    return {
        **_named(f"{attention}.q_proj", qk.query.permute(0, 1, 3, 2).flatten(0, 2), qk.query_bias),
        **_named(f"{attention}.k_proj", qk.key.permute(0, 2, 1).flatten(0, 1), qk.key_bias),
        f"{attention}.rotary_pairs": rotary_pairs,
    }


def read_value_output(layer: nn.Module, family: Family, groups: int, heads: int) -> ValueOutputWeights:
    """Copy a stock layer's values and attention output into the common form."""
    value, value_bias = _linear(layer, f"{family.attention}.{family.value}")
    output, output_bias = _linear(layer, f"{family.attention}.{family.output}")
    return ValueOutputWeights(
        value=value.unflatten(1, (groups, -1)).permute(1, 0, 2),
        output=output.unflatten(0, (groups, heads // groups, -1)),
        value_bias=_per_head(value_bias, groups, -1),
        output_bias=output_bias,
    )


def value_output_tensors(vo: ValueOutputWeights, family: Family) -> dict[str, torch.Tensor]:
    """Compressed values and attention output as in the compressed layer's state dict."""
    attention = family.attention
    return {
        **_named(f"{attention}.v_proj", vo.value.permute(0, 2, 1).flatten(0, 1), vo.value_bias),
        **_named(f"{attention}.o_proj", vo.output.flatten(0, 2).T, vo.output_bias),
    }


def _linear(layer: nn.Module, path: str, *, double: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W of y = x W + b, and b; in float64 if ``double``."""
    module: Any = layer.get_submodule(path)
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    if double:
        weight, bias = weight.double(), None if bias is None else bias.double()
    return weight.T, bias


def _per_head(bias: torch.Tensor | None, *sizes: int) -> torch.Tensor | None:
    return None if bias is None else bias.unflatten(0, sizes)


def _named(path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {f"{path}.weight": weight, **({} if bias is None else {f"{path}.bias": bias.flatten()})}


def cast_like(tensors: Mapping[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
    """``tensors`` as ``layer`` would hold them: on its device, floating-point ones in its dtype."""
    reference = next(layer.parameters())
    return {
        name: tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }


def complete(module: nn.Module, tensors: Mapping[str, torch.Tensor], like: nn.Module) -> dict[str, torch.Tensor]:
    """The state of ``module``: ``tensors`` where named, else copies of those of the same name in ``like``."""
    source = like.state_dict()
    return {name: tensors[name] if name in tensors else source[name].clone() for name in module.state_dict()}


def copy_rest(module: nn.Module, source: nn.Module, *, outside: str, share: bool) -> None:
    """Give ``module`` the parameters and buffers of ``source`` whose name does not begin with ``outside``.

    They are copies unless ``share``.
    """
    for name, parameter in source.named_parameters():  # tied ones once: the model ties them again
        if not name.startswith(outside):
            data = parameter.detach() if share else parameter.detach().clone()
            set_tensor(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
    for name, buffer in source.named_buffers():
        if not name.startswith(outside):
            set_tensor(module, name, buffer if share else buffer.clone())


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` at the dotted ``name`` below ``module``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)
