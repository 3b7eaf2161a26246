"""The parts of a stock model, found through its family's description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .budget import LayerGeometry, layer_geometry
from .errors import InvalidRequest
from .modeling import FAMILIES, CompressedFamily, Family, has_experts, is_compressed

#: Which layers of a model with experts have none, by their numbers.
_WITHOUT_EXPERTS = "mlp_only_layers"
#: The parts of a layer as a method sees them, see :meth:`modegpt.methods.Method.geometry`.
GeometryOf = Callable[[nn.Module, PreTrainedConfig, Family], LayerGeometry]


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a config whose family has no description and cannot be inferred."""
    if is_compressed(config.model_type):
        raise InvalidRequest("MODEL is already compressed; start from the dense model")
    text: Any = getattr(config, "text_config", None)
    if text is not None:
        raise InvalidRequest(
            f"MODEL ({config.model_type!r}) does not read text alone; use a text-only checkpoint of its language model"
            f" ({text.model_type!r})"
        )
    known = FAMILIES.get(config.model_type)
    if known is None or known.inferred:  # from another config, perhaps
        from .inference import infer_family  # which runs what checks its models here

        if infer_family(config) is None:
            raise InvalidRequest(
                f"model family {config.model_type!r} is not supported, and its code is unlike that of the supported "
                f"ones: {', '.join(row[0] for row in family_rows()[1:])}; docs/families.md says how to add one"
            )
    for name, value in FAMILIES[config.model_type].description.requires.items():
        if getattr(config, name) != value:
            raise InvalidRequest(f"MODEL has {name} = {getattr(config, name)!r}; only {value!r} is supported")
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidRequest("MODEL is quantised; start from the model in float32, bfloat16 or float16")


def family_rows() -> list[tuple[str, str, str]]:
    """The supported families, from their descriptions: model type, models, and what is special; the head first."""
    head = ("model type", "models", "special")
    known = (family.description for family in FAMILIES.values() if not family.inferred)
    return [head, *((one.model_type, one.covers, one.special) for one in known)]


def check_model(model: PreTrainedModel, *, loaded: bool = True) -> None:
    """Refuse what is not a supported family's own, unwrapped and unquantised causal language model.

    Code of another class may compute something else with the same weights, and a quantised or wrapped
    map does not show the weights it multiplies with. Weights on the meta device are refused if ``loaded``.
    """
    check_family(model.config)
    family = family_of(model)
    if type(model) is not family.stock:
        raise InvalidRequest(f"the model is a {type(model).__name__}; use a plain {family.stock.__name__}")
    for index, layer in enumerate(decoder_layers(model, family)):
        problem = _problem(layer, family.description, loaded)
        if problem is not None:
            raise InvalidRequest(f"layer {index}: {problem}")


def _problem(layer: nn.Module, family: Family, loaded: bool) -> str | None:
    """What is unlike a stock layer of the family, if anything is."""
    maps = [f"{family.attention}.{name}" for name in (*family.input_maps, family.output)]
    if not has_experts(layer, family):
        maps += [*family.mlp_inputs, family.mlp_output]
    for path in maps:
        linear = layer.get_submodule(path)
        weight = getattr(linear, "weight", None)
        if type(linear) not in (nn.Linear, Conv1D) or weight is None or not _is_plain(weight):
            return (
                f"{path} is not a plain linear map in at least 16 bits; start from the unquantised model "
                "without adapters"
            )
        if loaded and weight.is_meta:
            return f"the weights of {path} are not loaded (meta device)"
    known = (*family.input_maps, family.output, *(name for name in family.norms if name))
    attention = layer.get_submodule(family.attention)
    for name, _ in attention.named_parameters():
        if name.partition(".")[0] not in known:
            return f"{family.attention}.{name} is not part of what is known of this family"
    return None


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize >= 2


def family_of(model: PreTrainedModel) -> CompressedFamily:
    """The description of a stock model's family."""
    return FAMILIES[model.config.model_type]


def is_capped(model: PreTrainedModel) -> bool:
    """Whether the family soft-caps attention logits, which older Transformers' SDPA kernels leave out silently."""
    family = FAMILIES.get(model.config.model_type)
    return family is not None and family.description.softcap is not None


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


def values_of_layers(model: PreTrainedModel, stay: Sequence[int]) -> dict[str, Any]:
    """The config of a stock ``model`` as values, for a model of the layers ``stay`` alone.

    What the config says layer by layer follows: lists with an entry for every layer, and which layers have no experts.
    """
    config, layers = model.config, decoder_layers(model, family_of(model))
    values: dict[str, Any] = config.to_dict()
    if len(stay) == len(layers):
        return values
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == len(layers) and name != _WITHOUT_EXPERTS:
            values[name] = [value[index] for index in stay]
    if _WITHOUT_EXPERTS in values:
        plain = [
            place for place, index in enumerate(stay) if not has_experts(layers[index], family_of(model).description)
        ]
        values |= {_WITHOUT_EXPERTS: plain, "decoder_sparse_step": 1}
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(stay)
    return values


def check_removable(model: PreTrainedModel, option: str) -> None:
    """Refuse to remove whole layers of a ``model`` whose layers depend on their number; ``option`` asks for it."""
    family, layers = family_of(model), decoder_layers(model, family_of(model))
    stay = range(1, len(layers))
    if not stay:
        raise InvalidRequest(f"{option} removes whole layers, and MODEL has only one")
    with init_empty_weights(include_buffers=False):
        moved = family.stock(type(model.config).from_dict(values_of_layers(model, stay)))
    for before, after in zip(layers[1:], decoder_layers(moved, family), strict=True):
        for (path, one), (_, other) in zip(before.named_modules(), after.named_modules(), strict=True):
            found, expected = _facts(other), _facts(one)
            if found != expected:
                raise InvalidRequest(
                    f"{option} removes whole layers, and what a layer of this model does depends on its number "
                    f"({path or 'the layer'}: {', '.join(sorted(dict(expected.items() ^ found.items())))})"
                )


def _facts(module: nn.Module) -> dict[str, Any]:
    """What a module goes by besides its weights, which are named with their shapes."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return {name: value for name, value in plain.items() if name not in ("layer_idx", "training")} | shapes


def model_geometry(model: PreTrainedModel, of: GeometryOf = layer_geometry) -> list[LayerGeometry]:
    """Parameter counts of every decoder layer of a stock model (which may be on meta), by a method's rule."""
    family = family_of(model)
    return [of(layer, model.config, family.description) for layer in decoder_layers(model, family)]
