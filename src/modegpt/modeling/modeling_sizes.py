"""The widths of compressed layers: a part of the runtime of a compressed model, see ``modeling_modegpt.py``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

#: Head sizes that attention kernels and serving engines have.
SERVED = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True)
class LayerSizes:
    """The widths of one compressed decoder layer, as ``config.json`` keeps them per layer."""

    intermediate_size: int
    """Of the MLP, or of each expert."""
    qk_head_dim: int
    v_head_dim: int
    kv_heads: int | None = None
    """Key-value heads, each with its query heads, where they can be fewer than the dense model's."""
    output_biases: bool = False
    """Whether attention and MLP have a bias at their output even if the family has none."""
    factor_ranks: Mapping[str, int] | None = None
    """Of the maps that are two thin ones, by the names of :func:`factor_stacks`; None where no layer has any."""
    stream_width: int | None = None
    """Directions of the residual stream that the layer reads, see ``modeling_slices.py``; given for all or none."""

    def head_dim(self, dense: int) -> int:
        """The one head size for kernels and engines that cannot take two: one they have, or the ``dense`` model's."""
        widest = max(self.qk_head_dim, self.v_head_dim)
        return min((size for size in (*SERVED, dense) if size >= widest), default=dense)

    def to_config(self, dense: int, per_group: int) -> dict[str, Any]:
        """The entry of ``per_layer_config`` for this layer of a model whose ``dense`` heads have so many channels.

        There are ``per_group`` query heads to a key-value head.
        """
        optional = {
            "num_attention_heads": None if self.kv_heads is None else self.kv_heads * per_group,
            "num_key_value_heads": self.kv_heads,
            "output_biases": self.output_biases or None,
            "factor_ranks": None if self.factor_ranks is None else dict(self.factor_ranks),
            "stream_width": self.stream_width,
        }
        return {
            "intermediate_size": self.intermediate_size,
            "head_dim": self.head_dim(dense),
            "qk_head_dim": self.qk_head_dim,
            "v_head_dim": self.v_head_dim,
            **{name: value for name, value in optional.items() if value is not None},
        }


def layer_sizes(config: PreTrainedConfig) -> list[LayerSizes]:
    """Read the widths of every layer of a compressed model's ``config``.

    Raises ``ValueError`` naming the layer and field when a width is missing or not a positive integer, and when there
    are more key-value heads than in the dense model.
    """
    sizes = []
    for index, layer in enumerate(config.per_layer_config):
        values: dict[str, Any] = {
            name: getattr(layer, name, None) for name in ("intermediate_size", "qk_head_dim", "v_head_dim")
        }
        factors = getattr(layer, "factor_ranks", None)
        if not isinstance(factors, dict | None):
            raise ValueError(f"per_layer_config[{index}].factor_ranks is {factors!r}; expected ranks by name")
        named = {f"factor_ranks[{name!r}]": rank for name, rank in (factors or {}).items()}
        for name, value in (values | named).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"per_layer_config[{index}].{name} is {value!r}; expected a positive integer")
        kv_heads, biases = _kv_heads(config, index, layer), getattr(layer, "output_biases", False)
        if type(biases) is not bool:
            raise ValueError(f"per_layer_config[{index}].output_biases is {biases!r}; expected true or false")
        stream = _stream_width(config, index, layer)
        sizes.append(
            LayerSizes(**values, kv_heads=kv_heads, output_biases=biases, factor_ranks=factors, stream_width=stream)
        )
    without = [index for index, layer in enumerate(sizes) if layer.stream_width is None]
    if 0 < len(without) < len(sizes):
        raise ValueError(f"per_layer_config[{without[0]}].stream_width is missing; others have it")
    return sizes


def _kv_heads(config: PreTrainedConfig, index: int, layer: PreTrainedConfig) -> int | None:
    """Those of a layer, if it has not all of them."""
    heads, groups = head_counts(config)
    own, kv_heads = head_counts(layer)
    if type(kv_heads) is not int or not 1 <= kv_heads <= groups:
        raise ValueError(f"per_layer_config[{index}].num_key_value_heads is {kv_heads!r}; expected 1 to {groups}")
    if type(own) is not int or own * groups != kv_heads * heads:
        expected = kv_heads * heads // groups
        raise ValueError(f"per_layer_config[{index}].num_attention_heads is {own!r}; expected {expected}")
    return None if kv_heads == groups else kv_heads


def _stream_width(config: PreTrainedConfig, index: int, layer: Any) -> int | None:
    """That of a layer, if it has one."""
    width = getattr(layer, "stream_width", None)
    if width is None:
        return None
    channels: Any = config.hidden_size
    if type(width) is not int or not 1 <= width <= channels:
        raise ValueError(f"per_layer_config[{index}].stream_width is {width!r}; expected 1 to {channels}")
    if getattr(layer, "factor_ranks", None):
        raise ValueError(f"per_layer_config[{index}].stream_width: not together with factor_ranks")
    return width


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The dense model's view of ``config``: the same values without the per-layer overrides.

    Stock code reads ``head_dim`` and ``intermediate_size`` from the global config, which Transformers
    refuses once they differ between layers.
    """
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


def head_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """H query heads and G key-value heads of the dense model, or of one layer where ``config`` is that of one."""
    dense: Any = stock_config(config)
    heads = dense.num_attention_heads
    groups = getattr(dense, "num_key_value_heads", None)
    return heads, heads if groups is None else groups
