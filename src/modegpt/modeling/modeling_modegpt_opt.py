"""OPT: learned positions, biases."""

from transformers import OPTForCausalLM, OPTModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    OPTForCausalLM,
    OPTModel,
    covers="OPT",
    special="learned positions, biases, ReLU, norms before or after each part, projected embeddings",
    layers="decoder.layers",
    output="out_proj",
    rotary=None,
    intermediate_size="ffn_dim",
    mlp_inputs=("fc1",),
    mlp_output="fc2",
    middle=lambda config: "final_layer_norm" if config.do_layer_norm_before else "fc1",
)

CLASSES = ModeGPTOPTConfig, ModeGPTOPTModel, ModeGPTOPTForCausalLM = compressed_classes(FAMILY, __name__)
