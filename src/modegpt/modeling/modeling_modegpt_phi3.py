"""Phi-3 and Phi-4: fused maps, partial rotary embedding."""

from transformers import Phi3ForCausalLM, Phi3Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Phi3ForCausalLM,
    Phi3Model,
    covers="Phi-3, Phi-3.5, Phi-4",
    special="fused query-key-value and gate-up, partial rotary embedding, longrope",
    partial_rotary=True,
    sliding_window="sliding_window",
    fused="qkv_proj",
    mlp_inputs=("mlp.gate_up_proj",),
)

CLASSES = ModeGPTPhi3Config, ModeGPTPhi3Model, ModeGPTPhi3ForCausalLM = compressed_classes(FAMILY, __name__)
