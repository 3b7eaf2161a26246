"""The compressed model's classes, registered with Transformers' Auto classes on import."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from . import modeling_modegpt_llama
from .modeling_modegpt import CompactAttention, Family, LayerSizes, layer_sizes, stock_config

__all__ = [
    "FAMILIES",
    "CompactAttention",
    "CompressedFamily",
    "Family",
    "LayerSizes",
    "layer_sizes",
    "stock_config",
]


@dataclass(frozen=True)
class CompressedFamily:
    """A family's description with its stock class and the classes of its compressed form."""

    description: Family
    stock: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]

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
FAMILIES: dict[str, CompressedFamily] = {
    "llama": CompressedFamily(
        modeling_modegpt_llama.FAMILY,
        LlamaForCausalLM,
        modeling_modegpt_llama.ModeGPTLlamaConfig,
        modeling_modegpt_llama.ModeGPTLlamaModel,
        modeling_modegpt_llama.ModeGPTLlamaForCausalLM,
    ),
}

for _family in FAMILIES.values():
    AutoConfig.register(_family.config.model_type, _family.config, exist_ok=True)
    AutoModel.register(_family.config, _family.model, exist_ok=True)
    AutoModelForCausalLM.register(_family.config, _family.causal_lm, exist_ok=True)
