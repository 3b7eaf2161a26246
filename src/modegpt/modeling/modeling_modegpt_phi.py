"""Phi-1 to Phi-2: attention and MLP in parallel, partial rotary embedding."""

from transformers import PhiForCausalLM, PhiModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    PhiForCausalLM,
    PhiModel,
    covers="Phi-1, Phi-1.5, Phi-2",
    special="parallel attention and MLP, partial rotary embedding, biases, ungated GELU",
    partial_rotary=True,
    output="dense",
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    norm_centred=True,
    mlp_inputs=("mlp.fc1",),
    mlp_output="mlp.fc2",
    middle=lambda config: None,
)

CLASSES = ModeGPTPhiConfig, ModeGPTPhiModel, ModeGPTPhiForCausalLM = compressed_classes(FAMILY, __name__)
