"""A stock Transformers decoder with smaller modules inside: the runtime of a compressed model.

This file, the five that it imports and the family file travel with every checkpoint (``auto_map``), so they import
nothing but torch and Transformers. Nothing of the stock model is copied: the decoder, its norms, its
masks, its rotary embedding and its head stay Transformers' own code. Only the linear maps become
thinner, and attention learns that queries and keys may be narrower than, or as wide as, values.

Notation for shapes
    B batch, T query length, S key length, d hidden size, H query heads, G key-value heads,
    h original head size, r kept rotary pairs, d_qk query and key head size (2r with rotary), d_v value head size.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.pytorch_utils import Conv1D

from .modeling_description import Family, described
from .modeling_factors import factorise
from .modeling_norm import CompactNorm
from .modeling_sizes import LayerSizes, head_counts, layer_sizes, stock_config
from .modeling_slices import slice_stream

#: What the ``model_type`` of a compressed model begins with.
COMPRESSED = "modegpt_"
#: Attention kernels that take keys and values of different head size as they are.
_ANY_HEAD_SIZE = frozenset({"eager", "flex_attention"})


class CompactAttention(nn.Module):
    """Attention with ``d_qk``-wide queries and keys and ``d_v``-wide values.

    softmax(rho(x W_q) rho(x W_k)^T / sqrt(h)) x W_v W_o, per head. ``rho`` is the family's query and key norm, if
    it has one, and its rotary embedding of the kept pairs (``rotary_pairs``, one list per key-value head). The
    scale stays that of the original head size h.
    """

    #: Used when the attention implementation is "eager"; a family's own where it has one.
    eager_attention = staticmethod(eager_attention_forward)

    def __init__(self, dense: Any, config: PreTrainedConfig, family: Family, sizes: LayerSizes) -> None:
        """Take over everything but the weights from the stock attention module ``dense``."""
        nn.Module.__init__(self)  # a family's subclass is also the stock attention, which would build dense weights
        # The model's own config, not a copy: set_attn_implementation changes it in place.
        self.config = config
        self.layer_idx: int = dense.layer_idx
        self.is_causal: bool = dense.is_causal
        self.scaling: float = dense.scaling
        own = getattr(dense, "attention_dropout", None)
        self.attention_dropout: float = getattr(config, family.dropout) if own is None else own
        self.sliding_window: int | None = getattr(dense, "sliding_window", None)
        if family.sliding_window:
            self.sliding_window = getattr(config, family.sliding_window)
        self.softcap: float | None = getattr(config, family.softcap) if family.softcap else None
        self.output_dropout: float = getattr(config, family.output_dropout) if family.output_dropout else 0.0
        self.qk_head_dim, self.v_head_dim = sizes.qk_head_dim, sizes.v_head_dim

        dense_counts = head_counts(config)
        self.num_key_value_groups = dense_counts[0] // dense_counts[1]
        groups = sizes.kv_heads or dense_counts[1]
        heads = groups * self.num_key_value_groups
        maps = [getattr(dense, name) for name in family.input_maps]
        query, key, value, output = maps[0], maps[len(maps) // 2], maps[-1], getattr(dense, family.output)
        self.rope_head_dim = features(output)[0] // dense_counts[0]
        self.head_dim = sizes.head_dim(self.rope_head_dim)
        # A value bias goes through to the output.
        biased = sizes.output_biases or output.bias is not None or value.bias is not None
        hidden = features(query)[0]
        #: The first factor that queries and keys share, if they do.
        self.shared_input: nn.Linear | None = None
        self.q_proj = _linear(query, hidden, heads * self.qk_head_dim, bias=query.bias is not None)
        self.k_proj = _linear(key, hidden, groups * self.qk_head_dim, bias=key.bias is not None)
        self.v_proj = _linear(value, hidden, groups * self.v_head_dim, bias=False)
        self.o_proj = _linear(output, heads * self.v_head_dim, features(output)[1], bias=biased)
        norms = (getattr(dense, name, None) if name else None for name in family.norms)
        self.q_norm, self.k_norm = (
            norm
            if norm is None
            else CompactNorm(count, self.qk_head_dim, norm, (dense_count, self.rope_head_dim), family.norm_offset)
            for norm, count, dense_count in zip(norms, (heads, groups), dense_counts, strict=True)
        )
        self.angles = family.angles
        self.rotary_pairs: torch.Tensor | None
        # Integers survive a cast of the model to bfloat16; frequencies would not. Not on the weights' device: some
        # engines build these on the meta device, and buffers on a real one.
        pairs = _first_pairs(groups, self.qk_head_dim // 2)
        self.register_buffer("rotary_pairs", None if family.rotary is None else pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, d) to (B, T, d), and the attention weights (B, H, T, S) where the implementation returns them."""
        shape = hidden_states.shape[:-1]  # (B, T)
        # Engines that fuse maps by their source take the three for heads of one size; a name of their own keeps queries
        # and keys apart from values.
        shared = hidden_states if self.shared_input is None else self.shared_input(hidden_states)
        query = self.q_proj(shared).view(*shape, -1, self.qk_head_dim)
        key = self.k_proj(shared).view(*shape, -1, self.qk_head_dim)
        self._check_heads(key.shape[-2])
        query, key = (x if norm is None else norm(x) for x, norm in ((query, self.q_norm), (key, self.k_norm)))
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, T, d_qk), (B, G, T, d_qk)
        value = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)  # (B, G, T, d_v)

        if self.rotary_pairs is not None:
            assert position_embeddings is not None
            query, key = self._rotate(query, key, self.rotary_pairs, *position_embeddings)
        keys_and_values = past_key_values if layer_past is None else layer_past
        if keys_and_values is not None:
            key, value = keys_and_values.update(key, value, self.layer_idx)
        if self._decodes(query, attention_mask):
            return self.o_proj(self._decode(query, key, value, attention_mask)), None
        if (size := self._one_head_size()) is not None:
            query, key, value = (nn.functional.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value.contiguous(),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            **kwargs,
        )
        output = output.reshape(*shape, query.shape[1], -1)[..., : self.v_head_dim]  # (B, T, H, d_v)
        output = self.o_proj(output.flatten(-2))
        return nn.functional.dropout(output, self.output_dropout, self.training), weights

    def _check_heads(self, count: int) -> None:
        """Raise ``NotImplementedError`` where there are not the key-value heads that the rotary pairs are of."""
        if self.rotary_pairs is not None and count != len(self.rotary_pairs):
            raise NotImplementedError(
                f"{count} of {len(self.rotary_pairs)} key-value heads: every one has rotary pairs of its own, so they "
                "cannot be shared out by tensor parallelism; keep layers whole"
            )

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the pairs ``kept`` (G, r). ``cos`` and ``sin`` are (B or 1, T, channels that rotate).

        They have each angle twice. Pairs of channels that do not rotate have the index after the last angle.
        """
        groups, pairs = kept.shape
        angles = []
        for table, still in ((cos, 1.0), (sin, 0.0)):
            once = table[..., ::2] if self.angles == "neighbours" else table[..., : table.shape[-1] // 2]
            if table.shape[-1] < self.rope_head_dim:
                once = nn.functional.pad(once, (0, 1), value=still)
            chosen = once.index_select(-1, kept.flatten()).unflatten(-1, (groups, pairs))
            angles.append(chosen.transpose(1, 2))  # (B or 1, G, T, r)
        query = query.unflatten(1, (groups, -1))  # (B, G, H / G, T, d_qk)
        query = _rotate_pairs(query, *(angle.unsqueeze(2) for angle in angles)).flatten(1, 2)
        return query, _rotate_pairs(key, *angles)

    def _decodes(self, query: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether this is one token of every sequence, with the attention that PyTorch brings along."""
        if self.config._attn_implementation != "sdpa" or self.training or torch.compiler.is_exporting():
            return False  # an exported graph is for any number of tokens
        return query.shape[2] == 1 and (mask is None or mask.shape[1] == 1)

    def _decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, 1, H d_v): the queries of a key-value head at once, so that keys and values are not copied for each."""
        query = query.reshape(query.shape[0], key.shape[1], -1, self.qk_head_dim)  # (B, G, H / G, d_qk)
        output = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=self.scaling)
        return output.reshape(output.shape[0], 1, -1)

    def _one_head_size(self) -> int | None:
        """Fused kernels want q, k and v of one size, filled up with zeros; None where they can stay as they are."""
        implementation = self.config._attn_implementation
        if implementation in _ANY_HEAD_SIZE or self.qk_head_dim == self.v_head_dim == self.head_dim:
            return None
        if implementation != "sdpa":
            return self.head_dim
        widest = -(-max(self.qk_head_dim, self.v_head_dim) // 8) * 8
        return None if self.qk_head_dim == self.v_head_dim == widest else widest


@cache
def _attention_class(stock: Any) -> Any:
    """Compressed attention that Transformers still recognises as the family's."""
    eager = getattr(sys.modules[stock.__module__], "eager_attention_forward", eager_attention_forward)
    return type(f"ModeGPT{stock.__name__}", (CompactAttention, stock), {"eager_attention": staticmethod(eager)})


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), the halves of the last axis holding the pairs' two channels."""
    first, second = x.chunk(2, dim=-1)  # some families have their tables in float32 for any dtype
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _first_pairs(groups: int, pairs: int) -> torch.Tensor:
    return torch.arange(pairs).repeat(groups, 1)


def features(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    if isinstance(linear, Conv1D):
        inputs, outputs = linear.weight.shape
        return inputs, outputs
    return linear.in_features, linear.out_features


def _linear(like: Any, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """An uninitialised linear map."""
    return nn.Linear(inputs, outputs, bias=bias, device=like.weight.device, dtype=like.weight.dtype)


def shrink(base: PreTrainedModel, config: PreTrainedConfig, family: Family) -> None:
    """Replace the modules of a stock base model by ones of the widths ``config`` gives for each layer.

    Raises ``ValueError`` naming the layer and field when a width or rank is larger than the dense model's.
    """
    layers: Any = base.get_submodule(family.layers)
    every = layer_sizes(config)
    for index, (layer, sizes) in enumerate(zip(layers, every, strict=True)):
        stock: Any = layer.get_submodule(family.attention)
        full = features(getattr(stock, family.output))[0] // head_counts(config)[0]
        for name, limit in (
            ("intermediate_size", _intermediate_size(layer, family)),
            ("qk_head_dim", full),
            ("v_head_dim", full),
        ):
            if getattr(sizes, name) > limit:
                raise ValueError(f"per_layer_config[{index}].{name} is {getattr(sizes, name)}; it is at most {limit}")
        if family.rotary and sizes.qk_head_dim % 2:
            raise ValueError(f"per_layer_config[{index}].qk_head_dim must be even: rotary channels go in pairs")
        attention_class = _attention_class(cast(Hashable, type(stock)))
        layer.set_submodule(family.attention, attention_class(stock, config, family, sizes))
        if sizes.output_biases and has_experts(layer, family):
            raise ValueError(f"per_layer_config[{index}].output_biases: experts have none")
        _shrink_mlp(layer, config, family, sizes)
        try:
            factorise(layer, factor_stacks(family, dense_mlp=not has_experts(layer, family)), sizes.factor_ranks or {})
        except ValueError as error:
            raise ValueError(f"per_layer_config[{index}].factor_ranks: {error}") from error
    widths = [sizes.stream_width for sizes in every if sizes.stream_width is not None]
    if widths:
        slice_stream(base, family, widths, config.hidden_size)


def factor_stacks(family: Family, *, dense_mlp: bool = True) -> dict[str, tuple[str, ...]]:
    """The linear maps of a compressed layer that can be two thin ones, by name, and their paths in the layer.

    Each one by itself; or queries with keys, and gate with up, which then share the first factor.
    """
    attention = [f"{family.attention}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    mlp = [*family.mlp_inputs, family.mlp_output] if dense_mlp else []
    stacks = [(path,) for path in (*attention, *mlp)] + [tuple(attention[:2])]
    if dense_mlp and len(family.mlp_inputs) > 1:
        stacks.append(family.mlp_inputs)
    return {stack_name(paths): paths for paths in stacks}


def stack_name(paths: Sequence[str]) -> str:
    """What maps with these ``paths`` in a layer are called where they are factorised together."""
    return "+".join(path.rpartition(".")[2] for path in paths)


def has_experts(layer: Any, family: Family) -> bool:
    """Whether a layer has experts in place of its MLP."""
    if family.experts is None:
        return False
    owner, _, leaf = family.experts.rpartition(".")
    return hasattr(layer.get_submodule(owner), leaf)


def _intermediate_size(layer: Any, family: Family) -> int:
    if has_experts(layer, family):
        return int(layer.get_submodule(family.experts).down_proj.shape[-1])
    return features(layer.get_submodule(family.mlp_output))[0]


def _shrink_mlp(layer: Any, config: PreTrainedConfig, family: Family, sizes: LayerSizes) -> None:
    full, width = _intermediate_size(layer, family), sizes.intermediate_size
    if has_experts(layer, family):
        experts = layer.get_submodule(family.experts)
        count, _, hidden = experts.gate_up_proj.shape
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.new_empty(count, 2 * width, hidden))
        experts.down_proj = nn.Parameter(experts.down_proj.new_empty(count, hidden, width))
        experts.intermediate_dim = width
        experts.config = config  # it says which kernel multiplies with them
        return
    for path in family.mlp_inputs:
        linear = layer.get_submodule(path)
        inputs, outputs = features(linear)
        layer.set_submodule(path, _linear(linear, inputs, outputs // full * width, bias=linear.bias is not None))
    linear = layer.get_submodule(family.mlp_output)
    biased = sizes.output_biases or linear.bias is not None
    layer.set_submodule(family.mlp_output, _linear(linear, width, features(linear)[1], bias=biased))


class CompactModel:
    """Mixin before a stock model class: builds the stock model, then makes it smaller.

    The stock constructor sees the dense view of the config; afterwards every model object holds the
    real one, so that a change of attention implementation reaches all layers. The rotary embedding
    keeps the dense view: its frequencies are those of the original head size.
    """

    family: Family

    def __init__(self, config: PreTrainedConfig) -> None:
        dense = stock_config(config)
        super().__init__(dense)  # type: ignore[call-arg]
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            setattr(config, name, getattr(dense, name, None))
        for model in self.modules():  # type: ignore[attr-defined]
            if isinstance(model, PreTrainedModel):
                model.config = config
        shrink(self.base_model, config, self.family_of(config))  # type: ignore[attr-defined]

    @classmethod
    def family_of(cls, config: Any) -> Family:
        """The description that ``config`` goes by."""
        return cls.family

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.family.causal_lm._can_set_experts_implementation()  # judges by the source of the class's file

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, CompactNorm):
            module.reset()
        if isinstance(module, CompactAttention) and module.rotary_pairs is not None:
            groups, pairs = module.rotary_pairs.shape
            init.copy_(module.rotary_pairs, _first_pairs(groups, pairs).to(module.rotary_pairs.device))


def compressed_classes(family: Family, module: str, *, by_config: bool = False) -> tuple[Any, Any, Any]:
    """The config, base model and causal language model of a family's compressed form, as classes of ``module``.

    ``save_pretrained`` copies the file of that module and this one beside the weights. If ``by_config``, configs
    have the description in ``compressed_family``.
    """
    values: dict[str, Any] = {"family": family}
    if family.softcap:  # which SDPA kernels leave out without a word
        values["_supports_sdpa"] = False
    if by_config:
        values["family_of"] = classmethod(lambda _, config: described(family, config.compressed_family))

    def derived(stock: type, *mixins: type, **values: Any) -> Any:
        return type(f"ModeGPT{stock.__name__}", (*mixins, stock), {"__module__": module, **values})

    stock_config_class: Any = family.causal_lm.config_class

    def validate(config: Any) -> None:  # rules read what differs between layers, which configs refuse
        stock_config_class.validate(stock_config(config))

    config = derived(stock_config_class, model_type=COMPRESSED + family.model_type, validate=validate)
    base, causal_lm = (
        derived(stock, CompactModel, config_class=config, **values) for stock in (family.base, family.causal_lm)
    )
    config.register_for_auto_class()
    base.register_for_auto_class("AutoModel")
    causal_lm.register_for_auto_class("AutoModelForCausalLM")
    return config, base, causal_lm
