"""Ministral: layers with and without a sliding window."""

from transformers import MinistralForCausalLM, MinistralModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    MinistralForCausalLM,
    MinistralModel,
    covers="Ministral",
    special="sliding and full attention in turn",
)

CLASSES = ModeGPTMinistralConfig, ModeGPTMinistralModel, ModeGPTMinistralForCausalLM = compressed_classes(
    FAMILY, __name__
)
