"""What a family of decoders looks like: a part of the runtime of a compressed model, see ``modeling_modegpt.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import PreTrainedModel


def _after_attention(config: Any) -> str | None:
    return "post_attention_layernorm"


@dataclass(frozen=True)
class Family:
    """A family of decoders: where it keeps the parts that are compressed, and what is special about them.

    Paths are relative to one decoder layer, except ``layers``, which is relative to the base model, and the names
    of maps and norms inside the attention module. The defaults are those of Llama.
    """

    #: The stock causal language model and its base model.
    causal_lm: type[PreTrainedModel]
    base: type[PreTrainedModel]
    #: Models that belong to it, and what is special about it, for people.
    covers: str = ""
    special: str = ""
    layers: str = "layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    #: One map for query, key and value, in place of the first three; its outputs are in three blocks or, by group,
    #: the queries, the key and the value of one key-value head after the other.
    fused: str | None = None
    fused_by_group: bool = False
    #: Norms of query and key between projection and rotary embedding; RMS norms, or layer norms (``centred``).
    query_norm: str | None = None
    key_norm: str | None = None
    norm_centred: bool = False
    #: The weight of these norms is that much more than the stored one.
    norm_offset: float = 0.0
    #: Which two channels the rotary embedding turns into each other: i and i + half of all it turns, or 2i and 2i + 1.
    rotary: Literal["halves", "neighbours"] | None = "halves"
    #: Whether only a share of a head's channels rotates, the first ones, as ``partial_rotary_factor`` says.
    partial_rotary: bool = False
    #: Which two columns of the cosine and sine tables have the same angle.
    angles: Literal["halves", "neighbours"] = "halves"
    #: Attributes of the config: the soft cap of attention logits, the sliding window where the attention module does
    #: not have it itself, the dropouts of attention weights and, inside the attention module, of its output, and the
    #: MLP's width.
    softcap: str | None = None
    sliding_window: str | None = None
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    intermediate_size: str = "intermediate_size"
    #: The maps into the intermediate space, which share one selection; one map can hold both gate and up.
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    #: The module that holds all experts' weights, in layers that have them in place of the MLP.
    experts: str | None = None
    #: The module whose input is the residual stream between attention and MLP; None where the two are parallel.
    middle: Callable[[Any], str | None] = _after_attention
    #: Ends of tensors' names, and what checkpoints have there: pieces are concatenated, experts ("*") stacked.
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Values of the config without which a model is not supported.
    requires: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The stock ``model_type``."""
        return str(self.causal_lm.config_class.model_type)  # type: ignore[union-attr]

    def differences(self) -> dict[str, Any]:
        """The fields that the compressed model goes by and that differ from Llama's, fit for JSON."""
        plain = Family(self.causal_lm, self.base)
        return {name: value for name in _RUNTIME if (value := getattr(self, name)) != getattr(plain, name)}

    @property
    def input_maps(self) -> tuple[str, ...]:
        """The names of the linear maps into the attention module: query, key and value, or one for all."""
        return (self.query, self.key, self.value) if self.fused is None else (self.fused,)

    @property
    def norms(self) -> tuple[str | None, str | None]:
        """The names of the norms of query and key."""
        return self.query_norm, self.key_norm


_DENSE_ONLY = {"causal_lm", "base", "covers", "special", "middle", "stored_as", "requires"}
_RUNTIME = tuple(one.name for one in fields(Family) if one.name not in _DENSE_ONLY)


def described(family: Family, differences: Mapping[str, Any]) -> Family:
    """The description with these :meth:`Family.differences` from Llama's, as they come from JSON."""
    values = {name: differences[name] for name in _RUNTIME if name in differences}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Family(family.causal_lm, family.base, **values)
