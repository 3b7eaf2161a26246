"""Qwen3: query and key norms per head."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Qwen3ForCausalLM,
    Qwen3Model,
    covers="Qwen3",
    special="query and key norms per head",
    query_norm="q_norm",
    key_norm="k_norm",
)

CLASSES = ModeGPTQwen3Config, ModeGPTQwen3Model, ModeGPTQwen3ForCausalLM = compressed_classes(FAMILY, __name__)
