"""The compressed model's classes, registered with Transformers' Auto classes on import.

Every file ``modeling_modegpt_<family>.py`` here describes one family; a new one is found by its name.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .modeling_description import Family
from .modeling_inferred import inferred_classes
from .modeling_modegpt import COMPRESSED, CompactAttention, factor_stacks, features, has_experts, stack_name
from .modeling_norm import is_joint, norm_parts
from .modeling_sizes import LayerSizes, head_counts, layer_sizes, stock_config
from .modeling_slices import NORMS

__all__ = [
    "FAMILIES",
    "NORMS",
    "CompactAttention",
    "CompressedFamily",
    "Family",
    "LayerSizes",
    "factor_stacks",
    "features",
    "has_experts",
    "head_counts",
    "is_compressed",
    "is_joint",
    "layer_sizes",
    "norm_parts",
    "recognise",
    "register",
    "stack_name",
    "stock_config",
]


@dataclass(frozen=True)
class CompressedFamily:
    """A family's description with the classes of its compressed form."""

    description: Family
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    inferred: bool = False
    """Whether nobody wrote the description."""

    @property
    def stock(self) -> type[PreTrainedModel]:
        """The dense causal language model."""
        return self.description.causal_lm

    @property
    def auto_map(self) -> dict[str, str]:
        """``config.json``'s ``auto_map``: all three entries, since serving engines ask for ``AutoModel``."""
        file = self.config.__module__.rsplit(".", 1)[-1]
        return {
            "AutoConfig": f"{file}.{self.config.__name__}",
            "AutoModel": f"{file}.{self.model.__name__}",
            "AutoModelForCausalLM": f"{file}.{self.causal_lm.__name__}",
        }


#: Stock ``model_type`` -> its compressed family.
FAMILIES: dict[str, CompressedFamily] = {}


def register(
    description: Family, config: Any, model: Any, causal_lm: Any, *, inferred: bool = False
) -> CompressedFamily:
    """Make a compressed family known here and to Transformers' Auto classes."""
    _register_classes(config, model, causal_lm)
    family = FAMILIES[description.model_type] = CompressedFamily(description, config, model, causal_lm, inferred)
    return family


def is_compressed(model_type: object) -> bool:
    """Whether a ``model_type`` is that of a compressed model."""
    return isinstance(model_type, str) and model_type.startswith(COMPRESSED)


def recognise(model_type: object) -> None:
    """Have Transformers' Auto classes know a compressed ``model_type`` whose family was inferred."""
    if isinstance(model_type, str) and is_compressed(model_type) and model_type not in CONFIG_MAPPING:
        stock = model_type.removeprefix(COMPRESSED)
        if stock in CONFIG_MAPPING:
            _register_classes(*inferred_classes(CONFIG_MAPPING[stock]))


def _register_classes(config: Any, model: Any, causal_lm: Any) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


for _found in pkgutil.iter_modules(__path__):
    if _found.name.startswith("modeling_modegpt_"):
        _module = import_module(f"{__name__}.{_found.name}")
        register(_module.FAMILY, *_module.CLASSES)
