"""The parts of a stock model, found through its family's description."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .budget import LayerGeometry, layer_geometry
from .errors import InvalidRequest
from .modeling import FAMILIES, CompressedFamily

#: ``model_type`` of every compressed family.
COMPRESSED_TYPES = frozenset(family.config.model_type for family in FAMILIES.values())


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a config whose family has no description."""
    if config.model_type in COMPRESSED_TYPES:
        raise InvalidRequest("MODEL is already compressed; start from the dense model")
    if config.model_type not in FAMILIES:
        raise InvalidRequest(
            f"model family {config.model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidRequest("MODEL is quantised; start from the model in float32, bfloat16 or float16")


def check_model(model: PreTrainedModel, *, loaded: bool = True) -> None:
    """Refuse what is not a supported family's own, unwrapped and unquantised causal language model.

    Code of another class may compute something else with the same weights, and a quantised or wrapped
    map does not show the weights it multiplies with. Weights on the meta device are refused if ``loaded``.
    """
    check_family(model.config)
    family = family_of(model)
    if type(model) is not family.stock:
        raise InvalidRequest(f"the model is a {type(model).__name__}; use a plain {family.stock.__name__}")
    description = family.description
    maps = [f"{description.attention}.{name}" for name in description.attention_maps]
    for index, layer in enumerate(decoder_layers(model, family)):
        for path in (*maps, *description.mlp_inputs, description.mlp_output):
            linear = layer.get_submodule(path)
            weight = getattr(linear, "weight", None)
            if type(linear) is not nn.Linear or weight is None or not weight.is_floating_point() or weight.itemsize < 2:
                raise InvalidRequest(
                    f"layer {index}: {path} is not a plain linear map in at least 16 bits; "
                    "start from the unquantised model without adapters"
                )
            if loaded and weight.is_meta:
                raise InvalidRequest(f"layer {index}: the weights of {path} are not loaded (meta device)")


def family_of(model: PreTrainedModel) -> CompressedFamily:
    """The description of a stock model's family."""
    return FAMILIES[model.config.model_type]


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without its head."""
    base = model.base_model
    assert isinstance(base, PreTrainedModel)
    return base


def decoder_layers(model: PreTrainedModel, family: CompressedFamily) -> list[nn.Module]:
    """The decoder layers of a causal language model."""
    layers = base_model(model).get_submodule(family.description.layers)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def model_geometry(model: PreTrainedModel) -> list[LayerGeometry]:
    """Parameter counts of every decoder layer of a stock model (which may be on the meta device)."""
    family = family_of(model)
    return [layer_geometry(layer, model.config, family.description) for layer in decoder_layers(model, family)]
