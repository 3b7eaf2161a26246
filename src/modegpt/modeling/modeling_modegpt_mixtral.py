"""Mixtral: experts in place of the MLP."""

from transformers import MixtralForCausalLM, MixtralModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    MixtralForCausalLM,
    MixtralModel,
    covers="Mixtral",
    special="experts, each with a selection of its own",
    sliding_window="sliding_window",
    experts="mlp.experts",
    stored_as={
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.*.w1.weight",
            "block_sparse_moe.experts.*.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.*.w2.weight",),
    },
)

CLASSES = ModeGPTMixtralConfig, ModeGPTMixtralModel, ModeGPTMixtralForCausalLM = compressed_classes(FAMILY, __name__)
