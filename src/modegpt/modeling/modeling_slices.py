"""A residual stream of fewer directions: a part of the runtime of a compressed model, see ``modeling_modegpt.py``.

In a decoder whose layers are x + attention(norm(x)), then x + mlp(norm(x)), the stream between two parts is kept in an
orthonormal basis of its own, of which only the leading directions are there. What goes past a part changes its basis by
an adapter. This file travels with every checkpoint as well, so it imports nothing but torch and Transformers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from .modeling_description import Family

#: What a layer calls its norms; those that can be sliced all do.
NORMS = ("input_layernorm", "post_attention_layernorm")


class SlicedNorm(nn.Module):
    """x / sqrt(sum_j x_j^2 / n + eps) of a stream that had ``n`` channels: those that are missing count as zero.

    It has no weight: the maps behind it have taken it up.
    """

    def __init__(self, like: Any, channels: int) -> None:
        """In place of the stock RMS norm ``like`` of so many ``channels``."""
        super().__init__()
        self.channels = channels
        self.eps = float(like.variance_epsilon if hasattr(like, "variance_epsilon") else like.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape, computed in float32."""
        values = x.float()
        square = values.square().sum(-1, keepdim=True) / self.channels
        return (values * torch.rsqrt(square + self.eps)).to(x.dtype)


class SlicedLayer:
    """Mixin before a stock decoder layer: the same forward, but what goes past a part passes an adapter."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T, width) to (B, T, width of the next layer)."""
        layer: Any = self
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        between = layer.attention_adapter(hidden_states) + _dropped(layer, "resid_attn_dropout", attended)
        found = layer.mlp(layer.post_attention_layernorm(between))
        result: torch.Tensor = layer.mlp_adapter(between) + _dropped(layer, "resid_mlp_dropout", found)
        return result


def _dropped(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """What the family's dropout of that name, if it has one, makes of ``x``."""
    dropout = getattr(layer, name, None)
    result: torch.Tensor = x if dropout is None else dropout(x)
    return result


@cache
def _sliced_class(stock: Any) -> Any:
    """A sliced layer that Transformers still recognises as the family's."""
    return type(f"ModeGPT{stock.__name__}", (SlicedLayer, stock), {})


def slice_stream(base: Any, family: Family, widths: Sequence[int], channels: int) -> None:
    """Narrow the stream of a ``base`` model of ``channels`` to the ``widths`` that its layers read.

    What the last layer puts out has all channels again, in the dense model's basis, as the final norm and the head
    expect it. Raises ``ValueError`` for layers of another form.
    """
    for layer in base.get_submodule(family.layers):
        if not all(hasattr(layer, name) for name in (*NORMS, "self_attn", "mlp")):
            raise ValueError(f"stream_width: a {type(layer).__name__} cannot be sliced")
    for layer, width, leaving in zip(base.get_submodule(family.layers), widths, [*widths[1:], channels], strict=True):
        attention = family.attention
        for path in (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", *family.mlp_inputs):
            linear = layer.get_submodule(path)
            layer.set_submodule(path, _linear(linear, width, linear.out_features, bias=linear.bias is not None))
        for path, outputs in ((f"{attention}.o_proj", width), (family.mlp_output, leaving)):
            linear = layer.get_submodule(path)
            layer.set_submodule(path, _linear(linear, linear.in_features, outputs, bias=linear.bias is not None))
        layer.attention_adapter = _linear(linear, width, width, bias=False)
        layer.mlp_adapter = _linear(linear, width, leaving, bias=False)
        for name in NORMS:
            setattr(layer, name, SlicedNorm(getattr(layer, name), channels))
        layer.__class__ = _sliced_class(cast(Hashable, type(layer)))
    embeddings = base.get_input_embeddings()  # in place: some families' scale what they put out
    embeddings.embedding_dim = widths[0]
    embeddings.weight = nn.Parameter(embeddings.weight.new_empty(embeddings.num_embeddings, widths[0]))


def _linear(like: nn.Linear, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """An uninitialised linear map."""
    return nn.Linear(inputs, outputs, bias=bias, device=like.weight.device, dtype=like.weight.dtype)
