"""Qwen3-MoE: experts in some layers or all, query and key norms per head."""

from transformers import Qwen3MoeForCausalLM, Qwen3MoeModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    covers="Qwen3-MoE",
    special="experts in some layers or all, query and key norms per head",
    query_norm="q_norm",
    key_norm="k_norm",
    intermediate_size="moe_intermediate_size",
    experts="mlp.experts",
    stored_as={
        "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.*.down_proj.weight",),
    },
)

CLASSES = ModeGPTQwen3MoeConfig, ModeGPTQwen3MoeModel, ModeGPTQwen3MoeForCausalLM = compressed_classes(FAMILY, __name__)
