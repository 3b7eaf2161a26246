"""Gemma 1."""

from transformers import GemmaForCausalLM, GemmaModel

from .modeling_modegpt import Family, compressed_classes

FAMILY = Family(
    GemmaForCausalLM,
    GemmaModel,
    covers="Gemma 1",
    special="GeGLU, heads wider than hidden / heads",
)

CLASSES = ModeGPTGemmaConfig, ModeGPTGemmaModel, ModeGPTGemmaForCausalLM = compressed_classes(FAMILY, __name__)
