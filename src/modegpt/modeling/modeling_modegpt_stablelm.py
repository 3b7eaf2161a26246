"""StableLM: partial rotary embedding, a layer norm for every head's queries and keys."""

from transformers import StableLmForCausalLM, StableLmModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    StableLmForCausalLM,
    StableLmModel,
    covers="StableLM 2, StableLM Zephyr, StableLM 3B and 12B",
    special="partial rotary embedding, query and key layer norms per head, parallel or not",
    partial_rotary=True,
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    norm_centred=True,
    middle=lambda config: None if config.use_parallel_residual else "post_attention_layernorm",
)

CLASSES = ModeGPTStableLmConfig, ModeGPTStableLmModel, ModeGPTStableLmForCausalLM = compressed_classes(FAMILY, __name__)
