"""Granite: multipliers of embeddings, attention and residuals."""

from transformers import GraniteForCausalLM, GraniteModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    GraniteForCausalLM,
    GraniteModel,
    covers="Granite 3.x",
    special="multipliers of embeddings, attention, residuals and logits",
)

CLASSES = ModeGPTGraniteConfig, ModeGPTGraniteModel, ModeGPTGraniteForCausalLM = compressed_classes(FAMILY, __name__)
