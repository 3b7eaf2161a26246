"""A plain Llama or Qwen3 that any engine knows: exactly the compressed model, with zeros where it has less."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from ..errors import InvalidRequest
from .plain import PlainDecoder, PlainShape, Tensors


def stock_model(plain: PlainDecoder) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """The model as a Llama, or a Qwen3 where it has query and key norms, with equal layers, in its own dtype.

    Every layer gets the widest MLP, the most heads and the union of all rotary pairs; a list of rotary frequencies that
    is not the usual one becomes factors of the rotary embedding (``longrope``, the same ones for short and long text).
    Raises :class:`InvalidRequest` for layers that share their key-value heads among different numbers of queries, and
    for biases that a Qwen3 has no place for.
    """
    shape, model = plain.shape, plain.model
    groups, width = _groups(shape), max(shape.widths)
    tensors = {name: x.to(model.dtype) for name, x in plain.rest().items()}
    for index in range(len(plain)):  # a layer at a time in more bits
        layer = plain.layer(index, groups, width)
        tensors |= {f"model.layers.{index}.{name}": x.to(model.dtype) for name, x in layer.items()}
    config = _config(shape, groups, tensors, model)
    with torch.device("meta"):
        stock: Any = Qwen3ForCausalLM(config) if isinstance(config, Qwen3Config) else LlamaForCausalLM(config)
    wanted = {name: x.shape for name, x in stock.state_dict().items() if not (shape.tied and name == "lm_head.weight")}
    complete = {
        name: tensors[name] if name in tensors else torch.zeros(size, dtype=model.dtype)  # biases
        for name, size in wanted.items()
    }
    assert tensors.keys() <= complete.keys()
    stock.load_state_dict(complete, strict=False, assign=True)
    stock.tie_weights()
    stock.model.rotary_emb = type(stock.model.rotary_emb)(config=stock.config)  # whose buffers are no parameters
    if model.generation_config is not None:
        stock.generation_config = model.generation_config
    result: LlamaForCausalLM | Qwen3ForCausalLM = stock.eval()
    return result


def _groups(shape: PlainShape) -> int:
    """The least number of key-value heads for all layers; LlamaConfig wants one query head to be d / H wide, or so."""
    shared = {heads / groups for heads, groups in zip(shape.heads, shape.groups, strict=True)}
    if len(shared) > 1:
        raise InvalidRequest("MODEL cannot be a plain Llama: its layers have different numbers of queries for a key")
    per_group = round(shared.pop())
    if shape.hidden % per_group:
        raise InvalidRequest(
            f"MODEL cannot be a plain Llama: its {shape.hidden} channels are no multiple of {per_group}, the number of "
            "queries for a key"
        )
    return next(groups for groups in itertools.count(max(shape.groups)) if shape.hidden % (groups * per_group) == 0)


def _config(shape: PlainShape, groups: int, tensors: Tensors, model: PreTrainedModel) -> LlamaConfig | Qwen3Config:
    biased = {part for part in ("self_attn", "mlp") for name in tensors if f".{part}." in name and "bias" in name}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    more: Any = {name: getattr(model.config, name, None) for name in ids}
    if shape.normed and "mlp" in biased:
        raise InvalidRequest(
            "MODEL cannot be exported: a plain Qwen3 has no biases in its MLPs ('flap' puts some there)"
        )
    if not shape.normed:
        more["mlp_bias"] = "mlp" in biased
    return (Qwen3Config if shape.normed else LlamaConfig)(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=max(shape.widths),
        num_hidden_layers=len(shape.widths),
        num_attention_heads=groups * shape.heads[0] // shape.groups[0],
        num_key_value_heads=groups,
        head_dim=shape.head,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.epsilon,
        rope_parameters=_rope(shape),
        attention_bias="self_attn" in biased,
        tie_word_embeddings=shape.tied,
        dtype=model.dtype,
        **more,
    )


def _rope(shape: PlainShape) -> dict[str, Any]:
    if shape.usual:
        return {"rope_type": "default", "rope_theta": shape.base}
    factors = shape.factors().tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": shape.base,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": shape.context,
        "short_factor": factors,
        "long_factor": factors,
    }
