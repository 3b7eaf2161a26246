"""Llama-type decoders."""

from transformers import LlamaForCausalLM, LlamaModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    LlamaForCausalLM,
    LlamaModel,
    covers="Llama 1 to 3.x, SmolLM 1 and 2, TinyLlama, Yi, DeepSeek-LLM",
    special="any rotary scaling, biases in attention and MLP",
)

CLASSES = ModeGPTLlamaConfig, ModeGPTLlamaModel, ModeGPTLlamaForCausalLM = compressed_classes(FAMILY, __name__)
