"""Gemma 2: soft caps, norms before and after each part."""

from transformers import Gemma2ForCausalLM, Gemma2Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Gemma2ForCausalLM,
    Gemma2Model,
    covers="Gemma 2",
    special="soft caps, norms before and after each part, own query scale, sliding window in every other layer",
    softcap="attn_logit_softcapping",
    middle=lambda config: "pre_feedforward_layernorm",
)

CLASSES = ModeGPTGemma2Config, ModeGPTGemma2Model, ModeGPTGemma2ForCausalLM = compressed_classes(FAMILY, __name__)
