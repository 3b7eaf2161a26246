"""Gemma 3, text only: query and key norms, two rotary bases."""

from transformers import Gemma3ForCausalLM, Gemma3TextModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Gemma3ForCausalLM,
    Gemma3TextModel,
    covers="Gemma 3 (text)",
    special="query and key norms per head, sliding and full attention with a rotary base each",
    query_norm="q_norm",
    key_norm="k_norm",
    norm_offset=1.0,
    middle=lambda config: "pre_feedforward_layernorm",
)

CLASSES = ModeGPTGemma3TextConfig, ModeGPTGemma3TextModel, ModeGPTGemma3ForCausalLM = compressed_classes(
    FAMILY, __name__
)
