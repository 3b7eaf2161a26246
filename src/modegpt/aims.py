"""From what a compressed model may take to the share of parameters that has to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from transformers import PreTrainedModel

from .budget import LayerGeometry
from .config import CompressionConfig
from .errors import InvalidRequest
from .families import model_geometry
from .methods import METHODS
from .tied import tied_step

_Config = TypeVar("_Config", bound=CompressionConfig)
#: Bytes of the index of a rotary pair, which checkpoints keep beside the weights.
_INDEX_BYTES = 8


def _pairs(layer: LayerGeometry) -> int:
    """At most so many rotary pairs of a head are stored, whatever is removed."""
    if layer.dense is None:
        return layer.modules["qk"].full if "qk" in layer.modules else 0
    return layer.dense.qk_head_dim // 2


def _step(layers: Sequence[LayerGeometry], config: CompressionConfig, model: PreTrainedModel) -> int:
    """Ranks are whole numbers, and a budget is met within half of these parameters: a step of the finest module."""
    if config.profile != "full":
        return tied_step(layers, config, model.config)
    chosen = [layers[index].modules[name] for index in config.chosen_layers(len(layers)) for name in config.modules]
    return min(filter(None, (module.largest_step(config.alignment) for module in chosen)), default=0)


def with_ratio(config: _Config, model: PreTrainedModel, item: int) -> _Config:
    """``config`` with the ratio that brings ``model`` down to its target; as it is if it has a ratio or none follows.

    ``model`` may be on the meta device; ``item`` is the size of a parameter in bytes. Raises :class:`InvalidRequest`
    for targets that the model meets already or that are smaller than what is not compressed.
    """
    if config.target_parameters is None and config.target_size is None:
        return config
    layers = model_geometry(model, METHODS[config.method].from_config(config).geometry)
    if "stream" in METHODS[config.method].modules:
        option = "--target-size" if config.target_parameters is None else "--target-parameters"
        raise InvalidRequest(f"{option}: --method {config.method} resizes the embeddings too; give --ratio")
    blocks = sum(layer.parameters for layer in layers)
    everything = sum(parameter.numel() for parameter in model.parameters())
    if config.target_parameters is not None:
        option, wanted, dense, unit = "--target-parameters", config.target_parameters, everything, "parameters"
        allowed = wanted
    else:
        assert config.target_size is not None
        groups = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        pairs = sum(groups * _pairs(layer) for layer in layers)
        option, wanted, dense, unit = "--target-size", config.target_size, everything * item, "bytes"
        allowed = (wanted - _INDEX_BYTES * pairs) // item
    ratio = (everything - allowed + _step(layers, config, model) / 2) / blocks
    if not 0 < ratio < 1:
        problem = "the model has that already" if ratio <= 0 else "embeddings, head and norms alone take more"
        raise InvalidRequest(
            f"{option} {wanted:,}: {problem}; the model has {dense:,} {unit}, "
            f"{(everything - blocks) * (1 if unit == 'parameters' else item):,} of them outside its decoder blocks"
        )
    return config.model_copy(update={"ratio": ratio})
