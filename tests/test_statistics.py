"""Gathered statistics against plain loops over the stock model's own projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from helpers import mixed, tiny_llama
from modegpt import statistics
from modegpt.activations import Activations
from modegpt.data import TokenWindows
from modegpt.engine import Engine
from modegpt.families import decoder_layers, family_of
from modegpt.layered import resident
from modegpt.layout import HeadShape
from modegpt.parallel import Workers
from modegpt.runner import LayerRunner
from modegpt.statistics import GramSum, LayerStatistics, StatisticsCollector, observable, sampled_tokens

WINDOWS, LENGTH = 5, 12
NAMES = ("attention_input", "query", "key", "mlp")

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
}


def windows(padding: str = "none") -> TokenWindows:
    """Random windows; padded ones hold 12, 7, 1, 10 and 4 real tokens."""
    ids = torch.randint(0, 128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    columns, lengths = torch.arange(LENGTH), torch.tensor([[12], [7], [1], [10], [4]])
    masks = {
        "none": None,
        "right": columns < lengths,
        "left": columns >= LENGTH - lengths,
        "scattered": (columns + columns // 3) % lengths.clamp_min(2) == 0,
    }
    return TokenWindows(ids, masks[padding])


def runner_of(model: LlamaForCausalLM, data: TokenWindows) -> LayerRunner:
    return LayerRunner(resident(model), [data], Workers())


def collector_of(model: LlamaForCausalLM, layer: nn.Module) -> StatisticsCollector:
    description = family_of(model).description
    return StatisticsCollector(layer, description, HeadShape.of(layer, model.config, description), NAMES)


def collect(model: LlamaForCausalLM, data: TokenWindows, batch_size: int) -> list[LayerStatistics]:
    """The statistics of every layer, each fed with the dense outputs of the one before."""
    family, batches = family_of(model), list(data.batches(batch_size))
    results = []
    hidden = Activations(len(batches))
    with observable(model), LayerRunner(resident(model), batches, Workers()).active() as runner:
        for index, layer in enumerate(decoder_layers(model, family)):
            collector = collector_of(model, layer)
            with collector.attached():
                runner.run_layer(index, hidden, before=collector.next_batch)
            results.append(collector.result(Workers()))
    return results


@dataclass
class Reference:
    """What one layer does to the real tokens of one window, by hand."""

    attention_input: torch.Tensor  # (n, d)
    query: torch.Tensor  # (H, n, h)
    key: torch.Tensor  # (G, n, h)
    mlp: torch.Tensor  # (n, m)
    output: torch.Tensor  # (n, d)


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Divided by its root mean square in float32, as the stock norm does."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (x32 * scale).to(x.dtype)


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn channels i and i + h/2 of each row of x (n, h) by position * theta^(-2i/h), angles in float32."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    result = torch.empty_like(x)
    for i in range(half):
        angles = positions.float() * frequencies[i]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        result[:, i] = cos * x[:, i] - sin * x[:, i + half]
        result[:, i + half] = cos * x[:, i + half] + sin * x[:, i]
    return result


def reference_layer(layer: nn.Module, hidden: torch.Tensor, positions: torch.Tensor, config: Any) -> Reference:
    """One decoder layer on the real tokens (n, d) of one window, which stand at ``positions``."""
    attention, heads, groups = layer.self_attn, config.num_attention_heads, config.num_key_value_heads
    x = rms_norm(hidden, layer.input_layernorm)
    theta, size = config.rope_parameters["rope_theta"], config.head_dim
    query = [rotate(part, positions, theta) for part in attention.q_proj(x).split(size, dim=-1)]
    key = [rotate(part, positions, theta) for part in attention.k_proj(x).split(size, dim=-1)]
    value = attention.v_proj(x).split(size, dim=-1)
    mixed = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = query[head] @ key[group].T / size**0.5
        scores = scores.masked_fill(positions[:, None] < positions[None, :], -torch.inf)
        mixed.append(scores.softmax(-1) @ value[group])
    middle = hidden + attention.o_proj(torch.cat(mixed, dim=-1))
    normed = rms_norm(middle, layer.post_attention_layernorm)
    gate = layer.mlp.gate_proj(normed)
    inner = gate * gate.sigmoid() * layer.mlp.up_proj(normed)
    return Reference(x, torch.stack(query), torch.stack(key), inner, middle + layer.mlp.down_proj(inner))


@torch.no_grad()
def reference(model: LlamaForCausalLM, data: TokenWindows) -> list[dict[str, torch.Tensor]]:
    """Sums of outer products over the real tokens of every window, each window alone and without its padding."""
    config, layers = model.config, model.model.layers
    masks = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    sums: list[dict[str, Any]] = [dict.fromkeys(NAMES, 0.0) for _ in layers]
    for ids, mask in zip(data.ids, masks, strict=True):
        positions = mask.nonzero().flatten()
        hidden = model.model.embed_tokens(ids[mask])
        for total, layer in zip(sums, layers, strict=True):
            result = reference_layer(layer, hidden, positions, config)
            for token in range(len(positions)):
                for name in NAMES:
                    row = getattr(result, name)[..., token, :].double()
                    total[name] = total[name] + row[..., :, None] * row[..., None, :]
            hidden = result.output
    for total in sums:
        total["query"] = total["query"].unflatten(0, (config.num_key_value_heads, -1))
    return sums


def assert_equal_sums(actual: LayerStatistics, expected: Mapping[str, torch.Tensor], rtol: float) -> None:
    for name in NAMES:
        sums = actual[name]
        assert sums.dtype == torch.float64
        assert sums.shape == expected[name].shape
        torch.testing.assert_close(sums, expected[name], rtol=0, atol=rtol * float(expected[name].abs().max()))


# Eager attention computes its softmax in float32 even in a float64 model, so float32 it is.
PRECISIONS = pytest.mark.parametrize(
    ("implementation", "dtype", "rtol"), [("sdpa", torch.float64, 1e-13), ("eager", torch.float32, 5e-6)]
)
PADDINGS = pytest.mark.parametrize("padding", ["none", "right", "left", "scattered"])


@PADDINGS
@PRECISIONS
@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_equal_plain_loops(
    variant: str, implementation: str, dtype: torch.dtype, rtol: float, padding: str
) -> None:
    model = tiny_llama(**VARIANTS[variant], attn_implementation=implementation).to(dtype)
    data = windows(padding)
    tokens = 60 if data.mask is None else int(data.mask.sum())
    for actual, expected in zip(collect(model, data, batch_size=2), reference(model, data), strict=True):
        assert actual.tokens == tokens
        assert actual.is_finite()
        assert_equal_sums(actual, expected, rtol)


@PADDINGS
@pytest.mark.parametrize("batch_size", [2, 3, WINDOWS])
def test_statistics_do_not_depend_on_the_batch_size(batch_size: int, padding: str) -> None:
    model, data = tiny_llama().double(), windows(padding)
    for one, many in zip(collect(model, data, 1), collect(model, data, batch_size), strict=True):
        assert one.tokens == many.tokens
        assert_equal_sums(many, one.sums, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_products_are_off_by_no_more_than_their_resolution_of_the_two_channels(dtype: torch.dtype) -> None:
    """An outlier channel costs the others no precision."""
    model, data = tiny_llama().to(dtype), windows()
    model.model.layers[0].input_layernorm.weight[3] = 1000
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(data.ids)).double().flatten(0, 1)
    statistics = collect(model, data, batch_size=WINDOWS)[0]
    assert statistics.resolution == torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    sizes = x.square().sum(0).sqrt()
    error = (statistics["attention_input"] - x.T @ x).abs() / (sizes[:, None] * sizes)
    assert error.max() <= 4 * statistics.resolution


@pytest.mark.parametrize("columns", [1, 383, 384, 385, 1000, 3500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_sums_in_panels_and_pieces_equal_the_whole_product(columns: int, dtype: torch.dtype) -> None:
    x = mixed(300, min(columns, 40))[:, torch.arange(columns) % 40 if columns > 40 else slice(None)].to(dtype)
    gram = GramSum()
    for piece in x.split(70):
        gram.add(piece)
    total = gram.total(Workers())
    assert torch.equal(total, total.T)
    expected = x.double().T @ x.double()
    sizes = expected.diagonal().sqrt()
    assert ((total - expected).abs() / (sizes[:, None] * sizes)).max() <= 4 * torch.finfo(dtype).eps


def test_long_pieces_are_summed_in_blocks() -> None:
    """A million equal products: float32 alone would stop counting at 2^24."""
    gram = GramSum()
    gram.add(torch.full((20_000_000, 1), 1.0))
    assert gram.total(Workers()).item() == 20_000_000


def test_content_of_masked_positions_does_not_matter() -> None:
    model, data = tiny_llama().double(), windows("left")
    assert data.mask is not None
    other = TokenWindows(torch.where(data.mask, data.ids, 127 - data.ids), data.mask)
    for first, second in zip(collect(model, data, 2), collect(model, other, 2), strict=True):
        assert_equal_sums(second, first.sums, rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_sums_are_noticed(name: str, bad: float) -> None:
    sums = {each: torch.ones(2, 2, dtype=torch.float64) for each in NAMES}
    assert LayerStatistics(sums).is_finite()
    sums[name][0, 1] = bad
    assert not LayerStatistics(sums).is_finite()


def test_non_finite_rows_are_noticed() -> None:
    assert LayerStatistics({}, rows=torch.ones(3, 2)).is_finite()
    assert not LayerStatistics({}, rows=torch.tensor([[0.0, torch.inf]])).is_finite()


@pytest.mark.parametrize("padding", ["none", "right", "left", "scattered"])
@pytest.mark.parametrize("most", [1, 2, 7, 20, 33, 60, 1000])
def test_sampled_tokens_are_windows_first_and_evenly_apart(most: int, padding: str) -> None:
    data = windows(padding)
    with patch.object(statistics, "SAMPLED_ROWS", most):
        chosen = sampled_tokens(data)
    assert chosen.shape == data.ids.shape
    assert 1 <= chosen.sum() <= most
    real = torch.ones_like(chosen) if data.mask is None else data.mask
    assert not (chosen & ~real).any()
    every = {1000: 1, 60: 1, 33: 2, 20: 3, 7: 12, 2: 12, 1: 12}[most]
    apart = {2: 3, 1: 5}.get(most, 1)  # windows
    for index in range(WINDOWS):
        places = chosen[index][real[index]].nonzero().flatten().tolist()
        assert places == (list(range(0, int(real[index].sum()), every)) if index % apart == 0 else [])


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("most", [10, 1000])
def test_rows_are_what_enters_the_mlp_at_the_sampled_tokens(most: int, padding: str) -> None:
    model, data, entering = tiny_llama(), windows(padding), []
    with patch.object(statistics, "SAMPLED_ROWS", most):
        engine = Engine(resident(model), data, 2)
    hidden, layer = Activations(len(engine.batches)), model.model.layers[0]
    gate = layer.mlp.gate_proj
    with engine.active(), engine.runner.active():
        hook = gate.register_forward_pre_hook(lambda _, args: entering.append(args[0].flatten(0, -2)))
        rows = engine.calibrate(0, layer, hidden, {"mlp_rows"}, keep=False).rows
        hook.remove()
    assert rows is not None
    with patch.object(statistics, "SAMPLED_ROWS", most):
        chosen = sampled_tokens(data).flatten()
    assert torch.equal(rows, torch.cat(entering)[chosen])
    assert rows.is_contiguous()
    assert rows.untyped_storage().nbytes() == rows.nbytes  # and not all that they were taken from


@pytest.mark.parametrize("fails", [False, True])
def test_collector_detaches_completely(fails: bool) -> None:
    model, data = tiny_llama(), windows()
    layer = model.model.layers[1]
    collector = collector_of(model, layer)
    with observable(model):
        try:
            with collector.attached():
                collector.next_batch(data)
                model(data.ids)
                if fails:
                    raise RuntimeError("stop")
        except RuntimeError:
            pass
        before = collector.result(Workers())["query"].clone()
        model(data.ids)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in layer.modules())
    assert before.abs().max() > 0
    assert torch.equal(collector.result(Workers())["query"], before)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_observable_leaves_outputs_and_attention_implementation_alone(implementation: str, fails: bool) -> None:
    model, data = tiny_llama(attn_implementation=implementation), windows("left")
    before = model(data.ids, attention_mask=data.mask).logits
    try:
        with observable(model):
            assert model.config._attn_implementation != implementation
            within = model(data.ids, attention_mask=data.mask).logits
            if fails:
                raise RuntimeError("stop")
    except RuntimeError:
        pass
    assert torch.equal(within, before)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        implementation
    }
    assert torch.equal(model(data.ids, attention_mask=data.mask).logits, before)


@PADDINGS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_chained_layers_give_the_stock_hidden_states(implementation: str, padding: str) -> None:
    model, data = tiny_llama(attn_implementation=implementation), windows(padding)
    expected = model.model(data.ids, attention_mask=data.mask, output_hidden_states=True).hidden_states
    hidden = Activations(1)
    with runner_of(model, data).active() as runner:
        for index in range(3):
            entered = []
            runner.run_layer(index, hidden, after=lambda _, entering, leaving, seen=entered: seen.append(entering))
            torch.testing.assert_close(entered[0], expected[index], rtol=0, atol=0)
            if index < 2:
                torch.testing.assert_close(hidden.get(0), expected[index + 1], rtol=0, atol=0)
        torch.testing.assert_close(model.model.norm(hidden.get(0)), expected[3], rtol=0, atol=0)
        logits = torch.cat([part for _, part in runner.head(0, hidden)], dim=1)
    torch.testing.assert_close(logits, model(data.ids, attention_mask=data.mask).logits, rtol=0, atol=0)


@pytest.mark.parametrize("fails", [False, True])
@torch.no_grad()
def test_runner_gives_the_layers_their_forward_back(fails: bool) -> None:
    model, data = tiny_llama(), windows()
    before = model(data.ids).logits
    try:
        with runner_of(model, data).active() as runner:
            runner.run_layer(1, Activations(1))
            assert all("forward" in vars(layer) for layer in model.model.layers)
            if fails:
                raise RuntimeError("stop")
    except RuntimeError:
        pass
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert torch.equal(model(data.ids).logits, before)


def test_runner_gives_back_a_forward_that_others_had_replaced() -> None:
    model = tiny_llama()
    layer = model.model.layers[0]
    layer.forward = replacement = layer.forward
    with runner_of(model, windows()).active():
        pass
    assert vars(layer).get("forward") is replacement


@torch.no_grad()
def test_runner_works_on_after_a_failed_run() -> None:
    model, data = tiny_llama(), windows()
    beyond = TokenWindows(torch.full((1, 4), 128))
    expected, again = Activations(1), Activations(1)
    with runner_of(model, data).active() as runner:
        runner.run_layer(1, expected)
        runner._batches = [beyond]
        with pytest.raises(IndexError):
            runner.run_layer(1, Activations(1))
        runner._batches = [data]
        # No layer is live between runs: all of them pass their input through.
        embedded = model.model.embed_tokens(data.ids)
        assert torch.equal(model.model(data.ids).last_hidden_state, model.model.norm(embedded))
        runner.run_layer(1, again)
        assert torch.equal(again.get(0), expected.get(0))
