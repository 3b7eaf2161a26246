"""Families that nobody described: those whose code is, but for names, that of a family that is described."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig

from .budget import whole
from .costs import Sizes, resized
from .data import TokenWindows
from .families import model_geometry
from .layered import resident
from .likeness import forward_code
from .methods import ModeGPT
from .modeling import FAMILIES, CompressedFamily, Family, register
from .modeling.modeling_inferred import inferred_classes, stock_classes
from .results import Choice

_Halves = Literal["halves", "neighbours"]
_ROTARY: tuple[tuple[_Halves, _Halves], ...] = (
    ("halves", "halves"),
    ("neighbours", "halves"),
    ("neighbours", "neighbours"),
)
_INTERMEDIATE, _VOCABULARY, _WINDOW, _TOLERANCE = 24, 64, 12, 1e-4


#: What was inferred for a config, by its content: a family's configs can differ in what they switch on.
_INFERRED: dict[str, CompressedFamily | None] = {}


def infer_family(config: PreTrainedConfig) -> CompressedFamily | None:
    """The family of an undescribed ``config``, or None unless it is certain.

    Certain means: the model is Transformers' own; the forward of its attention, of its MLP and of its decoder layer
    are each, but for annotations, the code of a described family; and a small random model of it, described like
    that, is reproduced by its compressed form. What is found is registered.
    """
    key = f"{type(config).__qualname__} {config.to_json_string(use_diff=False)}"
    if key not in _INFERRED:
        FAMILIES.pop(config.model_type, None)
        try:
            _INFERRED[key] = _infer(config)
        except Exception:  # any code may refuse a config that it was not written for
            _INFERRED[key] = None
            FAMILIES.pop(config.model_type, None)
    if (found := _INFERRED[key]) is not None:
        FAMILIES[config.model_type] = found
    return found


def _infer(config: PreTrainedConfig) -> CompressedFamily | None:
    causal_lm, base = stock_classes(type(config))
    if causal_lm.config_class is not type(config):
        return None
    with init_empty_weights(include_buffers=True):  # all layers: they need not be alike
        candidates = list(_candidates(causal_lm(copy.deepcopy(config)), causal_lm, base))
    for description in candidates:
        found = register(description, *inferred_classes(type(config)), inferred=True)
        with suppress(Exception):  # a wrong description can fail in any way
            if _reproduces(_random_model(config, causal_lm)):
                return found
        del FAMILIES[description.model_type]
    return None


def _random_model(config: PreTrainedConfig, causal_lm: Any) -> Any:
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    groups = groups or heads
    per_group = 1 if heads == groups else 2
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = Sizes(2, 2 * per_group * head, _INTERMEDIATE, 2 * per_group, 2, head, 2)
    small = resized(config, Family(causal_lm, causal_lm), sizes, _VOCABULARY)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = causal_lm(small).double().eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def _candidates(model: Any, causal_lm: Any, base: Any) -> Iterator[Family]:
    """Descriptions put together from those of the families that attention, MLP and layer are written like."""
    known = [family for family in FAMILIES.values() if not family.inferred]
    for one in known:
        layers = getattr(model.base_model, one.description.layers, None)
        if not layers or any(
            not hasattr(layer, name) for layer in layers for name in (one.description.attention, "mlp")
        ):
            continue
        attention = getattr(layers[0], one.description.attention)
        mlp = _written_like(layers[0].mlp, known, "MLP")
        layer = _written_like(layers[0], known, "DecoderLayer")
        kinds = {(type(each), type(getattr(each, one.description.attention)), type(each.mlp)) for each in layers}
        if mlp and layer and len(kinds) == 1 and _written_like(attention, [one], "Attention"):
            for (rotary, angles), partial in itertools.product(_ROTARY, (False, True)):
                yield replace(
                    one.description,
                    causal_lm=causal_lm,
                    base=base,
                    rotary=rotary,
                    angles=angles,
                    partial_rotary=partial,
                    mlp_inputs=mlp.mlp_inputs,
                    mlp_output=mlp.mlp_output,
                    middle=layer.middle,
                )


def _written_like(module: nn.Module, known: Sequence[CompressedFamily], ending: str) -> Family | None:
    """The first of the families whose class with this ``ending`` of its name has the forward of ``module``."""
    code = forward_code(type(module))
    same = (one.description for one in known if code is not None and code == forward_code(_class_like(one, ending)))
    return next(same, None)


def _class_like(family: CompressedFamily, ending: str) -> Any:
    """The class of a described family's modeling file whose name ends like that."""
    module = inspect.getmodule(family.stock)
    return next(
        (cls for name, cls in vars(module).items() if name.endswith(ending) and inspect.isclass(cls)), type(None)
    )


def _reproduces(model: Any) -> bool:
    """Whether the compressed form of a small random ``model`` computes the same, whole and without dead channels."""
    from .engine import Engine  # which refuses what is not described

    windows = TokenWindows(torch.arange(4 * _WINDOW).view(4, _WINDOW) * 7 % _VOCABULARY)
    dense = resident(model)
    for dead in (0, 3):
        with torch.no_grad():
            for layer in dense.layers:
                for path in dense.family.description.mlp_inputs:
                    linear: Any = layer.get_submodule(path)
                    for tensor in (linear.weight, linear.bias):
                        for block in () if tensor is None else tensor.split(_INTERMEDIATE):  # gate and up can be in one
                            block[:dead] = 0
        ranks = [whole(layer) for layer in model_geometry(model)]
        for rank in ranks:
            rank["mlp"] -= dead
        engine = Engine(dense, windows, len(windows.ids))
        with engine.active():
            small = engine.compress(ModeGPT(1e-4), Choice(ranks, [{} for _ in ranks]), sequential=False).model
        with torch.no_grad():
            expected, found = (each(windows.ids).logits for each in (model, small))
        if not (expected - found).abs().max() < _TOLERANCE * expected.abs().max():
            return False
    return True
