"""Qwen2: biases of query, key and value."""

from transformers import Qwen2ForCausalLM, Qwen2Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Qwen2ForCausalLM,
    Qwen2Model,
    covers="Qwen2, Qwen2.5",
    special="biases of query, key and value",
)

CLASSES = ModeGPTQwen2Config, ModeGPTQwen2Model, ModeGPTQwen2ForCausalLM = compressed_classes(FAMILY, __name__)
