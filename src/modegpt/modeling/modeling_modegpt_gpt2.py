"""GPT-2: learned positions, fused maps stored the other way round."""

from transformers import GPT2LMHeadModel, GPT2Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    GPT2LMHeadModel,
    GPT2Model,
    covers="GPT-2, DistilGPT-2",
    special="learned positions, fused query-key-value, Conv1D maps, biases",
    layers="h",
    attention="attn",
    fused="c_attn",
    output="c_proj",
    rotary=None,
    dropout="attn_pdrop",
    output_dropout="resid_pdrop",
    intermediate_size="n_inner",
    mlp_inputs=("mlp.c_fc",),
    mlp_output="mlp.c_proj",
    middle=lambda config: "ln_2",
    requires={"add_cross_attention": False},
)

CLASSES = ModeGPTGPT2Config, ModeGPTGPT2Model, ModeGPTGPT2LMHeadModel = compressed_classes(FAMILY, __name__)
