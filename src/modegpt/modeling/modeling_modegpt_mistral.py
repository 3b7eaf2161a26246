"""Mistral."""

from transformers import MistralForCausalLM, MistralModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    MistralForCausalLM,
    MistralModel,
    covers="Mistral, Mistral-Nemo",
    special="sliding window",
    sliding_window="sliding_window",
)

CLASSES = ModeGPTMistralConfig, ModeGPTMistralModel, ModeGPTMistralForCausalLM = compressed_classes(FAMILY, __name__)
