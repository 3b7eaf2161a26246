"""GPT-NeoX: one map for query, key and value, head by head; partial rotary embedding."""

from transformers import GPTNeoXForCausalLM, GPTNeoXModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    covers="GPT-NeoX, Pythia, Dolly 2, RedPajama-INCITE",
    special="fused query-key-value head by head, partial rotary embedding, parallel attention and MLP",
    partial_rotary=True,
    attention="attention",
    fused="query_key_value",
    fused_by_group=True,
    output="dense",
    mlp_inputs=("mlp.dense_h_to_4h",),
    mlp_output="mlp.dense_4h_to_h",
    stored_as={"lm_head.weight": ("embed_out.weight",)},
    middle=lambda config: None if config.use_parallel_residual else "post_attention_layernorm",
)

CLASSES = ModeGPTGPTNeoXConfig, ModeGPTGPTNeoXModel, ModeGPTGPTNeoXForCausalLM = compressed_classes(FAMILY, __name__)
