"""A decoder as a plain Llama: one head size, one list of rotary frequencies, zeros where these ask for more.

Engines with fixed layer shapes know queries, keys and values of one head size D in all layers, whose channels i and
i + D / 2 rotate by the i-th frequency of one list, and the softmax scale 1 / sqrt(D). A model whose layers and heads
keep different rotary pairs becomes such a one exactly: the list is the union of what any head keeps, rows of zeros
stand for the pairs that a head does not keep and for the value channels that a layer does not have, and

    W_q <- s a^2 sqrt(D) W_q,

s the model's own softmax scale and a the factor of its rotary embedding (1 for channels that this leaves alone), makes
the logits what they were. Maps that are stored as two thin ones become one.

A model that multiplies its embeddings by m, what its parts add by r and its logits by 1 / z (Granite) is a plain one
whose residual stream is (s / m) x in place of x, for any s. RMS norms do not see that once their epsilon follows:

    E <- s E,  W_o <- (s r / m) W_o,  W_D <- (s r / m) W_D,  epsilon <- (s / m)^2 epsilon,

and the last norm's weight is divided by z, and by s too where the head is E. s is the power of two next to m / r, so
that weights hardly change in size, which formats of few bits would notice.

Where queries and keys have norms of a head's channels (Qwen3), the plain model is a Qwen3: it is the query norm's
weight that carries the softmax scale, and heads have to keep all channels that these norms are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.cwm.modeling_cwm import CwmModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteRMSNorm

from ..errors import InvalidRequest
from ..families import base_model, decoder_layers
from ..layout import HeadShape
from ..likeness import forward_code
from ..modeling import FAMILIES, NORMS, CompactAttention, Family, features, has_experts, stock_config
from ..modeling.modeling_factors import FactorisedLinear
from ..modeling.modeling_modegpt import COMPRESSED
from ..slicing import sliceable
from ..weights import QueryKeyWeights, ValueOutputWeights, read_query_key, read_value_output

#: Model types that are a Llama with other names, biases, packing or multipliers, or with query and key norms.
LIKE_LLAMA = ("llama", "mistral", "ministral", "phi3", "qwen2", "granite", "qwen3")
#: In place of a rotary frequency of zero, whose factor would be infinite: no float32 angle differs from 0.
_STILL = 1e-30

Tensors = dict[str, torch.Tensor]
#: A rotary pair, and which of a head's pairs with this number: those that do not rotate share one.
Slot = tuple[int, int]


@dataclass(frozen=True)
class PlainShape:
    """The sizes of a plain decoder."""

    hidden: int
    head: int
    """D, even."""
    frequencies: torch.Tensor
    """Radians per token of every slot of a head: (D / 2,) float64, positive."""
    base: float
    """The rotary base of the original model."""
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    """Query and key-value heads of every layer."""
    widths: tuple[int, ...]
    """Of every layer's MLP."""
    context: int
    """Tokens up to which it is the same model."""
    epsilon: float
    """Of the RMS norms."""
    vocabulary: int
    tied: bool
    normed: bool
    """Whether queries and keys have norms, as those of Qwen3."""

    def factors(self) -> torch.Tensor:
        """What the usual frequencies of D channels are divided by: f, theta_i = base^(-2 i / D) / f_i, (D / 2,)."""
        usual = self.base ** -(torch.arange(0, self.head, 2, dtype=torch.float64) / self.head)
        return usual / self.frequencies

    @property
    def usual(self) -> bool:
        """Whether the frequencies are the usual ones, up to float32."""
        return bool((self.factors() - 1).abs().max() < 1e-6)


class PlainDecoder:
    """The tensors of a dense or compressed ``model`` as a plain Llama's, under the names of Transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises :class:`InvalidRequest` for what is no Llama."""
        self.model = model
        family = FAMILIES[model.config.model_type.removeprefix(COMPRESSED)]
        self._family = family.description
        self._layers = decoder_layers(model, family)
        check_plain(model.config)
        if not all(sliceable(layer) or _multiplies(layer) for layer in self._layers):
            raise InvalidRequest(
                "MODEL cannot be a plain Llama: its layers are not x + attention(norm(x)), then x + mlp(norm(x)), with "
                "RMS norms and nothing else ('slicegpt' has adapters)"
            )
        pairs, heads, groups, values = zip(*map(self._sizes, self._layers), strict=True)
        self._slots = _union(pairs)
        head = max(2 * len(self._slots), *values)
        head += head % 2  # channels rotate in pairs
        rotary: Any = base_model(model).get_submodule("rotary_emb")
        self._gains = _gains(rotary, self._slots, head)
        config = stock_config(model.config)
        self._stream = _Stream.of(config)
        self.shape = PlainShape(
            hidden=config.hidden_size,
            head=head,
            frequencies=_frequencies(rotary.inv_freq.double().cpu(), self._slots, head),
            base=float(config.rope_parameters["rope_theta"]),
            heads=heads,
            groups=groups,
            widths=tuple(_width(layer, self._family) for layer in self._layers),
            context=_context(config, self._layers, self._family),
            epsilon=float(config.rms_norm_eps) * (self._stream.scale / self._stream.embedded) ** 2,
            vocabulary=config.vocab_size,
            tied=_tied(model),
            normed=has_norms(model.config),
        )

    def _sizes(self, layer: nn.Module) -> tuple[torch.Tensor, int, int, int]:
        """The rotary pairs of a layer, its query and key-value heads, and the channels of a value head."""
        one = _attention(layer, self._family, self.model)
        groups, per_group = one.query_key.query.shape[:2]
        return one.pairs, groups * per_group, groups, one.value_output.value.shape[-1]

    def __len__(self) -> int:
        return len(self._layers)

    def layer(self, index: int, groups: int | None = None, width: int | None = None) -> Tensors:
        """The tensors of a layer, float64, under their names within it; biases only where there are any.

        With heads and MLP channels of zeros up to so many key-value heads (``groups``) and channels (``width``).
        """
        layer, shape = self._layers[index], self.shape
        tensors = {f"{name}.weight": _gain(layer.get_submodule(name)) for name in NORMS}
        attention = _attention(layer, self._family, self.model)
        qk = _spread(attention.query_key, attention.pairs, self._slots, shape.head)
        scale = attention.scaling * math.sqrt(shape.head) * self._gains.to(qk.query)
        if attention.norms is not None:
            query_norm, key_norm = attention.norms
            tensors |= {"self_attn.q_norm.weight": scale * query_norm, "self_attn.k_norm.weight": key_norm}
            scale = torch.ones_like(scale)
        vo, missing = attention.value_output, shape.head - attention.value_output.value.shape[-1]
        more = (groups or shape.groups[index]) - shape.groups[index]
        value = _pad(vo.value, more, last=missing)  # (G, d, D)
        output = _pad(vo.output.mT, more, last=missing)  # (G, g, d, D)
        query, key = _pad(scale * qk.query, more), _pad(qk.key, more)
        tensors |= {
            "self_attn.q_proj.weight": query.mT.flatten(0, 2),
            "self_attn.k_proj.weight": key.mT.flatten(0, 1),
            "self_attn.v_proj.weight": value.mT.flatten(0, 1),
            "self_attn.o_proj.weight": output.mT.flatten(0, 2).T,
        }
        biases = {
            "q_proj": None if qk.query_bias is None else _pad(scale * qk.query_bias, more),
            "k_proj": None if qk.key_bias is None else _pad(qk.key_bias, more),
            "o_proj": vo.output_bias,
        }
        tensors |= {f"self_attn.{name}.bias": bias.flatten() for name, bias in biases.items() if bias is not None}
        tensors |= _mlp(layer, self._family, (width or shape.widths[index]) - shape.widths[index])
        added = self._stream.scale * self._stream.added / self._stream.embedded
        return {name: added * x if name.split(".")[1] in _WRITING else x for name, x in tensors.items()}

    def rest(self) -> Tensors:
        """Embeddings, final norm and, unless it is tied, the head, in their own dtype."""
        embeddings: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()
        norm: Any = base_model(self.model).get_submodule("norm")
        scale = self._stream.scale
        last = _gain(norm) / (self._stream.read * (scale if self.shape.tied else 1.0))
        tensors = {"model.embed_tokens.weight": scale * embeddings.weight.detach(), "model.norm.weight": last}
        return tensors if self.shape.tied else tensors | {"lm_head.weight": head.weight.detach()}


@dataclass(frozen=True)
class _Stream:
    """What a model multiplies on its residual stream."""

    embedded: float
    """m: the embeddings, by this."""
    added: float
    """r: what attention and MLP add, by this."""
    read: float
    """z: the logits, by 1 / z."""

    @classmethod
    def of(cls, config: Any) -> _Stream:
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        return cls(*(float(getattr(config, name, 1.0)) for name in names))

    @property
    def scale(self) -> float:
        """The power of two next to m / r: the factor s."""
        ratio = self.embedded / self.added
        return 2.0 ** round(math.log2(ratio)) if ratio > 0 else 1.0


def _multiplies(layer: nn.Module) -> bool:
    """Whether a stock layer is x + r attention(norm(x)), then x + r mlp(norm(x)), with RMS norms."""
    same = forward_code(type(layer)) == forward_code(GraniteDecoderLayer)
    return same and all(forward_code(type(getattr(layer, name))) == forward_code(GraniteRMSNorm) for name in NORMS)


#: The maps that add to the residual stream.
_WRITING = ("o_proj", "down_proj")


@dataclass(frozen=True)
class _Attention:
    query_key: QueryKeyWeights
    """All first channels of the pairs first, then all second ones."""
    pairs: torch.Tensor
    """(G, r); the number after the last one for pairs that do not rotate."""
    value_output: ValueOutputWeights
    scaling: float
    norms: tuple[torch.Tensor, torch.Tensor] | None
    """The weights (h,) of the query and the key norm."""


def has_norms(config: PreTrainedConfig) -> bool:
    """Whether the models of a ``config`` have query and key norms."""
    return any(FAMILIES[config.model_type.removeprefix(COMPRESSED)].description.norms)


def alike_in_gguf(normed: bool, tied: bool) -> bool:
    """Whether no architecture of llama.cpp has layers of several widths for such a decoder.

    With query and key norms only one has, and its embeddings are its head.
    """
    return normed and not tied


def check_plain(config: PreTrainedConfig) -> None:
    """Refuse the models of a ``config`` that zeros do not turn into a Llama."""
    kind, problem = config.model_type.removeprefix(COMPRESSED), None
    activation = getattr(config, "hidden_act", None)
    if kind not in LIKE_LLAMA and not _written_alike(kind):
        problem = f"models of type {kind!r} compute something else; those of type {', '.join(LIKE_LLAMA)} can"
    elif activation not in ("silu", "swish"):
        problem = f"the activation of its MLP is {activation!r}, not 'silu'"
    if problem is not None:
        raise InvalidRequest(f"MODEL cannot be a plain Llama: {problem}")


def _written_alike(kind: str) -> bool:
    """Whether undescribed models are these but for names, also in what is around their layers."""
    found = FAMILIES.get(kind)
    if found is None or not found.inferred or any(found.description.norms):
        return False
    known = [FAMILIES[one].description for one in LIKE_LLAMA if one != "granite"]  # whose multipliers are there
    bases = {forward_code(cls) for cls in (CwmModel, *(one.base for one in known))}
    heads = {forward_code(one.causal_lm) for one in known}
    return forward_code(found.description.base) in bases and forward_code(found.description.causal_lm) in heads


def _attention(layer: nn.Module, family: Family, model: PreTrainedModel) -> _Attention:
    """The attention of a stock or compressed ``layer`` in the common form."""
    module: Any = layer.get_submodule(family.attention)
    if isinstance(module, CompactAttention):
        return _compact_attention(module)
    shape = HeadShape.of(layer, model.config, family)
    query_key, pairs = read_query_key(layer, family, shape).compact()
    assert pairs is not None
    norms = (module.q_norm.weight, module.k_norm.weight) if any(family.norms) else None
    return _Attention(query_key, pairs, read_value_output(layer, family, shape), module.scaling, _weights(norms))


def _compact_attention(module: CompactAttention) -> _Attention:
    qk, v = module.qk_head_dim, module.v_head_dim
    (query, query_bias), (key, key_bias), (value, _), (output, output_bias) = (
        _linear(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    groups = key.shape[1] // qk
    assert module.rotary_pairs is not None
    query_key = QueryKeyWeights(
        query=query.unflatten(1, (groups, -1, qk)).permute(1, 2, 0, 3),
        key=key.unflatten(1, (groups, qk)).permute(1, 0, 2),
        query_bias=None if query_bias is None else query_bias.view(groups, -1, qk),
        key_bias=None if key_bias is None else key_bias.view(groups, qk),
    )
    value_output = ValueOutputWeights(
        value=value.unflatten(1, (groups, v)).permute(1, 0, 2),
        output=output.view(groups, -1, v, output.shape[1]),
        output_bias=output_bias,
    )
    norms = [norm for norm in (module.q_norm, module.k_norm) if norm is not None]
    if any(norm.energy.shape[-1] < norm.full or (norm.energy != 1).any() for norm in norms):
        raise InvalidRequest(
            "MODEL cannot be a plain Qwen3: its heads keep some of the channels that their query and key norms are of; "
            "compress with --profile gguf or stock, which leave these whole"
        )
    weights = _weights(tuple(norm.weight[0] for norm in norms) or None)  # all heads' norms are one
    return _Attention(query_key, module.rotary_pairs.cpu(), value_output, module.scaling, weights)


def _weights(norms: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    if norms is None:
        return None
    query, key = (weight.detach().double() for weight in norms)
    return query, key


def _linear(module: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W (in, out) of what the map ``name`` of a ``module`` and those before it compute, and its bias; float64."""
    linear: Any = module.get_submodule(name)
    last = linear.second if isinstance(linear, FactorisedLinear) else linear
    weight = last.weight.detach().double().T
    if isinstance(linear, FactorisedLinear):
        weight = linear.first.weight.detach().double().T @ weight
    shared: Any = getattr(module, "shared_input", None)
    if shared is not None and weight.shape[0] == shared.out_features and name not in _NOT_SHARED:
        weight = shared.weight.detach().double().T @ weight
    return weight, None if last.bias is None else last.bias.detach().double()


_NOT_SHARED = ("v_proj", "o_proj", "down_proj")


def _pad(x: torch.Tensor, first: int, last: int = 0) -> torch.Tensor:
    """``x`` with so many more zeros at the end of its first and of its last dimension."""
    return nn.functional.pad(x, (0, last, *[0, 0] * (x.dim() - 2), 0, first))


def _mlp(layer: nn.Module, family: Family, more: int) -> Tensors:
    """The MLP under Llama's names, with so many ``more`` channels; its input maps may be one."""
    owner = layer.get_submodule("mlp")
    inputs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for path in family.mlp_inputs:
        weight, bias = _linear(owner, path.removeprefix("mlp."))
        parts = 2 // len(family.mlp_inputs)
        biases = [None] * parts if bias is None else bias.chunk(parts)
        inputs += zip(weight.chunk(parts, dim=1), biases, strict=True)
    names = ("gate_proj", "up_proj", "down_proj")
    found = zip(names, [*inputs, _linear(owner, family.mlp_output.removeprefix("mlp."))], strict=True)
    tensors = {}
    for name, (weight, bias) in found:
        out = name == "down_proj"
        tensors[f"mlp.{name}.weight"] = _pad(weight, more if out else 0, 0 if out else more).T
        if bias is not None:
            tensors[f"mlp.{name}.bias"] = bias if out else nn.functional.pad(bias, (0, more))
    return tensors


def _width(layer: nn.Module, family: Family) -> int:
    assert not has_experts(layer, family)
    return features(layer.get_submodule(family.mlp_output))[0]


def _union(rows: Sequence[torch.Tensor]) -> list[Slot]:
    """All slots that any head of any layer needs, ascending."""
    return sorted({slot for pairs in rows for row in pairs.tolist() for slot in _numbered(row)})


def _numbered(pairs: Sequence[int]) -> list[Slot]:
    return [(pair, pairs[:place].count(pair)) for place, pair in enumerate(pairs)]


def _frequencies(own: torch.Tensor, slots: Sequence[Slot], head: int) -> torch.Tensor:
    """Of every slot of a head of ``head`` channels; those that no head uses have any."""
    found = [float(own[pair]) if pair < len(own) else _STILL for pair, _ in slots]
    return torch.tensor(found + [1.0] * (head // 2 - len(found)), dtype=torch.float64)


def _gains(rotary: Any, slots: Sequence[Slot], head: int) -> torch.Tensor:
    """What the rotary embedding does to the size of a product of two channels: (D,). It leaves alone what is still."""
    gains = torch.ones(head // 2, dtype=torch.float64)
    for place, (pair, _) in enumerate(slots):
        if pair < len(rotary.inv_freq):
            gains[place] = float(rotary.attention_scaling) ** 2
    return gains.repeat(2)


def _spread(qk: QueryKeyWeights, pairs: torch.Tensor, slots: Sequence[Slot], head: int) -> QueryKeyWeights:
    """Queries and keys with every pair in its slot: channels (..., D), the slots' first ones before their second."""
    place = {slot: number for number, slot in enumerate(slots)}
    first = torch.tensor([[place[slot] for slot in _numbered(row)] for row in pairs.tolist()])
    channels = torch.cat((first, first + head // 2), dim=-1)  # (G, 2 r)

    def moved(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        index = channels.to(x.device).view(len(channels), *[1] * (x.dim() - 2), -1).expand(x.shape)
        return x.new_zeros(*x.shape[:-1], head).scatter(-1, index, x)

    query, key = moved(qk.query), moved(qk.key)
    assert query is not None
    assert key is not None
    return replace(qk, query=query, key=key, query_bias=moved(qk.query_bias), key_bias=moved(qk.key_bias))


def _gain(norm: Any) -> torch.Tensor:
    weight: torch.Tensor = norm.weight.detach()
    return weight


def _context(config: Any, layers: Sequence[nn.Module], family: Family) -> int:
    """Up to where neither a sliding window nor a rotary embedding that depends on the length makes a difference."""
    limits = [config.max_position_embeddings]
    windows = [getattr(layer.get_submodule(family.attention), "sliding_window", None) for layer in layers]
    if family.sliding_window:  # of all layers, and not in their modules
        windows.append(getattr(config, family.sliding_window))
    limits += [window for window in windows if window is not None]
    parameters = config.rope_parameters
    if parameters.get("rope_type") in ("dynamic", "longrope"):
        limits.append(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    return int(min(limits))


def _tied(model: PreTrainedModel) -> bool:
    one: Any = model.get_input_embeddings()
    other: Any = model.get_output_embeddings()
    return bool(one.weight.data_ptr() == other.weight.data_ptr())
