"""One row for every family and configuration: tiny random models of them all, and where these keep their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Row:
    """A configuration of the family of ``model`` (a class's name in Transformers)."""

    name: str
    model: str
    settings: dict[str, Any]

    def build(self, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A random model in float32 and eval mode whose norms and biases are random too."""
        cls = getattr(transformers, self.model)
        names = {
            "OPTForCausalLM": {"intermediate_size": "ffn_dim"},
            "GPT2LMHeadModel": {"intermediate_size": "n_inner"},
        }
        settings = {names.get(self.model, {}).get(key, key): value for key, value in SIZES.items()}
        settings |= self.settings | overrides
        if self.model in ("OPTForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"):
            del settings["num_key_value_heads"]
        if self.model in ("OPTForCausalLM",):
            settings["init_std"] = settings.pop("initializer_range")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(cls.config_class(**settings))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1 or "norm" in name:
                        norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
                        parameter.normal_(mean=1.0 if norm else 0.0, std=0.2)
                    elif parameter.dim() == 3 or name.endswith("gate.weight"):
                        parameter.normal_(std=0.2)
        return model.eval()


def rope(kind: str, head: int = 8, **values: Any) -> dict[str, Any]:
    """Rotary parameters of a tiny model."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LONG = {
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
WINDOWS = {"sliding_window": 6}

ROWS = [
    Row("llama-mha", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    Row("llama-gqa", "LlamaForCausalLM", {}),
    Row("llama-mqa", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    Row("llama-tied", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    Row("llama-biases", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    Row("llama-wide-heads", "LlamaForCausalLM", {"head_dim": 12}),
    Row("llama-heads-wider-than-the-model", "LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 34}),
    Row("llama-linear", "LlamaForCausalLM", rope("linear", factor=4.0)),
    Row("llama-dynamic", "LlamaForCausalLM", rope("dynamic", factor=4.0)),
    Row("llama-yarn", "LlamaForCausalLM", rope("yarn", **YARN)),
    Row("llama-longrope", "LlamaForCausalLM", rope("longrope", **LONG)),
    Row("llama-llama3", "LlamaForCausalLM", rope("llama3", **LLAMA3)),
    Row("llama-stray-factor", "LlamaForCausalLM", rope("default", partial_rotary_factor=0.5)),
    Row("mistral", "MistralForCausalLM", {}),
    Row("mistral-window", "MistralForCausalLM", WINDOWS),
    Row(
        "ministral",
        "MinistralForCausalLM",
        {**WINDOWS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    Row("qwen2", "Qwen2ForCausalLM", {}),
    Row("qwen2-window", "Qwen2ForCausalLM", {**WINDOWS, "use_sliding_window": True, "max_window_layers": 1}),
    Row("qwen3", "Qwen3ForCausalLM", {"head_dim": 12}),
    Row("qwen3-biases", "Qwen3ForCausalLM", {"head_dim": 8, "attention_bias": True}),
    Row("gemma", "GemmaForCausalLM", {"head_dim": 12}),
    Row(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **WINDOWS,
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 5.0,
            "attn_implementation": "eager",  # others may leave the cap out
            "final_logit_softcapping": 3.0,
        },
    ),
    Row(
        "gemma2-uncapped",
        "Gemma2ForCausalLM",
        {"head_dim": 8, "attn_logit_softcapping": None, "attn_implementation": "eager"},
    ),
    Row(
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **WINDOWS,
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Row("phi", "PhiForCausalLM", {"num_key_value_heads": 4, **rope("default", partial_rotary_factor=0.5)}),
    Row(
        "phi-norms",
        "PhiForCausalLM",
        {"qk_layernorm": True, "head_dim": 8, **rope("default", partial_rotary_factor=0.5)},
    ),
    Row("phi3", "Phi3ForCausalLM", {}),
    Row("phi3-one-group", "Phi3ForCausalLM", {"num_key_value_heads": 1, **WINDOWS}),
    Row(
        "phi3-longrope",
        "Phi3ForCausalLM",
        rope(
            "longrope",
            short_factor=[1.0, 1.5, 2.0],
            long_factor=[2.0, 3.0, 4.0],
            original_max_position_embeddings=64,
            partial_rotary_factor=0.75,
        )
        | {"original_max_position_embeddings": 64},
    ),
    Row("opt", "OPTForCausalLM", {"word_embed_proj_dim": 32}),
    Row("opt-post-norm", "OPTForCausalLM", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    Row("opt-no-biases", "OPTForCausalLM", {"word_embed_proj_dim": 32, "enable_bias": False}),
    Row("opt-plain-norms", "OPTForCausalLM", {"word_embed_proj_dim": 32, "layer_norm_elementwise_affine": False}),
    Row("gpt2", "GPT2LMHeadModel", {}),
    Row("gpt2-layer-scale", "GPT2LMHeadModel", {"n_inner": None, "scale_attn_by_inverse_layer_idx": True}),
    Row("gpt2-unscaled", "GPT2LMHeadModel", {"scale_attn_weights": False, "tie_word_embeddings": False}),
    Row("gpt-neox", "GPTNeoXForCausalLM", rope("default", partial_rotary_factor=0.5)),
    Row(
        "gpt-neox-sequential",
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": False, "attention_bias": False, **rope("default", partial_rotary_factor=0.25)},
    ),
    Row("stablelm", "StableLmForCausalLM", rope("default", partial_rotary_factor=0.25)),
    Row(
        "stablelm-biases", "StableLmForCausalLM", {"use_qkv_bias": True, **rope("default", partial_rotary_factor=0.25)}
    ),
    Row(
        "stablelm-norms",
        "StableLmForCausalLM",
        {"use_parallel_residual": True, "qk_layernorm": True, **rope("default", partial_rotary_factor=0.25)},
    ),
    Row(
        "stablelm-everything",
        "StableLmForCausalLM",
        {"use_qkv_bias": True, "qk_layernorm": True, **rope("default", partial_rotary_factor=0.5)},
    ),
    Row("olmo2", "Olmo2ForCausalLM", {}),
    Row("olmo2-one-group", "Olmo2ForCausalLM", {"num_key_value_heads": 1, "attention_bias": True}),
    Row(
        "granite",
        "GraniteForCausalLM",
        {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    ),
    Row("cohere", "CohereForCausalLM", {}),
    Row("cohere-norms", "CohereForCausalLM", {"use_qk_norm": True}),
    Row("cohere-everything", "CohereForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
    Row("starcoder2", "Starcoder2ForCausalLM", {"norm_epsilon": 1e-5}),
    Row("starcoder2-window", "Starcoder2ForCausalLM", {**WINDOWS, "use_bias": False}),
    Row("mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("mixtral-window", "MixtralForCausalLM", {**WINDOWS, "num_local_experts": 3, "num_experts_per_tok": 1}),
    Row(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
        },
    ),
    Row(
        "qwen3-moe-normalised",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
]
BY_NAME = {row.name: row for row in ROWS}


# Where the stock models keep what is compressed


@dataclass(frozen=True)
class Piece:
    """Some outputs of a stock linear map: their weights (outputs, d) and biases, views that can be written to."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(n, d) to (n, outputs)."""
        return x @ self.weight.T + (0.0 if self.bias is None else self.bias)

    def cut(self, count: int) -> list[Piece]:
        """Pieces of equal size."""
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        return [Piece(weight, bias) for weight, bias in zip(self.weight.chunk(count), biases, strict=True)]

    def silence(self, outputs: list[int]) -> None:
        """Make some outputs zero."""
        self.weight[outputs] = 0.0
        if self.bias is not None:
            self.bias[outputs] = 0.0

    def repeat(self, output: int, others: list[int]) -> None:
        """Make the ``others`` equal to one output."""
        self.weight[others] = self.weight[output].clone()
        if self.bias is not None:
            self.bias[others] = self.bias[output].clone()


def piece(module: nn.Module) -> Piece:
    """All of a stock linear map."""
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return Piece(weight.T if isinstance(module, transformers.pytorch_utils.Conv1D) else weight, bias)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a stock or compressed ``model``."""
    return {
        "gpt2": lambda: model.transformer.h,
        "gpt_neox": lambda: model.gpt_neox.layers,
        "opt": lambda: model.model.decoder.layers,
    }.get(model.config.model_type.removeprefix("modegpt_"), lambda: model.model.layers)()


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    return next(getattr(layer, name) for name in ("self_attn", "attn", "attention") if hasattr(layer, name))


@dataclass(frozen=True)
class Heads:
    """The pieces of one attention module that make every head's queries and every group's keys and values."""

    query: list[Piece]
    key: list[Piece]
    value: list[Piece]
    output: list[torch.Tensor]
    """Columns (d, h) of the output map for every query head."""

    @property
    def size(self) -> int:
        """Channels of a head."""
        return len(self.query[0].weight)


def heads_of(model: PreTrainedModel, layer: nn.Module) -> Heads:
    """The heads of one decoder layer of a stock ``model``."""
    attention, config = attention_of(layer), model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    match config.model_type:
        case "gpt2":
            query, key, value = (part.cut(heads) for part in piece(attention.c_attn).cut(3))
        case "gpt_neox":
            parts = piece(attention.query_key_value).cut(3 * heads)
            query, key, value = parts[::3], parts[1::3], parts[2::3]
        case "phi3":
            parts = piece(attention.qkv_proj).cut(heads + 2 * groups)
            query, key, value = parts[:heads], parts[heads:-groups], parts[-groups:]
        case _:
            query = piece(attention.q_proj).cut(heads)
            key, value = (piece(module).cut(groups) for module in (attention.k_proj, attention.v_proj))
    output = {"gpt2": "c_proj", "gpt_neox": "dense", "phi": "dense", "opt": "out_proj"}.get(config.model_type, "o_proj")
    columns = piece(getattr(attention, output)).weight.chunk(heads, dim=1)
    return Heads(query, key, value, list(columns))


@dataclass(frozen=True)
class Channels:
    """The intermediate channels of one MLP, or of one expert."""

    inputs: list[Piece]
    """The gate and the other, or the only one."""
    activation: Callable[[torch.Tensor], torch.Tensor]
    output: torch.Tensor
    """(d, m)."""

    @property
    def count(self) -> int:
        """m."""
        return self.output.shape[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What enters the output map: (n, d) to (n, m)."""
        first, *others = (part(x) for part in self.inputs)
        result = self.activation(first)
        for other in others:
            result = result * other
        return result


def mlps_of(model: PreTrainedModel, layer: nn.Module) -> list[Channels]:
    """The MLP of one decoder layer of a stock ``model``, or its experts."""
    mlp = getattr(layer, "mlp", None)
    match model.config.model_type:
        case "opt":
            return [Channels([piece(layer.fc1)], layer.activation_fn, piece(layer.fc2).weight)]
        case "gpt2" | "starcoder2":
            return [Channels([piece(mlp.c_fc)], mlp.act, piece(mlp.c_proj).weight)]
        case "gpt_neox":
            return [Channels([piece(mlp.dense_h_to_4h)], mlp.act, piece(mlp.dense_4h_to_h).weight)]
        case "phi":
            return [Channels([piece(mlp.fc1)], mlp.activation_fn, piece(mlp.fc2).weight)]
        case "phi3":
            return [Channels(piece(mlp.gate_up_proj).cut(2), mlp.activation_fn, piece(mlp.down_proj).weight)]
    if hasattr(mlp, "experts"):
        experts = mlp.experts
        pairs = zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True)
        return [Channels(Piece(inputs, None).cut(2), experts.act_fn, output) for inputs, output in pairs]
    return [Channels([piece(mlp.gate_proj), piece(mlp.up_proj)], mlp.act_fn, piece(mlp.down_proj).weight)]


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer has experts in place of the MLP."""
    return hasattr(getattr(layer, "mlp", None), "experts")


def query_key_norms(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The norms of queries and keys of one decoder layer."""
    attention = attention_of(layer)
    for names in (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm")):
        if hasattr(attention, names[0]):
            return getattr(attention, names[0]), getattr(attention, names[1])
    return None


def rotating_channels(model: PreTrainedModel, size: int) -> int:
    """How many of a head's ``size`` channels the rotary embedding turns."""
    if model.config.model_type in ("gpt2", "opt"):
        return 0
    if model.config.model_type not in ("phi", "phi3", "gpt_neox", "stablelm"):
        return size  # whatever the config says
    return int(size * model.config.rope_parameters.get("partial_rotary_factor", 1.0))


def rotating_pairs(model: PreTrainedModel, size: int) -> list[list[int]]:
    """The channels of a head that the rotary embedding turns into each other."""
    rotating = rotating_channels(model, size)
    if model.config.model_type == "cohere":
        return [[2 * pair, 2 * pair + 1] for pair in range(rotating // 2)]
    return [[pair, pair + rotating // 2] for pair in range(rotating // 2)]
