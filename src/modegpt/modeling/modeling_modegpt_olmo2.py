"""OLMo-2: query and key norms over all heads, norms after each part."""

from transformers import Olmo2ForCausalLM, Olmo2Model

from .modeling_description import Family
from .modeling_modegpt import compressed_classes

FAMILY = Family(
    Olmo2ForCausalLM,
    Olmo2Model,
    covers="OLMo-2",
    special="query and key norms over all heads together, norms after each part",
    query_norm="q_norm",
    key_norm="k_norm",
    middle=lambda config: "mlp",
)

CLASSES = ModeGPTOlmo2Config, ModeGPTOlmo2Model, ModeGPTOlmo2ForCausalLM = compressed_classes(FAMILY, __name__)
