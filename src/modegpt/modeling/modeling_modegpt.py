"""A stock Transformers decoder with smaller modules inside: the runtime of a compressed model.

This file and the family file beside it travel with every checkpoint (``auto_map``), so they import
nothing but torch and Transformers. Nothing of the stock model is copied: the decoder, its norms, its
masks, its rotary embedding and its head stay Transformers' own code. Only the linear maps become
thinner, and attention learns that queries and keys may be narrower than, or as wide as, values.

Notation for shapes
    B batch, T query length, S key length, d hidden size, H query heads, G key-value heads,
    h original head size, r kept rotary pairs, d_qk = 2r, d_v value head size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

#: Attention kernels that take keys and values of different head size as they are.
_ANY_HEAD_SIZE = frozenset({"eager", "flex_attention"})


@dataclass(frozen=True)
class Family:
    """Where a family of decoders keeps the parts that are compressed.

    Paths are relative to one decoder layer, except ``layers``, which is relative to the base model.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    #: The maps into the intermediate space; several of them (gate and up) share one selection.
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    #: The module whose input is the residual stream between attention and MLP.
    middle: str = "post_attention_layernorm"

    @property
    def attention_maps(self) -> tuple[str, str, str, str]:
        """The names of the four linear maps inside the attention module."""
        return self.query, self.key, self.value, self.output


@dataclass(frozen=True)
class LayerSizes:
    """The widths of one compressed decoder layer, as ``config.json`` keeps them per layer."""

    intermediate_size: int
    qk_head_dim: int
    v_head_dim: int

    @property
    def head_dim(self) -> int:
        """The one head size a kernel or serving engine needs when it cannot take two."""
        return max(self.qk_head_dim, self.v_head_dim)

    def to_config(self) -> dict[str, int]:
        """The entry of ``per_layer_config`` for this layer."""
        return {
            "intermediate_size": self.intermediate_size,
            "head_dim": self.head_dim,
            "qk_head_dim": self.qk_head_dim,
            "v_head_dim": self.v_head_dim,
        }


def layer_sizes(config: PreTrainedConfig) -> list[LayerSizes]:
    """Read and check the widths of every layer of a compressed model's ``config``.

    Raises ``ValueError`` naming the layer and field when a width is missing, not a positive integer,
    or larger than the dense model's.
    """
    dense = stock_config(config)
    limits = {
        "intermediate_size": dense.intermediate_size,
        "qk_head_dim": dense.head_dim,
        "v_head_dim": dense.head_dim,
    }
    sizes = []
    for index, layer in enumerate(config.per_layer_config):
        values: dict[str, int] = {}
        for name, limit in limits.items():
            value = getattr(layer, name, None)
            if type(value) is not int or not 0 < value <= limit:
                raise ValueError(
                    f"per_layer_config[{index}].{name} is {value!r}; expected an integer from 1 to {limit}"
                )
            values[name] = value
        if values["qk_head_dim"] % 2:
            raise ValueError(f"per_layer_config[{index}].qk_head_dim must be even: rotary channels go in pairs")
        sizes.append(LayerSizes(**values))
    return sizes


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The dense model's view of ``config``: the same values without the per-layer overrides.

    Stock code reads ``head_dim`` and ``intermediate_size`` from the global config, which Transformers
    refuses once they differ between layers.
    """
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


class CompactAttention(nn.Module):
    """Attention with ``d_qk``-wide queries and keys and ``d_v``-wide values.

    softmax(rho(x W_q) rho(x W_k)^T / sqrt(h)) x W_v W_o, per head. ``rho`` rotates the kept pairs of
    the original rotary embedding (``rotary_pairs``, one list per key-value head), and ``1 / sqrt(h)``
    stays that of the original head size ``h``.
    """

    #: Used when the attention implementation is "eager"; a family with its own overrides it.
    eager_attention = staticmethod(eager_attention_forward)

    def __init__(self, dense: Any, config: PreTrainedConfig, family: Family, sizes: LayerSizes) -> None:
        """Take over everything but the weights from the stock attention module ``dense``."""
        nn.Module.__init__(self)  # a family's subclass is also the stock attention, which would build dense weights
        # The model's own config, not a copy: set_attn_implementation changes it in place.
        self.config = config
        self.layer_idx: int = dense.layer_idx
        self.is_causal: bool = dense.is_causal
        self.scaling: float = dense.scaling
        self.attention_dropout: float = dense.attention_dropout
        self.num_key_value_groups: int = dense.num_key_value_groups
        self.qk_head_dim, self.v_head_dim, self.head_dim = sizes.qk_head_dim, sizes.v_head_dim, sizes.head_dim

        heads, groups = config.num_attention_heads, config.num_key_value_heads
        query, key, value, output = (getattr(dense, name) for name in family.attention_maps)
        self.q_proj = _linear_like(query, out_features=heads * self.qk_head_dim)
        self.k_proj = _linear_like(key, out_features=groups * self.qk_head_dim)
        self.v_proj = _linear_like(value, out_features=groups * self.v_head_dim)
        self.o_proj = _linear_like(output, in_features=heads * self.v_head_dim)
        self.rotary_pairs: torch.Tensor
        # Integers survive a cast of the model to bfloat16; frequencies would not.
        self.register_buffer("rotary_pairs", _first_pairs(groups, self.qk_head_dim // 2, self.q_proj.weight.device))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, d) to (B, T, d), and the attention weights (B, H, T, S) where the implementation returns them."""
        shape = hidden_states.shape[:-1]  # (B, T)
        query = self.q_proj(hidden_states).view(*shape, -1, self.qk_head_dim).transpose(1, 2)  # (B, H, T, d_qk)
        key = self.k_proj(hidden_states).view(*shape, -1, self.qk_head_dim).transpose(1, 2)  # (B, G, T, d_qk)
        value = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)  # (B, G, T, d_v)

        query, key = self._rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self._needs_one_head_size(query.shape[2]):
            query, key, value = (nn.functional.pad(x, (0, self.head_dim - x.shape[-1])) for x in (query, key, value))

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value.contiguous(),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*shape, query.shape[1], -1)[..., : self.v_head_dim]  # (B, T, H, d_v)
        return self.o_proj(output.flatten(-2)), weights

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the kept pairs. ``cos`` and ``sin`` are (B or 1, T, h) and repeat their first half."""
        groups, pairs = self.rotary_pairs.shape
        angles = []
        for table in (cos, sin):
            kept = table.index_select(-1, self.rotary_pairs.flatten()).unflatten(-1, (groups, pairs))
            angles.append(kept.transpose(1, 2))  # (B or 1, G, T, r)
        query = query.unflatten(1, (groups, -1))  # (B, G, H / G, T, d_qk)
        query = _rotate_pairs(query, *(angle.unsqueeze(2) for angle in angles)).flatten(1, 2)
        return query, _rotate_pairs(key, *angles)

    def _needs_one_head_size(self, query_length: int) -> bool:
        """Fused kernels want q, k and v of one size; zeros change nothing. SDPA copes by itself when decoding."""
        if self.qk_head_dim == self.v_head_dim == self.head_dim:
            return False
        implementation = self.config._attn_implementation
        return implementation not in _ANY_HEAD_SIZE and not (implementation == "sdpa" and query_length == 1)


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), the halves of the last axis holding the pairs' two channels."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _first_pairs(groups: int, pairs: int, device: torch.device) -> torch.Tensor:
    return torch.arange(pairs, device=device).repeat(groups, 1)


def _linear_like(linear: nn.Linear, *, in_features: int | None = None, out_features: int | None = None) -> nn.Linear:
    """An uninitialised linear map like ``linear``, of another width."""
    return nn.Linear(
        linear.in_features if in_features is None else in_features,
        linear.out_features if out_features is None else out_features,
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )


def shrink(
    base: PreTrainedModel, config: PreTrainedConfig, family: Family, attention_class: type[CompactAttention]
) -> None:
    """Replace the modules of a stock base model by ones of the widths ``config`` gives for each layer."""
    layers: Any = base.get_submodule(family.layers)
    for layer, sizes in zip(layers, layer_sizes(config), strict=True):
        attention = attention_class(layer.get_submodule(family.attention), config, family, sizes)
        layer.set_submodule(family.attention, attention)
        for path in family.mlp_inputs:
            layer.set_submodule(path, _linear_like(layer.get_submodule(path), out_features=sizes.intermediate_size))
        output = _linear_like(layer.get_submodule(family.mlp_output), in_features=sizes.intermediate_size)
        layer.set_submodule(family.mlp_output, output)


class CompactModel:
    """Mixin before a stock model class: builds the stock model, then makes it smaller.

    The stock constructor sees the dense view of the config; afterwards every model object holds the
    real one, so that a change of attention implementation reaches all layers. The rotary embedding
    keeps the dense view: its frequencies are those of the original head size.
    """

    family: Family
    attention_class: type[CompactAttention]

    def __init__(self, config: PreTrainedConfig) -> None:
        dense = stock_config(config)
        super().__init__(dense)  # type: ignore[call-arg]
        config._attn_implementation_internal = dense._attn_implementation_internal
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]  # type: ignore[attr-defined]
        for model in models:
            model.config = config
        shrink(models[-1], config, self.family, self.attention_class)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, CompactAttention):
            groups, pairs = module.rotary_pairs.shape
            init.copy_(module.rotary_pairs, _first_pairs(groups, pairs, module.rotary_pairs.device))
