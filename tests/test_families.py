"""Every family and configuration: nothing is lost but what is meant to be, in memory, on disk and in generation."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import modegpt
from family_table import (
    BY_NAME,
    ROWS,
    Piece,
    attention_of,
    has_experts,
    heads_of,
    layers_of,
    mlps_of,
    query_key_norms,
    rotating_channels,
    rotating_pairs,
)
from helpers import assert_loads_alone, compress_interrupted, tiny_tokenizer
from modegpt.activations import Activations
from modegpt.budget import LayerRanks, kept_parameters, ranks_of
from modegpt.config import CompressionConfig, RunConfig
from modegpt.data import TokenWindows
from modegpt.engine import Compression, Engine, compress_model
from modegpt.families import model_geometry
from modegpt.layered import resident
from modegpt.layout import HeadShape, is_gated
from modegpt.methods import Greedy, ModeGPT
from modegpt.modeling import CompactAttention
from modegpt.parallel import Workers
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.results import Choice
from modegpt.runner import LayerRunner
from modegpt.sources import ModelSource
from modegpt.statistics import LayerStatistics, Statistic, StatisticsCollector, observable, through_mlp

#: Differences in float64 arithmetic, relative to the largest value: far above rounding, far below any mistake.
ROUNDING = 1e-12

EVERY = [row.name for row in ROWS]
WITH_EXPERTS = [row.name for row in ROWS if row.model.startswith(("Mixtral", "Qwen3Moe"))]
WITH_NORMS = [
    row.name
    for row in ROWS
    if row.model.startswith(("Qwen3", "Gemma3", "Olmo2")) or {"qk_layernorm", "use_qk_norm"} & row.settings.keys()
]


def rows(names: list[str] = EVERY) -> pytest.MarkDecorator:
    """The test runs for these rows."""
    return pytest.mark.parametrize("name", names)


@cache
def dense(name: str) -> PreTrainedModel:
    """A row's stock model in float32, not to be changed."""
    return BY_NAME[name].build()


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64, where rounding is far below any mistake."""
    return one_by_one(copy.deepcopy(model).double())


@pytest.fixture
def all_in_float64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary embeddings, routers and softmax leave a float64 model in float64 where they would go to float32."""
    dense(request.node.callspec.params["name"])  # before anything is changed: other tests use it as well
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, nn.functional.softmax

    def stay(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        asked = torch.float32 in (*arguments, *options.values())
        return x if asked and x.dtype == torch.float64 else to(x, *arguments, **options)

    def plain_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", plain_softmax)
    monkeypatch.setattr(torch.Tensor, "to", stay)

    def at_least_double(x: torch.Tensor) -> torch.Tensor:
        whole = not x.is_floating_point()  # positions, which meet frequencies in float64
        return x if x.dtype == torch.float64 else x.double() if whole else single(x)

    monkeypatch.setattr(torch.Tensor, "float", at_least_double)

    def in_single(frequencies: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*arguments: Any, **options: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "float", single)
                found, scaling = frequencies(*arguments, **options)
                return found.double(), scaling

        return compute

    for kind, frequencies in ROPE_INIT_FUNCTIONS.items():  # when made again, what the dense model has
        monkeypatch.setitem(ROPE_INIT_FUNCTIONS, kind, in_single(frequencies))


def one_by_one(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose experts from now on are run one after the other: kernels for all have no float64."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation_internal = "eager"
    return model


def windows(count: int = 8, length: int = 16, *, seed: int = 1, padding: str = "none") -> TokenWindows:
    """Random windows; padded ones hold 16, 9, 2, 13, ... real tokens."""
    ids = torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    columns, lengths = torch.arange(length), torch.tensor([[16], [9], [2], [13]]).repeat(-(-count // 4), 1)[:count]
    masks = {"none": None, "left": columns >= length - lengths, "right": columns < lengths}
    return TokenWindows(ids, masks[padding])


def full_ranks(model: PreTrainedModel) -> list[LayerRanks]:
    """The ranks at which nothing is removed."""
    ranks = []
    for layer in layers_of(model):
        size = heads_of(model, layer).size
        pairs = size // 2 if rotating_channels(model, size) else size
        ranks.append(LayerRanks(mlp=mlps_of(model, layer)[0].count, qk=pairs, vo=size))
    return ranks


def uneven_ranks(model: PreTrainedModel) -> list[LayerRanks]:
    """Values narrower than, wider than and as wide as queries and keys; experts in multiples of 8."""
    shares = [(0.6, 0.75, 0.4), (0.4, 0.5, 0.9), (0.7, 1.0, 1.0)]
    return [
        LayerRanks(
            mlp=round(mlp * full["mlp"] / 8) * 8 if has_experts(layer) else round(mlp * full["mlp"]),
            qk=round(qk * full["qk"]),
            vo=round(vo * full["vo"]),
        )
        for (mlp, qk, vo), full, layer in zip(shares, full_ranks(model), layers_of(model), strict=True)
    ]


def compress_to(
    model: PreTrainedModel,
    ranks: list[LayerRanks],
    data: TokenWindows | None = None,
    *,
    sequential: bool = True,
    ridge: float = 1e-4,
    method: type[ModeGPT] | type[Greedy] = ModeGPT,
) -> Compression:
    engine = Engine(resident(model), data or windows(), 4)
    with engine.active():
        return engine.compress(method(ridge), Choice(ranks, [{} for _ in ranks]), sequential=sequential)


@cache
def compressed(name: str) -> PreTrainedModel:
    """A row's model at uneven ranks in float32, not to be changed."""
    return compress_to(dense(name), uneven_ranks(dense(name))).model


def logits(model: nn.Module, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(windows(4, seed=2).ids if ids is None else ids, **options).logits


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def block_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in layers_of(model).parameters())


def has_norms(model: PreTrainedModel) -> bool:
    return query_key_norms(layers_of(model)[0]) is not None


def is_centred(model: PreTrainedModel) -> bool:
    """Whether the norms of queries and keys are layer norms."""
    return has_norms(model) and model.config.model_type in ("phi", "stablelm", "cohere")


# Nothing removed


@pytest.mark.usefixtures("all_in_float64")
@rows()
def test_full_ranks_leave_a_float64_model_unchanged(name: str) -> None:
    model = double(dense(name))
    same = one_by_one(compress_to(model, full_ranks(model), sequential=False).model)
    for ids in (windows().ids, windows(1, 128).ids):
        assert deviation(logits(same, ids), logits(model, ids)) < ROUNDING


@rows()
def test_full_ranks_leave_the_model_unchanged_in_memory_and_from_disk(name: str, tmp_path: Path) -> None:
    model = dense(name)
    same = compress_to(model, full_ranks(model)).model
    modegpt.save(same, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for ids in (windows().ids, windows(1, 128).ids):
        torch.testing.assert_close(logits(same, ids), logits(model, ids), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(logits(loaded, ids), logits(same, ids), rtol=1e-5, atol=2e-5)


# Nothing removed that matters


def dead_channels(model: PreTrainedModel, *, copies: bool = True) -> list[int]:
    """Make a third of every MLP's channels do without: dead ones and, unless there are few tokens, two copies."""
    choose, ranks = random.Random(0), []
    for layer in layers_of(model):
        for channels in mlps_of(model, layer):
            rank = channels.count - channels.count // 3
            gone = choose.sample(range(channels.count), channels.count // 3 + 1)
            first, others, dead = gone[0], gone[1:3], gone[3:]
            for part in channels.inputs:
                part.silence(dead if copies else gone[1:])
                if copies:
                    part.repeat(first, others)
        ranks.append(rank)
    return ranks


def dead_pairs(model: PreTrainedModel) -> list[int]:
    """Make some channels of queries and keys zero where they enter attention, others in every group."""
    choose, ranks = random.Random(1), []
    centred = is_centred(model)
    for layer in layers_of(model):
        heads = heads_of(model, layer)
        pairs = rotating_pairs(model, heads.size)
        still = range(2 * len(pairs), heads.size)
        per_group = len(heads.query) // len(heads.key)
        if centred and getattr(query_key_norms(layer)[0], "bias", None) is not None:
            query_key_norms(layer)[0].bias.detach().zero_()
        for group, key in enumerate(heads.key):
            if pairs:
                least = max(0, 2 - len(still) // 2)
                turned = choose.randint(least, min(2, len(pairs)))
                dead = [channel for pair in choose.sample(pairs, turned) for channel in pair]
                dead += choose.sample(still, 2 * (2 - turned))
            else:
                dead = choose.sample(still, 3)
            for part in (key, *heads.query[group * per_group : (group + 1) * per_group]):
                part.silence(dead)
                if centred:
                    centre(part, [channel for channel in range(heads.size) if channel not in dead])
        ranks.append(heads.size // 2 - 2 if pairs else heads.size - 3)
    return ranks


def centre(part: Piece, live: list[int]) -> None:
    """Make the mean over a head's channels zero, so that a layer norm leaves the dead ones zero."""
    part.weight[live] -= part.weight[live].mean(0)
    if part.bias is not None:
        part.bias[live] -= part.bias[live].mean()


def low_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    singular[rank:] = 0
    return left * singular @ right


def low_rank_values(model: PreTrainedModel) -> list[int]:
    """Make value maps rank-deficient or, in every other layer where each head has its own, output maps."""
    ranks = []
    for index, layer in enumerate(layers_of(model)):
        heads = heads_of(model, layer)
        rank = heads.size - 3
        own = len(heads.query) == len(heads.value)
        for weight in heads.output if own and index % 2 else [part.weight for part in heads.value]:
            weight.copy_(low_rank(weight, rank))
        ranks.append(rank)
    return ranks


def prepared(model: PreTrainedModel, module: str, **options: Any) -> list[LayerRanks]:
    """Make parts of ``model`` superfluous; returns the ranks that do without them."""
    columns = {field: [rank[field] for rank in full_ranks(model)] for field in ("mlp", "qk", "vo")}
    if module in ("mlp", "all"):
        columns["mlp"] = dead_channels(model, **options)
    if module in ("qk", "all"):
        columns["qk"] = dead_pairs(model)
    if module in ("vo", "all"):
        columns["vo"] = low_rank_values(model)
    return [ranks_of(dict(zip(columns, rank, strict=True))) for rank in zip(*columns.values(), strict=True)]


def lossless_deviation(model: PreTrainedModel, ranks: list[LayerRanks], data: TokenWindows) -> float:
    """What compression to ``ranks`` changes; the ridge is so small that copies alone have low leverage."""
    result = compress_to(model, ranks, data, sequential=False, ridge=1e-10)
    assert all(module.relative_error < 1e-6 for layer in result.layers for module in layer.modules.values())
    thin = one_by_one(result.model)
    # A ReLU that no calibration token opens looks as dead as one that nothing can open.
    ids = data.ids if model.config.model_type == "opt" else None
    return deviation(logits(thin, ids), logits(model, ids))


@pytest.mark.usefixtures("all_in_float64")
@pytest.mark.parametrize("module", ["mlp", "qk", "vo", "all"])
@rows()
def test_removing_what_carries_nothing_is_exact(name: str, module: str) -> None:
    model = double(dense(name))
    before = logits(model)
    ranks = prepared(model, module)
    assert deviation(logits(model), before) > 1e-3
    assert lossless_deviation(model, ranks, windows(24)) < ROUNDING


@pytest.mark.usefixtures("all_in_float64")
@rows()
def test_the_greedy_method_finds_what_carries_nothing(name: str) -> None:
    model = double(dense(name))
    same = compress_to(model, full_ranks(model), sequential=False, method=Greedy).model
    assert deviation(logits(same), logits(model)) < ROUNDING
    ranks = prepared(model, "all")
    data = windows(24)
    thin = compress_to(model, ranks, data, sequential=False, ridge=1e-10, method=Greedy).model
    ids = data.ids if model.config.model_type == "opt" else None
    assert deviation(logits(thin, ids), logits(model, ids)) < 1e-6  # of a ridge of 1e-10


def copied_halves(model: PreTrainedModel) -> list[LayerRanks]:
    """Make half of the channels that enter a norm equal to the others, and irrelevant to attention scores.

    The norms go on dividing by the size of all channels only if those that stay count twice. In every layer the
    queries (or the keys) have the copies, and the keys (or the queries) have zeros there.
    """
    choose, ranks = random.Random(2), full_ranks(model)
    for index, layer in enumerate(layers_of(model)):
        heads, norms = heads_of(model, layer), query_key_norms(layer)
        assert norms is not None
        per_group = len(heads.query) // len(heads.key)
        for group, key in enumerate(heads.key):
            pairs = rotating_pairs(model, heads.size)
            still = list(range(2 * len(pairs), heads.size))
            pairs += [still[start : start + 2] for start in range(0, len(still), 2)]
            gone = choose.sample(pairs, len(pairs) // 2)
            dropped = [channel for pair in gone for channel in pair]
            stay = [channel for channel in range(heads.size) if channel not in dropped]
            queries = heads.query[group * per_group : (group + 1) * per_group]
            copying, silent = (queries, [key]) if index % 2 else ([key], queries)
            for part in copying:
                for kept, copy_of_it in zip(stay, dropped, strict=True):
                    part.repeat(kept, [copy_of_it])
            for part in silent:
                part.silence(dropped)
                if is_centred(model):
                    centre(part, stay)
        bias = getattr(norms[0 if index % 2 == 0 else 1], "bias", None)
        if bias is not None:
            bias.detach().zero_()
        ranks[index] = {**ranks[index], "qk": ranks[index]["qk"] // 2}
    return ranks


@pytest.mark.usefixtures("all_in_float64")
@rows(WITH_NORMS)
def test_norms_go_on_dividing_by_what_is_gone(name: str) -> None:
    model = double(dense(name))
    ranks = copied_halves(model)
    assert lossless_deviation(model, ranks, windows()) < ROUNDING


@pytest.mark.usefixtures("all_in_float64")
@rows(WITH_EXPERTS)
def test_dead_channels_of_experts_with_few_tokens_go_without_a_trace(name: str) -> None:
    model = double(dense(name))
    ranks = prepared(model, "mlp", copies=False)
    assert lossless_deviation(model, ranks, windows(1, 4)) < ROUNDING


# Statistics


def collect(model: PreTrainedModel, data: TokenWindows) -> list[LayerStatistics]:
    """The statistics of every layer, each fed with the dense outputs of the one before."""
    family, batches = resident(model).family, list(data.batches(3))
    results, hidden = [], Activations(len(batches))
    with observable(model), LayerRunner(resident(model), batches, Workers()).active() as runner:
        for index, layer in enumerate(layers_of(model)):
            description = family.description
            heads = HeadShape.of(layer, model.config, description)
            collector = StatisticsCollector(layer, description, heads, get_args(Statistic))
            with collector.attached():
                runner.run_layer(index, hidden, before=collector.next_batch)
            results.append(collector.result(Workers()))
    return results


def normed(x: torch.Tensor, norm: nn.Module, model: PreTrainedModel) -> torch.Tensor:
    """Queries or keys (heads, n, h) through their norm."""
    kind, config = model.config.model_type, model.config
    eps = config.layer_norm_eps if hasattr(config, "layer_norm_eps") else config.rms_norm_eps
    parts = list(norm.norms) if hasattr(norm, "norms") else [norm]
    weight = torch.cat([part.weight.detach() for part in parts]).reshape(-1, 1, x.shape[-1])
    if is_centred(model):
        x = x - x.mean(2, keepdim=True)
    scale = x.square().mean((0, 2) if kind == "olmo2" else 2, keepdim=True) + eps
    bias = getattr(norm, "bias", None)
    offset = 1.0 if kind == "gemma3_text" else 0.0
    return x / scale.sqrt() * (weight + offset) + (0.0 if bias is None else bias.detach())


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Queries or keys (heads, n, h) with every rotary pair turned; ``cos`` and ``sin`` are (n, R)."""
    result = x.clone()
    for first, second in rotating_pairs(model, x.shape[-1]):
        assert torch.equal(cos[:, first], cos[:, second])
        result[..., first] = x[..., first] * cos[:, first] - x[..., second] * sin[:, first]
        result[..., second] = x[..., second] * cos[:, first] + x[..., first] * sin[:, first]
    return result


def relative_squares(x: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Squares of projected queries or keys (heads, n, h) in units of what their norm divides by."""
    x = x - x.mean(2, keepdim=True) if is_centred(model) else x
    if model.config.model_type == "olmo2" and len(x) > 1:
        x = x.movedim(0, 1).flatten(1)
    return x.square() / x.square().mean(-1, keepdim=True)


def routed(layer: nn.Module, x: torch.Tensor, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts (n, k) that the router chooses for every token, and their weights."""
    config = model.config
    chances = (x @ layer.mlp.gate.weight.detach().T).softmax(-1)
    weights, chosen = chances.topk(config.num_experts_per_tok, dim=-1)
    if config.model_type == "mixtral" or config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights


@torch.no_grad()
def inputs_of_layers(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> list[dict[str, Any]]:
    """What enters every layer's attention and MLP in a plain forward of one window (T,) without padding."""
    seen: list[dict[str, Any]] = [{} for _ in layers_of(model)]
    handles = []
    for layer, found in zip(layers_of(model), seen, strict=True):

        def attention(_: nn.Module, args: Any, kwargs: Any, found: dict[str, Any] = found) -> None:
            found["attention"] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]
            found["rotary"] = kwargs.get("position_embeddings")
            found["mask"] = kwargs.get("attention_mask")

        def mlp(_: nn.Module, args: Any, found: dict[str, Any] = found) -> None:
            found["mlp"] = args[0].reshape(len(ids), -1)

        handles.append(attention_of(layer).register_forward_pre_hook(attention, with_kwargs=True))
        entrance = layer.fc1 if model.config.model_type == "opt" else layer.mlp
        handles.append(entrance.register_forward_pre_hook(mlp))
    model(ids[None], position_ids=positions[None], use_cache=False)
    masks = [found["mask"] for found in seen]
    if any(mask is None for mask in masks):  # only eager attention always has one
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        states = [dict(found) for found in seen]
        model(ids[None], position_ids=positions[None], use_cache=False)
        masks = [found["mask"] for found in seen]
        model.set_attn_implementation(implementation)
        seen = states
    for found, mask in zip(seen, masks, strict=True):
        assert mask is not None
        found["mask"] = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    for handle in handles:
        handle.remove()
    return seen


def grams(x: torch.Tensor) -> torch.Tensor:
    """(..., n, h) to (..., h, h)."""
    return x.mT @ x


def moments(x: torch.Tensor) -> torch.Tensor:
    """(n, h) to the sums of x and x^2 (2, h)."""
    return torch.stack((x.sum(0), x.square().sum(0)))


def scaling_of(model: PreTrainedModel, layer: nn.Module) -> float:
    """Of the scores; OPT's queries have it already."""
    return 1.0 if model.config.model_type == "opt" else float(attention_of(layer).scaling)


def attention_weights(
    model: PreTrainedModel, layer: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights (T, T) that one head pays, and how its scores (before any soft cap) change the capped ones."""
    scores = query @ key.T * scaling_of(model, layer)
    slope = torch.ones_like(scores)
    if cap := getattr(model.config, "attn_logit_softcapping", None):
        slope = 1 - (scores / cap).tanh().square()
        scores = (scores / cap).tanh() * cap
    return scores.masked_fill(~mask, -torch.inf).softmax(-1), slope


def logit_features(model: PreTrainedModel, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What every channel adds to a logit (h,); of a rotary pair first what both add, then what they would, turned."""
    result = query * key
    for first, second in rotating_pairs(model, len(query)):
        result[first] = query[first] * key[first] + query[second] * key[second]
        result[second] = query[second] * key[first] - query[first] * key[second]
    return result


def attention_sums(
    model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Any], query: torch.Tensor, key: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over what the heads put out and their logits' features; ``query`` (H, T, h), ``key`` (G, T, h)."""
    x, heads, scaling = inputs["attention"], heads_of(model, layer), scaling_of(model, layer)
    logits, outputs = [], []
    for number, states in enumerate(query):
        group = number * len(key) // len(query)
        weights, slope = attention_weights(model, layer, states, key[group], inputs["mask"])
        value = heads.value[group](x)
        if (bias := heads.value[group].bias) is not None:
            value = value - bias
        outputs.append(weights @ value)
        total = torch.zeros(heads.size, heads.size, dtype=x.dtype)
        for token, paid in enumerate(weights):
            features = (
                torch.stack([logit_features(model, states[token], other) * scaling for other in key[group]])
                * slope[token][:, None]
            )
            features = features - paid @ features
            total += features.T @ (paid[:, None] * features)
        logits.append(total)
    put_out = torch.cat(outputs, dim=-1)
    return {
        "head_outputs": grams(put_out),
        "head_outputs_moments": moments(put_out),
        "logits": torch.stack(logits),
        "value": grams(torch.stack([x @ part.weight.T for part in heads.value])),
    }


def layer_sums(model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Second moments of one window's tokens in one layer."""
    x, heads, norms = inputs["attention"], heads_of(model, layer), query_key_norms(layer)
    sums, rotated_states = {"attention_input": grams(x), "attention_input_moments": moments(x)}, {}
    for number, (name, parts) in enumerate((("query", heads.query), ("key", heads.key))):
        states = torch.stack([part(x) for part in parts])
        if norms is not None:
            sums[f"{name}_squares"] = grams(relative_squares(states, model))
            states = normed(states, norms[number], model)
        if rotating_channels(model, heads.size):
            cos, sin = inputs["rotary"]
            states = rotated(states, cos[0], sin[0], model)
        if name == "query" and model.config.model_type == "opt":
            states = states / heads.size**0.5
        rotated_states[name] = states
        sums[name] = grams(states)
    sums |= attention_sums(model, layer, inputs, rotated_states["query"], rotated_states["key"])
    mlps = mlps_of(model, layer)
    if not has_experts(layer):
        x, z = inputs["mlp"], mlps[0](inputs["mlp"])
        if len(mlps[0].inputs) == 2:
            sums["mlp_rows"] = x
        return sums | {
            "mlp_input": grams(x),
            "mlp": grams(z),
            "mlp_moments": moments(z),
            "mlp_input_moments": moments(x),
        }
    chosen, weights = routed(layer, inputs["mlp"], model)
    inner = [torch.zeros(1, mlps[0].count, dtype=x.dtype) for _ in mlps]
    entering = [torch.zeros(1, x.shape[-1], dtype=x.dtype) for _ in mlps]
    for token, (experts, shares) in enumerate(zip(chosen.tolist(), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            row = inputs["mlp"][token : token + 1]
            inner[expert] = torch.cat((inner[expert], mlps[expert](row) * share))
            entering[expert] = torch.cat((entering[expert], row))
    return sums | {
        "mlp": torch.stack([grams(part) for part in inner]),
        "mlp_moments": torch.stack([moments(part) for part in inner]),
        "mlp_input_moments": torch.stack([moments(part) for part in entering]),
        "tokens": torch.tensor([len(part) - 1 for part in inner]),
    }


def join(some: torch.Tensor, more: torch.Tensor, name: str) -> torch.Tensor:
    return torch.cat((some, more)) if name == "mlp_rows" else some + more


def reference(model: PreTrainedModel, data: TokenWindows) -> list[dict[str, Any]]:
    """The sums over all windows, each alone and without its padding, and the rows of all one after the other."""
    masks = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    totals: list[dict[str, Any]] = [{} for _ in layers_of(model)]
    for ids, mask in zip(data.ids, masks, strict=True):
        positions = mask.nonzero().flatten()
        if model.config.model_type == "opt":  # it counts real tokens
            positions = torch.arange(len(positions))
        inputs = inputs_of_layers(model, ids[mask], positions)
        for total, layer, entering in zip(totals, layers_of(model), inputs, strict=True):
            for name, value in layer_sums(model, layer, entering).items():
                total[name] = join(total[name], value, name) if name in total else value
    for total, layer in zip(totals, layers_of(model), strict=True):
        groups = len(heads_of(model, layer).key)
        for name in ("query", "query_squares", "logits"):
            if name in total and total[name].dim() == 3:
                total[name] = total[name].unflatten(0, (groups, -1))
    return totals


@pytest.mark.usefixtures("all_in_float64")
@pytest.mark.parametrize(("padding", "attention"), [("none", None), ("left", None), ("right", "eager")])
@rows()
def test_statistics_equal_plain_loops(name: str, padding: str, attention: str | None) -> None:
    model, data = double(dense(name)), windows(4, padding=padding)
    if attention is not None:
        model.set_attn_implementation(attention)
    for actual, expected in zip(collect(model, data), reference(model, data), strict=True):
        assert actual.tokens == data.tokens
        assert actual.expert_tokens == (tuple(expected.pop("tokens").tolist()) if "tokens" in expected else None)
        rows = expected.pop("mlp_rows", None)
        assert (actual.rows is None) == (rows is None)
        if rows is not None:
            assert deviation(actual.rows, rows) < ROUNDING
        assert actual.sums.keys() == expected.keys()
        for field, value in actual.sums.items():
            assert value.shape == expected[field].shape
            assert deviation(value, expected[field]) < ROUNDING, field


@pytest.mark.usefixtures("all_in_float64")
@rows()
def test_rows_through_the_mlp_are_what_its_maps_make_of_them(name: str) -> None:
    model = double(dense(name))
    for layer in layers_of(model):
        mlps = mlps_of(model, layer)
        gated = len(mlps[0].inputs) == 2 and not has_experts(layer)
        assert is_gated(layer, resident(model).family.description) == gated
        if gated:
            x = torch.randn(7, model.config.hidden_size, dtype=torch.float64)
            kept = torch.arange(1, mlps[0].count, 2)
            gates, channels, outputs = through_mlp(layer, resident(model).family.description, x, kept)
            expected, whole = mlps[0].activation(mlps[0].inputs[0](x)), mlps[0](x)
            assert deviation(gates, expected[:, kept]) < ROUNDING
            assert deviation(channels, whole[:, kept]) < ROUNDING
            assert deviation(outputs, whole @ mlps[0].output.T) < ROUNDING


@torch.no_grad()
def reference_influence(model: PreTrainedModel, data: TokenWindows) -> list[tuple[float, float, float]]:
    """1 - E[cos] of the residual stream before and after every layer and between its parts, from a plain forward."""
    seen: list[list[torch.Tensor]] = []
    handles = []
    config = model.config

    def first(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    for layer in layers_of(model):

        def attention(_: nn.Module, __: Any, output: Any, layer: nn.Module = layer) -> None:
            step = first(output) * getattr(config, "residual_multiplier", 1.0)
            if config.model_type in ("gemma2", "gemma3_text", "olmo2"):
                step = layer.post_attention_layernorm(step)
            between = seen[-1][0] + step
            if config.model_type == "opt" and not config.do_layer_norm_before:
                between = layer.self_attn_layer_norm(between)
            seen[-1].append(between)

        handles += [
            layer.register_forward_pre_hook(lambda _, args: seen.append([args[0]])),
            attention_of(layer).register_forward_hook(attention),
            layer.register_forward_hook(lambda _, __, output: seen[-1].append(first(output))),
        ]
    model(data.ids, attention_mask=data.mask)
    for handle in handles:
        handle.remove()
    mask = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    scores = []
    for states in seen:
        start, between, end = (state[mask] for state in states)
        pairs = ((start, end), (start, between), (between, end))
        scores.append(tuple(1 - float(nn.functional.cosine_similarity(*pair, dim=-1).mean()) for pair in pairs))
    return scores


@pytest.mark.parametrize("padding", ["none", "left"])
@rows()
def test_block_influence_is_one_minus_the_mean_cosine(name: str, padding: str) -> None:
    model, data = dense(name), windows(6, padding=padding)
    engine = Engine(resident(model), data, 4)
    with engine.active():
        scores = engine.block_influence()
    for actual, expected in zip(scores, reference_influence(model, data), strict=True):
        assert actual == pytest.approx(expected, abs=2e-6)


# Sizes


@rows()
def test_counted_parameters_are_the_model_s(name: str) -> None:
    model = dense(name)
    for ranks, thin in (
        (uneven_ranks(model), compressed(name)),
        (full_ranks(model), compress_to(model, full_ranks(model), sequential=False).model),
    ):
        assert kept_parameters(model_geometry(model), ranks) == block_parameters(thin)


@rows()
def test_the_ratio_is_met(name: str) -> None:
    model = dense(name)
    for allocation in ("uniform", "block-influence-split"):
        result = compress_model(model, windows(), CompressionConfig.validated(ratio=0.3, allocation=allocation))
        assert torch.tensor(result.choice.scores or []).isfinite().all()
        assert logits(result.model).isfinite().all()
        assert abs(1 - block_parameters(result.model) / block_parameters(model) - 0.3) < 0.015


# Running


def greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **settings, **options)[:, ids.shape[1] :]


@pytest.mark.usefixtures("all_in_float64")
@rows()
def test_cached_generation_equals_uncached(name: str) -> None:
    model, ids = double(compressed(name)), windows(2, 10, seed=3).ids
    expected = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static", disable_compile=True), expected)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert torch.equal(greedy(model, padded, mask), expected)


@rows()
def test_sdpa_and_eager_agree(name: str) -> None:
    model = copy.deepcopy(compressed(name))
    if getattr(model.config, "attn_logit_softcapping", None) or model.config._attn_implementation == "eager":
        pytest.skip("soft caps are for eager attention alone")
    fused = logits(model)
    model.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in model.modules() if isinstance(m, CompactAttention)} == {"eager"}
    torch.testing.assert_close(logits(model), fused, rtol=1e-4, atol=1e-4)


@rows(WITH_EXPERTS)
def test_experts_run_as_in_the_dense_model_and_as_told(name: str) -> None:
    model = copy.deepcopy(dense(name))
    model.set_experts_implementation("eager")
    thin = compress_to(model, uneven_ranks(model)).model
    configs = [module.config for module in thin.modules() if hasattr(module, "gate_up_proj")]
    assert configs
    assert {config._experts_implementation for config in (thin.config, *configs)} == {"eager"}
    thin.set_experts_implementation("grouped_mm")
    assert {config._experts_implementation for config in (thin.config, *configs)} == {"grouped_mm"}


# From disk


@rows()
def test_a_compressed_checkpoint_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    thin, ids = compressed(name), windows(4, seed=2).ids
    modegpt.save(thin, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    for model in (loaded, modegpt.load(tmp_path / "model"), modegpt.load(tmp_path / "again")):
        assert_equal(model.state_dict(), thin.state_dict())
        buffers = (dict(one.named_buffers(remove_duplicate=False)) for one in (model, thin))
        assert_equal(*buffers)
        # Products of equal matrices may differ in their last bit with where the matrices lie in memory.
        torch.testing.assert_close(logits(model), logits(thin), rtol=1e-5, atol=1e-5)
    base = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(
            base(ids).last_hidden_state, thin.base_model(ids).last_hidden_state, rtol=1e-5, atol=1e-5
        )


@rows()
def test_bfloat16_keeps_the_rotary_pairs(name: str, tmp_path: Path) -> None:
    model, half = (copy.deepcopy(model).bfloat16() for model in (dense(name), compressed(name)))
    modegpt.save(half, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert_equal(loaded.state_dict(), half.state_dict())
    for thin in (loaded, compress_to(model, uneven_ranks(model)).model):
        kept = [module.rotary_pairs for module in thin.modules() if isinstance(module, CompactAttention)]
        assert len(kept) == 3
        assert {None if pairs is None else pairs.dtype for pairs in kept} <= {None, torch.int64}
        assert greedy(thin, windows(2, 10).ids).shape == (2, 8)
    # Where a token's experts are chosen by a hair, rounding chooses others.
    tolerance = 0.2 if any(has_experts(layer) for layer in layers_of(model)) else 0.06
    exact = logits(compressed(name))
    assert (logits(loaded).float() - exact).norm() < tolerance * exact.norm()
    same = compress_to(model, full_ranks(model)).model
    expected = logits(model).float()
    assert (logits(same).float() - expected).norm() < tolerance * expected.norm()


def assert_equal(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


REMOTE_ROWS = [
    "llama-biases",
    "gemma2",
    "gemma3",
    "phi3",
    "opt-post-norm",
    "gpt2",
    "gpt-neox",
    "cohere-norms",
    "mixtral",
]


def test_loads_without_modegpt_installed(tmp_path: Path) -> None:
    models = {name: compressed(name) for name in REMOTE_ROWS}
    assert_loads_alone(models, windows(4, seed=2).ids, tmp_path)


# The whole way


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Path]:
    """Makes a row's stock checkpoint in several files with a tokenizer, as a Hugging Face directory."""
    tokenizer, scratch = tiny_tokenizer(text_file.read_text()), tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        # Transformers adds a token or two to the tokenizers of some families.
        model = BY_NAME[name].build(vocab_size=len(tokenizer) + 8)
        model.save_pretrained(scratch / name, max_shard_size="100KB")
        tokenizer.save_pretrained(scratch / name)
        return scratch / name

    return make


@rows()
def test_from_disk_to_disk_is_the_same_as_in_memory_and_as_interrupted(
    name: str, checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here survives a crash of the machine anyhow
    options = {"ratio": 0.3, "method": "modegpt", "samples": 6, "sequence_length": 32, "batch_size": 4}

    def config(output: str) -> RunConfig:
        return RunConfig.validated(
            model=str(directory), output=tmp_path / output, calibration=str(text_file), **options
        )

    directory = checkpoint(name)
    report = compress_to_directory(config("whole"))
    written = load_file(tmp_path / "whole" / "model.safetensors")

    source = ModelSource(str(directory))
    stock, texts = source.model(), read_texts(config("whole"), source.tokenizer())
    thin = modegpt.compress(stock, calibration=texts.calibration, **options)
    assert_equal(dict(modegpt.load(tmp_path / "whole").state_dict()), thin.state_dict())
    assert [layer.modules for layer in report.layers] == [layer.modules for layer in thin.compression_report.layers]
    (held_out,) = texts.evaluation.values()
    measured = [modegpt.perplexity(model, held_out, batch_size=4) for model in (stock, thin)]
    assert [report.perplexity.dense, report.perplexity.compressed] == pytest.approx(measured, rel=1e-6)

    assert compress_interrupted(config("resumed")).layers == report.layers  # what experts kept and saw as well
    assert_equal(load_file(tmp_path / "resumed" / "model.safetensors"), written)
