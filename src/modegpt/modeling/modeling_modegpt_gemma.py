"""Gemma 1."""

from transformers import GemmaForCausalLM, GemmaModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    GemmaForCausalLM,
    GemmaModel,
    covers="Gemma 1",
    special="GeGLU, heads wider than hidden / heads",
)

CLASSES = ModeGPTGemmaConfig, ModeGPTGemmaModel, ModeGPTGemmaForCausalLM = compressed_classes(FAMILY, __name__)
