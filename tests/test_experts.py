"""Experts that calibration reaches well, hardly or not at all: pseudo tokens, and the engine on tiny mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from family_table import BY_NAME
from helpers import mixed, randn, squared
from modegpt.budget import LayerRanks
from modegpt.data import TokenWindows
from modegpt.decompositions import nystrom_decomposition, with_pseudo_tokens
from modegpt.engine import Compression, Engine
from modegpt.families import decoder_layers, family_of, model_geometry
from modegpt.layered import resident
from modegpt.layout import expert_count
from modegpt.methods import ModeGPT
from modegpt.results import Choice

RIDGE = 1e-4
CHANNELS, HIDDEN = 10, 6


def gram_of(tokens: int, seed: int = 0) -> torch.Tensor:
    z = mixed(tokens, CHANNELS, seed=seed)
    return z.T @ z


def inputs(count: int = 2) -> list[torch.Tensor]:
    """Input maps (d, m) whose columns differ in size."""
    sizes = torch.logspace(0, 1, CHANNELS, dtype=torch.float64)[
        torch.randperm(CHANNELS, generator=torch.manual_seed(4))
    ]
    return [randn(HIDDEN, CHANNELS, seed=10 + number) * sizes for number in range(count)]


def products(weights: list[torch.Tensor]) -> list[float]:
    """The product over the input maps of each channel's squared norm."""
    result = [1.0] * CHANNELS
    for weight in weights:
        result = [value * squared(weight[:, i]) for i, value in enumerate(result)]
    return result


def largest(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


@pytest.mark.parametrize("tokens", [CHANNELS, CHANNELS + 1, 1000])
def test_enough_tokens_change_nothing(tokens: int) -> None:
    gram = gram_of(tokens)
    assert torch.equal(with_pseudo_tokens(gram, tokens, inputs(), level=3.0), gram_of(tokens))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 7, CHANNELS - 1])
def test_missing_tokens_equal_their_definition(tokens: int, count: int) -> None:
    gram, weights, level = gram_of(max(1, tokens)) * (tokens > 0), inputs(count), 0.7
    result = with_pseudo_tokens(gram, tokens, weights, level)
    expected, profile = gram.clone(), products(weights)
    for i in range(CHANNELS):
        expected[i, i] += (CHANNELS - tokens) * level * profile[i] / (sum(profile) / CHANNELS)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    assert result.dtype == torch.float64
    missing = (CHANNELS - tokens) * CHANNELS * level  # every missing token has the mean energy in every channel
    assert float((result - gram).trace()) == pytest.approx(missing, rel=1e-9)


def test_the_input_is_not_changed() -> None:
    gram, weights = gram_of(3), inputs()
    with_pseudo_tokens(gram, 3, weights, 1.0)
    assert torch.equal(gram, gram_of(3))
    assert all(torch.equal(one, other) for one, other in zip(weights, inputs(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_less_precision_are_squared_in_float64(dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in inputs()]
    result = with_pseudo_tokens(gram_of(4), 4, weights, 1.0)
    expected = with_pseudo_tokens(gram_of(4), 4, [weight.double() for weight in weights], 1.0)
    assert result.dtype == torch.float64
    assert torch.equal(result, expected)


@pytest.mark.parametrize("level", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("rank", [1, 5, 9])
@pytest.mark.parametrize("count", [1, 2])
def test_without_tokens_the_largest_weights_stay_as_they_are(count: int, rank: int, level: float) -> None:
    weights, output = inputs(count), randn(CHANNELS, HIDDEN)
    gram = with_pseudo_tokens(torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64), 0, weights, level)
    result = nystrom_decomposition(gram, output, rank, RIDGE)
    assert result.kept.tolist() == largest(products(weights), rank)
    assert torch.equal(result.output, output[result.kept])


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_few_tokens_give_a_regular_matrix(tokens: int) -> None:
    gram = gram_of(tokens)
    level = float(gram.diagonal().mean()) / tokens
    assert torch.linalg.matrix_rank(gram, hermitian=True) == tokens
    result = with_pseudo_tokens(gram, tokens, inputs(), level)
    scale = result.diagonal().sqrt()
    assert torch.linalg.eigvalsh(result / scale / scale[:, None]).min() > 1e-5
    assert torch.linalg.eigvalsh(result - gram).min() > 0


@pytest.mark.parametrize("factor", [2.0, 1e-3, 1e4])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_size_of_the_activations_only_scales_the_result(tokens: int, factor: float) -> None:
    """Activations times f: C and the level times f^2, hence the result; kept channels and the output map stay."""
    z, weights, output = mixed(max(1, tokens), CHANNELS) * (tokens > 0), inputs(), randn(CHANNELS, HIDDEN)
    one, other = (
        with_pseudo_tokens((s * z).T @ (s * z), tokens, weights, 0.3 * s**2) for s in (1.0, factor)
    )  # fmt: skip
    torch.testing.assert_close(other, factor**2 * one, rtol=1e-12, atol=0)
    first, second = (nystrom_decomposition(gram, output, 4, RIDGE) for gram in (one, other))
    assert first.kept.tolist() == second.kept.tolist()
    torch.testing.assert_close(first.output, second.output, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-5, 3.0])
def test_size_of_the_weights_does_not_matter(factor: float) -> None:
    weights = inputs()
    scaled = [factor * weights[0], weights[1]]
    first, second = (with_pseudo_tokens(gram_of(4), 4, each, 1.0) for each in (weights, scaled))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_weights_or_activations_of_zero_stay_finite() -> None:
    gram, zero = gram_of(4), torch.zeros(HIDDEN, CHANNELS, dtype=torch.float64)
    assert torch.equal(with_pseudo_tokens(gram, 4, [zero, zero], 1.0), gram)
    assert torch.equal(with_pseudo_tokens(gram, 4, inputs(), 0.0), gram)


MIXTURES = ("mixtral", "qwen3-moe")
#: More experts than in the table, so that one can be out of reach: see :func:`starve_first_expert`.
FIVE = {"mixtral": {"num_local_experts": 5}, "qwen3-moe": {"num_experts": 5}}
PER_TOKEN = 2
RANK = 16


def windows(count: int, length: int, *, masked: bool = False, seed: int = 1) -> TokenWindows:
    ids = torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    lengths = torch.randint(1, length, (count, 1), generator=torch.Generator().manual_seed(seed + 1))
    return TokenWindows(ids, torch.arange(length) < lengths if masked else None)


MANY, FEW = windows(10, 40), windows(2, 7)


def mixture(name: str, *, starved: bool = False) -> PreTrainedModel:
    """A tiny model in float64, so that rounding plays no part; kernels for all experts at once do not take that."""
    model = BY_NAME[name].build(**(FIVE[name] if starved else {}))
    model.set_experts_implementation("eager")
    if starved:
        starve_first_expert(model)
    return model.double().requires_grad_(False)


@torch.no_grad()
def starve_first_expert(model: PreTrainedModel) -> None:
    """Of the logits 0, a, -a, b and -b two others are always above the first, so it is never among the top two."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
            gate = layer.mlp.gate.weight
            gate[0] = 0
            gate[2], gate[4] = -gate[1], -gate[3]


def compress_mlps(
    model: PreTrainedModel, data: TokenWindows, rank: int = RANK, *, batch_size: int = 3, sequential: bool = False
) -> Compression:
    """Every MLP and expert at ``rank``, all else whole."""
    whole = [{name: shape.full for name, shape in layer.modules.items()} for layer in model_geometry(model)]
    ranks = [LayerRanks(**full | {"mlp": min(rank, full["mlp"])}) for full in whole]
    engine = Engine(resident(model), data, batch_size)
    with engine.active():
        return engine.compress(ModeGPT(RIDGE), Choice(ranks, [{} for _ in ranks]), sequential=sequential)


@dataclass
class Expert:
    """One expert of a stock layer and what its routed tokens say about it."""

    gate: torch.Tensor
    up: torch.Tensor
    output: torch.Tensor
    """W_D (m, d)."""
    gram: torch.Tensor
    tokens: int


@torch.no_grad()
def expert_inputs(model: PreTrainedModel, data: TokenWindows) -> dict[int, torch.Tensor]:
    """What enters the router of each layer that has one, at real tokens (N, d)."""
    family, found = family_of(model), {}
    hooks = []
    for index, layer in enumerate(decoder_layers(model, family)):
        if not expert_count(layer, family.description):
            continue

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], index: int = index) -> None:
            found[index] = args[0] if data.mask is None else args[0][data.mask]

        hooks.append(layer.get_submodule("mlp").register_forward_pre_hook(keep))
    model(data.ids, attention_mask=data.mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {index: x.reshape(-1, x.shape[-1]) for index, x in found.items()}


@torch.no_grad()
def experts_of(layer: Any, hidden: torch.Tensor, *, normalised: bool) -> list[Expert]:
    """By plain loops over tokens: route, apply the expert's input maps, weight, and sum the outer products."""
    stacked, experts = layer.mlp.experts, []
    for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        experts.append(Expert(gate.T, up.T, down.T, torch.zeros(len(gate), len(gate)).double(), 0))
    for x in hidden:
        shares = torch.softmax((layer.mlp.gate.weight @ x).float(), 0)
        best = shares.sort(descending=True).indices[:PER_TOKEN].tolist()
        total = sum(float(shares[number]) for number in best) if normalised else 1.0
        for number in best:
            expert = experts[number]
            z = nn.functional.silu(x @ expert.gate) * (x @ expert.up) * float(shares[number]) / total
            expert.gram += z[:, None] * z
            expert.tokens += 1
    return experts


def references(model: PreTrainedModel, data: TokenWindows) -> dict[int, list[Expert]]:
    """All experts of each layer that has some."""
    normalised = model.config.model_type == "mixtral" or model.config.norm_topk_prob
    return {
        index: experts_of(model.model.layers[index], hidden, normalised=normalised)
        for index, hidden in expert_inputs(model, data).items()
    }


def expected_gram(expert: Expert, experts: list[Expert]) -> torch.Tensor:
    """With pseudo tokens of the mean energy of a channel of a routed token, where tokens are missing."""
    m = len(expert.gram)
    energy = sum(float(each.gram.trace()) / m for each in experts)
    level = energy / sum(each.tokens for each in experts)
    profile = torch.tensor([squared(expert.gate[:, i]) * squared(expert.up[:, i]) for i in range(m)]).double()
    return expert.gram + max(0, m - expert.tokens) * level * torch.diag(profile / profile.mean())


def assert_solved(result: Compression, layer: int, number: int, expert: Expert, gram: torch.Tensor) -> None:
    """One expert of the compressed model is the decomposition of its own Gram matrix."""
    solution = nystrom_decomposition(gram, expert.output, RANK, RIDGE, torch.finfo(torch.float64).eps)
    kept = result.layers[layer].modules["mlp"].kept
    assert kept is not None
    assert kept[number] == solution.kept.tolist()
    compressed = result.model.model.layers[layer].mlp.experts
    gate_up, down = compressed.gate_up_proj[number], compressed.down_proj[number]
    assert torch.equal(gate_up, torch.cat((expert.gate[:, solution.kept], expert.up[:, solution.kept]), 1).T)
    atol = 1e-5 * float(solution.output.abs().max())  # the router's weights are float32
    torch.testing.assert_close(down.T.detach(), solution.output, rtol=0, atol=atol)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_with_enough_tokens_are_solved_one_by_one(name: str, masked: bool) -> None:
    model, data = mixture(name), windows(24, 40, masked=True) if masked else MANY
    result = compress_mlps(model, data)
    found = references(model, data)
    assert list(found) == ([0, 1, 2] if name == "mixtral" else [0, 2])
    for index, experts in found.items():
        tokens = [expert.tokens for expert in experts]
        assert result.layers[index].modules["mlp"].expert_tokens == tokens
        for number, expert in enumerate(experts):
            assert expert.tokens >= len(expert.gram), "the test needs more tokens"
            assert_solved(result, index, number, expert, expert.gram)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_of_experts_add_up(name: str, batch_size: int, masked: bool) -> None:
    model, data = BY_NAME[name].build(), windows(5, 9, masked=masked)
    result = compress_mlps(model, data, batch_size=batch_size, sequential=True)
    for layer in result.layers:
        counts = layer.modules["mlp"].expert_tokens
        assert layer.modules["qk"].expert_tokens is None
        assert layer.modules["vo"].expert_tokens is None
        if counts is None:
            assert layer is result.layers[1]
            assert name == "qwen3-moe"
            continue
        assert len(counts) == 4
        assert sum(counts) == PER_TOKEN * data.tokens


@pytest.mark.parametrize("name", MIXTURES)
def test_error_is_that_of_all_experts_together(name: str) -> None:
    model = mixture(name)
    result = compress_mlps(model, MANY)
    for index, experts in references(model, MANY).items():
        solutions = [nystrom_decomposition(expert.gram, expert.output, RANK, RIDGE) for expert in experts]
        expected = sum(one.error for one in solutions) / sum(one.norm for one in solutions)
        assert result.layers[index].modules["mlp"].relative_error == pytest.approx(expected**0.5, rel=1e-5)


def assert_sane(model: PreTrainedModel, result: Compression) -> None:
    """Finite logits on other tokens, not wildly off, and no output map out of proportion. Makes both float32."""
    data = windows(4, 20, seed=7)
    with torch.no_grad():
        actual, expected = (each.float()(data.ids).logits for each in (result.model, model))
    assert actual.isfinite().all()
    assert squared(actual - expected) < squared(expected - expected.mean(-1, keepdim=True))
    for layer, thin in zip(model.model.layers, result.model.model.layers, strict=True):
        if hasattr(thin.mlp, "experts"):
            before, after = (each.mlp.experts.down_proj.detach() for each in (layer, thin))
            assert after.abs().amax(dim=(1, 2)).max() < 5 * before.abs().max()
    for found in result.layers:  # an MLP for all tokens can follow a few of them without error
        assert found.modules["mlp"].expert_tokens is None or 0 < found.modules["mlp"].relative_error < 1


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_with_few_tokens_get_pseudo_tokens(name: str) -> None:
    model = mixture(name)
    result = compress_mlps(model, FEW)
    for index, experts in references(model, FEW).items():
        for number, expert in enumerate(experts):
            assert expert.tokens < len(expert.gram), "the test needs fewer tokens"
            assert_solved(result, index, number, expert, expected_gram(expert, experts))
    assert_sane(model, result)


@pytest.mark.parametrize("data", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("name", MIXTURES)
def test_expert_without_tokens_keeps_its_largest_channels_as_they_are(name: str, data: TokenWindows) -> None:
    model = mixture(name, starved=True)
    result = compress_mlps(model, data)
    for index, experts in references(model, data).items():
        counts = result.layers[index].modules["mlp"].expert_tokens
        assert counts == [expert.tokens for expert in experts]
        assert counts[0] == experts[0].tokens == 0
        starved = experts[0]
        sizes = [squared(starved.gate[:, i]) * squared(starved.up[:, i]) for i in range(len(starved.gram))]
        kept = largest(sizes, RANK)
        found, compressed = result.layers[index].modules["mlp"].kept, result.model.model.layers[index].mlp.experts
        assert found is not None
        assert found[0] == kept
        assert torch.equal(compressed.down_proj[0].T, starved.output[kept])
        assert torch.equal(compressed.gate_up_proj[0].T, torch.cat((starved.gate[:, kept], starved.up[:, kept]), 1))
        for number, expert in enumerate(experts):
            assert_solved(result, index, number, expert, expected_gram(expert, experts))
    assert_sane(model, result)


@pytest.mark.parametrize("name", MIXTURES)
def test_one_token_is_enough_for_a_finite_model(name: str) -> None:
    model = BY_NAME[name].build()
    result = compress_mlps(model, TokenWindows(torch.tensor([[5, 6]]), torch.tensor([[True, False]])), sequential=True)
    for layer in result.layers:
        counts = layer.modules["mlp"].expert_tokens
        assert counts is None or sorted(counts) == [0, 0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())
    with torch.no_grad():
        assert result.model(FEW.ids).logits.isfinite().all()


@pytest.mark.parametrize("name", MIXTURES)
def test_whole_experts_stay_as_they_are_however_few_tokens_they_see(name: str) -> None:
    model = mixture(name, starved=True)
    result = compress_mlps(model, FEW, rank=48)
    for layer, thin in zip(model.model.layers, result.model.model.layers, strict=True):
        for parameter, other in zip(layer.mlp.parameters(), thin.mlp.parameters(), strict=True):
            assert torch.equal(parameter, other)
    assert all(layer.modules["mlp"].relative_error == 0 for layer in result.layers)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_go_on_to_be_computed_as_they_were(name: str) -> None:
    model = BY_NAME[name].build()
    model.set_experts_implementation("eager")
    assert compress_mlps(model, FEW).model.config._experts_implementation == "eager"


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_implementation_of_a_compressed_model_can_be_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has not asked the stock class before: the answer for that one would be inherited."""
    compressed = compress_mlps(BY_NAME[name].build(), FEW).model
    for cls in type(compressed).__mro__:
        if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel:
            monkeypatch.setattr(cls, "_can_set_experts_implementation_cached_value", None, raising=False)
    for implementation in ("eager", "batched_mm"):
        compressed.set_experts_implementation(implementation)
        assert compressed.config._experts_implementation == implementation
