"""Cohere Command-R: parallel attention and MLP, rotary pairs of neighbouring channels."""

from transformers import CohereForCausalLM, CohereModel

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    CohereForCausalLM,
    CohereModel,
    covers="Command-R, Aya 23",
    special="parallel attention and MLP, rotary pairs of neighbouring channels, query and key layer norms",
    query_norm="q_norm",
    key_norm="k_norm",
    norm_centred=True,
    rotary="neighbours",
    angles="neighbours",
    middle=lambda config: None,
)

CLASSES = ModeGPTCohereConfig, ModeGPTCohereModel, ModeGPTCohereForCausalLM = compressed_classes(FAMILY, __name__)
