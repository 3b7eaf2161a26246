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
