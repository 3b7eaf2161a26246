"""StarCoder2: biases everywhere, an ungated MLP."""

from transformers import Starcoder2ForCausalLM, Starcoder2Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Starcoder2ForCausalLM,
    Starcoder2Model,
    covers="StarCoder2",
    special="biases, layer norms, ungated GELU, sliding window",
    sliding_window="sliding_window",
    output_dropout="residual_dropout",
    mlp_inputs=("mlp.c_fc",),
    mlp_output="mlp.c_proj",
)

CLASSES = ModeGPTStarcoder2Config, ModeGPTStarcoder2Model, ModeGPTStarcoder2ForCausalLM = compressed_classes(
    FAMILY, __name__
)
