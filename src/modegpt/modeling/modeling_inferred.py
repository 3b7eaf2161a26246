"""Compressed decoders of families that have no description of their own but are built like one that has.

``config.json`` says how such a family keeps its parts (``compressed_family``, the fields of ``Family`` that differ from
Llama's); classes are made when they are asked for, by their names: ``ModeGPT`` and that of the stock class.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

_known: dict[str, Any] = {}
_triples: dict[str, tuple[Any, Any, Any]] = {}


def stock_classes(config_class: type) -> tuple[Any, Any]:
    """Transformers' own causal language model and base model of a config class; raises ``KeyError`` without them."""
    return AutoModelForCausalLM._model_mapping[config_class], AutoModel._model_mapping[config_class]


def inferred_classes(config_class: type) -> tuple[Any, Any, Any]:
    """The config, base model and causal language model of the compressed form of a stock config's family."""
    causal_lm, base = stock_classes(config_class)
    name = f"ModeGPT{causal_lm.__name__}"
    if name not in _known:
        classes = compressed_classes(Family(causal_lm, base), __name__, by_config=True)
        _known.update({cls.__name__: cls for cls in classes})
        _triples[name] = classes
    return _triples[name]


def __getattr__(name: str) -> Any:
    if name.startswith("ModeGPT"):
        stock = getattr(transformers, name.removeprefix("ModeGPT"), None)
        if stock is not None:
            inferred_classes(getattr(stock, "config_class", None) or stock)
            return _known[name]
    raise AttributeError(name)
