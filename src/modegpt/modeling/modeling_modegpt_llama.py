"""Compressed Llama-type decoders (Llama 1 to 3.x, SmolLM, TinyLlama, Yi, ...)."""

from __future__ import annotations

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel

from .modeling_modegpt import CompactAttention, CompactModel, Family

FAMILY = Family()


class ModeGPTLlamaConfig(LlamaConfig):
    """A Llama config whose ``per_layer_config`` gives each layer's compressed widths."""

    model_type = "modegpt_llama"


class ModeGPTLlamaAttention(CompactAttention, LlamaAttention):  # type: ignore[misc]
    """Compressed attention that Transformers still recognises as Llama's."""


class ModeGPTLlamaModel(CompactModel, LlamaModel):
    """The decoder without its head."""

    config_class = ModeGPTLlamaConfig
    attention_class = ModeGPTLlamaAttention
    family = FAMILY


class ModeGPTLlamaForCausalLM(CompactModel, LlamaForCausalLM):
    """The decoder with its language-model head."""

    config_class = ModeGPTLlamaConfig
    attention_class = ModeGPTLlamaAttention
    family = FAMILY


# save_pretrained copies these files beside the weights, wherever the model was loaded from.
ModeGPTLlamaConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
ModeGPTLlamaModel.register_for_auto_class("AutoModel")  # type: ignore[no-untyped-call]
ModeGPTLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]

__all__ = ["ModeGPTLlamaConfig", "ModeGPTLlamaForCausalLM", "ModeGPTLlamaModel"]
