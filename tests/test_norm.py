"""Norms of queries and keys that lost channels: calibrated energies, the compact norm, and both through the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead

from family_table import BY_NAME
from helpers import mixed, randn
from modegpt.budget import LayerRanks
from modegpt.data import TokenWindows
from modegpt.decompositions import norm_energy
from modegpt.engine import Compression, Engine
from modegpt.families import decoder_layers, family_of, model_geometry
from modegpt.layered import resident
from modegpt.layout import HeadShape
from modegpt.methods import ModeGPT
from modegpt.modeling import Family
from modegpt.modeling.modeling_norm import CompactNorm, norm_parts
from modegpt.results import Choice
from modegpt.weights import NormWeights

CHANNELS = 12


def normalised_squares(x: torch.Tensor) -> torch.Tensor:
    """u_i = n x_i^2 / sum_j x_j^2 of each row."""
    return x.square() / x.square().mean(-1, keepdim=True)


def gram(u: torch.Tensor) -> torch.Tensor:
    return u.mT @ u


def loss(x: torch.Tensor, kept: torch.Tensor, energy: torch.Tensor | float) -> float:
    """Sum over tokens of the squared relative error of the mean square, from the activations (N, n) themselves."""
    estimates = (x[:, kept].square() * energy).sum(-1) / x.shape[-1]
    return float((estimates / x.square().mean(-1) - 1).square().sum())


def best_constant(x: torch.Tensor, kept: torch.Tensor) -> float:
    """The c that minimises the sum over tokens of (c s - 1)^2, s the kept share of a token's energy."""
    share = x[:, kept].square().sum(-1) / x.square().sum(-1)
    return float(share.sum() / share.square().sum())


def optimum(x: torch.Tensor, kept: torch.Tensor) -> float:
    """The smallest loss of all e >= 0: the best least-squares solution without a negative entry of any support."""
    u = normalised_squares(x)[:, kept] / x.shape[-1]
    best = float(len(x))
    for size in range(1, len(kept) + 1):
        for support in itertools.combinations(range(len(kept)), size):
            columns = u[:, support]
            energy = torch.linalg.lstsq(columns, torch.ones(len(x), 1, dtype=x.dtype)).solution
            if bool((energy >= 0).all()):
                best = min(best, float((columns @ energy - 1).square().sum()))
    return best


def chosen(count: int, seed: int = 0, channels: int = CHANNELS) -> torch.Tensor:
    """Some channels in no particular order."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:count]


def activations(tokens: int = 200, seed: int = 0) -> torch.Tensor:
    return mixed(tokens, CHANNELS, seed=seed)


def test_one_kept_channel_has_a_known_answer() -> None:
    """Squares 1, 3 and 3, 1: u_0 is 0.5 and 1.5, e = 2 (0.5 + 1.5) / (0.25 + 2.25)."""
    squares = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    energy = norm_energy(gram(normalised_squares(squares.sqrt())), torch.tensor([0]))
    torch.testing.assert_close(energy, torch.tensor([1.6], dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_channel_that_follows_another_stands_for_it() -> None:
    """x_2^2 = 4 x_0^2 is dropped: channel 0 stands for five of its size, channel 1 for itself."""
    x = randn(50, 3)
    x[:, 2] = 2 * x[:, 0]
    energy = norm_energy(gram(normalised_squares(x)), torch.tensor([1, 0]), iterations=2000)
    torch.testing.assert_close(energy, torch.tensor([1.0, 5.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_equal_channels_stand_for_equally_many() -> None:
    u = torch.ones(7, 8, dtype=torch.float64)
    energy = norm_energy(gram(u), torch.tensor([0, 2, 5]))
    torch.testing.assert_close(energy, torch.full((3,), 8 / 3, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_kept_channel_that_hinders_fades() -> None:
    """Channel 1 is the rest of channel 0 and of what is dropped: e_0 = 2 and e_1 = 0 are exact."""
    u = torch.tensor([[1.5, 1.5, 0.0], [1.5, 0.0, 1.5]], dtype=torch.float64)
    energy = norm_energy(gram(u), torch.tensor([0, 1]), iterations=20_000)
    torch.testing.assert_close(energy, torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("count", [1, 5, 11])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_gram_of_squares_says_what_the_activations_say(tokens: int, count: int) -> None:
    """(e^T U_SS e - 2 e^T U_S 1) / n^2 + N is the loss, whatever e is."""
    x, kept, energy = activations(tokens), chosen(count), randn(count, seed=3).abs()
    squares = gram(normalised_squares(x))
    target, n = squares[kept].sum(-1), CHANNELS
    value = energy @ squares[kept][:, kept] @ energy / n**2 - 2 * energy @ target / n**2 + tokens
    assert float(value) == pytest.approx(loss(x, kept, energy), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3, 6, 11])
@pytest.mark.parametrize("tokens", [2, 5, 30, 200])
def test_never_worse_than_any_constant(tokens: int, count: int, seed: int) -> None:
    x, kept = activations(tokens, seed), chosen(count, seed)
    energy = norm_energy(gram(normalised_squares(x)), kept)
    assert energy.shape == (count,)
    assert energy.dtype == torch.float64
    assert energy.isfinite().all()
    assert energy.min() >= 0
    found, rounding = loss(x, kept, energy), 1 + 1e-9
    for constant in (best_constant(x, kept), 1.0, CHANNELS / count):
        assert found <= rounding * loss(x, kept, constant)
    if count > 1 and tokens > 2:
        assert found < 0.995 * loss(x, kept, best_constant(x, kept))


@pytest.mark.parametrize("count", [1, 6])
def test_starts_from_the_best_constant(count: int) -> None:
    x, kept = activations(), chosen(count)
    energy = norm_energy(gram(normalised_squares(x)), kept, iterations=0)
    expected = torch.full((count,), best_constant(x, kept), dtype=torch.float64)
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [2, 6, 11])
@pytest.mark.parametrize("tokens", [5, 200])
def test_more_iterations_are_never_worse(tokens: int, count: int) -> None:
    x, kept = activations(tokens), chosen(count)
    squares = gram(normalised_squares(x))
    losses = [loss(x, kept, norm_energy(squares, kept, iterations=n)) for n in (0, 1, 2, 3, 5, 10, 30, 100, 200, 1000)]
    for before, after in itertools.pairwise(losses):
        assert after <= before + 1e-12 * losses[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "tokens"), [(1, 200), (2, 200), (4, 200), (6, 200), (3, 30), (6, 30)])
def test_close_to_the_best_of_all_energies(count: int, tokens: int, seed: int) -> None:
    x, kept = activations(tokens, seed), chosen(count, seed)
    squares, best, constant = gram(normalised_squares(x)), optimum(x, kept), loss(x, kept, best_constant(x, kept))
    assert best <= constant * (1 + 1e-12)
    gained = loss(x, kept, norm_energy(squares, kept)) - best
    assert -1e-9 * best <= gained <= 0.01 * (constant - best) + 1e-12 * constant
    assert loss(x, kept, norm_energy(squares, kept, iterations=20_000)) == pytest.approx(best, rel=1e-4)


def test_full_rank_gives_exact_ones() -> None:
    squares = gram(normalised_squares(activations()))
    for kept in (torch.arange(CHANNELS), chosen(CHANNELS)):
        assert torch.equal(norm_energy(squares, kept), torch.ones(CHANNELS, dtype=torch.float64))
    many = norm_energy(squares.expand(2, 3, -1, -1), torch.arange(CHANNELS).expand(2, 3, -1))
    assert torch.equal(many, torch.ones(2, 3, CHANNELS, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [3, 100])
def test_dropping_channels_that_are_always_zero_changes_nothing(tokens: int) -> None:
    x = activations(tokens)
    kept = torch.tensor([7, 1, 2, 10, 4])
    dead = torch.ones(CHANNELS, dtype=torch.bool)
    dead[kept] = False
    x[:, dead] = 0
    energy = norm_energy(gram(normalised_squares(x)), kept)
    torch.testing.assert_close(energy, torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_kept_channels_that_are_always_zero_do_no_harm() -> None:
    x = activations()
    x[:, [1, 3]] = 0
    squares = gram(normalised_squares(x))
    with_dead, without = torch.tensor([0, 1, 3, 5, 8]), torch.tensor([0, 5, 8])
    energy = norm_energy(squares, with_dead)
    assert energy.isfinite().all()
    torch.testing.assert_close(energy[[0, 3, 4]], norm_energy(squares, without), rtol=1e-12, atol=0)
    nothing_left = norm_energy(squares, torch.tensor([1, 3]))
    assert nothing_left.isfinite().all()
    assert nothing_left.min() >= 0
    assert torch.equal(norm_energy(torch.zeros_like(squares), without), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6])
def test_sizes_of_tokens_do_not_matter(scale: float) -> None:
    """The error is relative: a token of any size counts as one token."""
    x, kept = activations(), chosen(5)
    sizes = torch.logspace(0, 1, len(x), dtype=torch.float64)[:, None] * scale
    squares = gram(normalised_squares(x))
    expected = norm_energy(squares, kept)
    torch.testing.assert_close(norm_energy(gram(normalised_squares(x * sizes)), kept), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(norm_energy(squares * scale, kept), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_leading_axes_are_one_by_one(count: int) -> None:
    shape = (2, 3)
    x = torch.stack([activations(seed=seed) for seed in range(6)]).unflatten(0, shape)
    kept = torch.stack([chosen(count, seed) for seed in range(6)]).unflatten(0, shape)
    squares = gram(normalised_squares(x))
    together = norm_energy(squares, kept)
    assert together.shape == (*shape, count)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(together[i, j], norm_energy(squares[i, j], kept[i, j]), rtol=1e-12, atol=0)


def norm_weights(*shape: int, joint: bool, bias: bool = True) -> NormWeights:
    weight = randn(*shape, seed=5)
    return NormWeights(weight, torch.ones_like(weight), randn(*shape, seed=6) if bias else None, joint)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_group", [1, 3])
def test_norms_per_head_select_head_by_head(per_group: int, bias: bool) -> None:
    groups, shape = 2, (2, per_group, CHANNELS)
    norm, kept = norm_weights(*shape, joint=False, bias=bias), torch.stack([chosen(4, 1), chosen(4, 2)])
    x = torch.stack([activations(seed=seed) for seed in range(groups * per_group)]).unflatten(0, shape[:2])
    squares = gram(normalised_squares(x))
    result = norm.select(kept, squares)
    for group, head in itertools.product(range(groups), range(per_group)):
        expected = norm_energy(squares[group, head], kept[group])
        torch.testing.assert_close(result.energy[group, head], expected, rtol=1e-12, atol=0)
        assert torch.equal(result.weight[group, head], norm.weight[group, head, kept[group]])
        if bias:
            assert result.bias is not None
            assert norm.bias is not None
            assert torch.equal(result.bias[group, head], norm.bias[group, head, kept[group]])
    assert (result.bias is None) == (not bias)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4)])
def test_joint_norms_are_one_head_of_all_channels(shape: tuple[int, ...]) -> None:
    """Of queries (G, g, h) and keys (G, h): each group keeps its channels in every head, and one sum has them all."""
    n, h, groups = torch.Size(shape).numel(), shape[-1], shape[0]
    x = mixed(300, n)
    kept = torch.tensor([[2, 0], [1, 3], [3, 0]])[:groups]
    result = norm_weights(*shape, joint=True).select(kept, gram(normalised_squares(x)))
    heads = n // h
    columns = [h * head + int(i) for head in range(heads) for i in kept[head * groups // heads]]
    assert result.energy.shape == (*shape[:-1], 2)
    expected = norm_energy(gram(normalised_squares(x)), torch.tensor(columns))
    torch.testing.assert_close(result.energy.flatten(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.weight.flatten(), randn(*shape, seed=5).flatten()[columns])
    everything = torch.tensor(columns)
    found = loss(x, everything, result.energy.flatten())
    assert found < loss(x, everything, best_constant(x, everything))


HEADS, HEAD = 3, 16

#: Makes a stock norm of HEADS heads, and says whether it takes all heads at once, its offset, whether it centres.
STOCK: dict[str, tuple[Callable[[], nn.Module], bool, float, bool]] = {
    "Qwen3RMSNorm": (lambda: Qwen3RMSNorm(HEAD, eps=1e-6), False, 0.0, False),
    "Gemma3RMSNorm": (lambda: Gemma3RMSNorm(HEAD, eps=1e-6), False, 1.0, False),
    "Olmo2RMSNorm": (lambda: Olmo2RMSNorm(HEADS * HEAD, eps=1e-6), True, 0.0, False),
    "LayerNorm": (lambda: nn.LayerNorm(HEAD, eps=1e-5), False, 0.0, True),
    "StableLmLayerNormPerHead": (lambda: StableLmLayerNormPerHead(HEAD, HEADS, eps=1e-5), False, 0.0, True),
    "CohereLayerNorm": (lambda: CohereLayerNorm((HEADS, HEAD), eps=1e-5), False, 0.0, True),
}


def stock_norm(name: str) -> nn.Module:
    norm = STOCK[name][0]()
    with torch.no_grad():
        for number, parameter in enumerate(norm.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) + 0.5)
    return norm


def apply_stock(name: str, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A stock norm of x (B, T, heads, h)."""
    if STOCK[name][1]:
        return norm(x.flatten(-2)).view_as(x)
    return norm(x.transpose(1, 2)).transpose(1, 2) if name == "StableLmLayerNormPerHead" else norm(x)


def of_heads(norm: nn.Module, name: str) -> torch.Tensor | None:
    """The weight or bias of a stock norm for every head (HEADS, HEAD)."""
    parts = [getattr(part, name, None) for part in norm_parts(norm)]
    if parts[0] is None:
        return None
    return torch.cat([part.detach().reshape(-1, HEAD) for part in parts]).expand(HEADS, HEAD)


def compact_norm(name: str, norm: nn.Module, kept: torch.Tensor) -> CompactNorm:
    """The ``kept`` (HEADS, k) channels of a stock norm, with all energies one."""
    compact = CompactNorm(HEADS, kept.shape[-1], norm, (HEADS, HEAD), STOCK[name][2])
    compact.reset()
    with torch.no_grad():
        for part in ("weight", "bias"):
            values, target = of_heads(norm, part), getattr(compact, part)
            assert (values is None) == (target is None)
            if values is not None:
                target.copy_(values.gather(-1, kept))
    return compact


def head_inputs(name: str, scale: float = 1.0) -> torch.Tensor:
    """Queries (2, 5, HEADS, HEAD) in float64, centred where the norm is."""
    x = scale * randn(2, 5, HEADS, HEAD) * torch.logspace(-1, 1, HEAD, dtype=torch.float64)
    return x - x.mean(-1, keepdim=True) if STOCK[name][3] else x


EVERY = torch.arange(HEAD).expand(HEADS, HEAD)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at the smaller one, epsilon counts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_compact_norm_of_all_channels_is_the_stock_norm(name: str, dtype: torch.dtype, scale: float) -> None:
    norm = stock_norm(name).to(dtype)
    compact = compact_norm(name, norm, EVERY)
    assert compact.weight.dtype == dtype
    assert compact.joint == STOCK[name][1]
    x = head_inputs(name, scale).to(dtype)
    actual, expected = compact(x), apply_stock(name, norm, x)
    assert actual.dtype == dtype
    assert actual.shape == x.shape
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:  # two roundings against one; and rounded numbers are not quite centred
        atol = 2**-8 if STOCK[name][3] else 0.0
        torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=atol)


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_compact_norm_equals_its_formula(name: str) -> None:
    norm = stock_norm(name)
    kept = torch.stack([chosen(6, seed, HEAD) for seed in range(HEADS)])
    compact = compact_norm(name, norm, kept)
    compact.energy.copy_(randn(HEADS, 6, seed=9).abs())
    x = head_inputs(name).gather(-1, kept.expand(2, 5, -1, -1))
    weight, bias = of_heads(norm, "weight"), of_heads(norm, "bias")
    assert weight is not None
    eps = 1e-6 if "RMS" in name else 1e-5
    for b, t, head in itertools.product(range(2), range(5), range(HEADS)):
        heads = range(HEADS) if STOCK[name][1] else [head]
        total = sum(float((compact.energy[i].double() * x[b, t, i].square()).sum()) for i in heads)
        size = (total / (HEAD * len(heads)) + eps) ** 0.5
        expected = x[b, t, head] / size * (weight[head, kept[head]].double() + STOCK[name][2])
        if bias is not None:
            expected = expected + bias[head, kept[head]].double()
        torch.testing.assert_close(compact(x.float())[b, t, head].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_compact_norm_without_channels_that_are_zero_is_the_stock_norm_of_the_others(name: str) -> None:
    norm = stock_norm(name)
    kept = torch.stack([chosen(6, seed, HEAD) for seed in range(HEADS)])
    values = head_inputs(name)[..., :6]
    values = values - values.mean(-1, keepdim=True) if STOCK[name][3] else values
    index = kept.expand(2, 5, -1, -1)
    x = torch.zeros(2, 5, HEADS, HEAD, dtype=torch.float64).scatter(-1, index, values).float()
    expected = apply_stock(name, norm, x).gather(-1, index)
    torch.testing.assert_close(compact_norm(name, norm, kept)(values.float()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_compact_norm_of_nothing_is_finite(name: str) -> None:
    compact = compact_norm(name, stock_norm(name), EVERY)
    result = compact(torch.zeros(1, 1, HEADS, HEAD))
    expected = torch.zeros(HEADS, HEAD) if compact.bias is None else compact.bias
    assert torch.equal(result[0, 0], expected)


@torch.no_grad()
def test_compact_norm_of_a_stock_norm_without_epsilon() -> None:
    norm, x = Qwen3RMSNorm(HEAD, eps=0.0), head_inputs("Qwen3RMSNorm").float()
    torch.testing.assert_close(compact_norm("Qwen3RMSNorm", norm, EVERY)(x), norm(x), rtol=1e-5, atol=1e-6)


NORMED = ("qwen3", "gemma3", "olmo2", "phi-norms", "stablelm-norms", "cohere-norms")


def token_windows(masked: bool) -> TokenWindows:
    ids = torch.randint(0, 128, (6, 20), generator=torch.Generator().manual_seed(1))
    return TokenWindows(ids, torch.arange(20) < torch.tensor([[20], [13], [1], [7], [20], [18]]) if masked else None)


def compress_queries_and_keys(model: PreTrainedModel, data: TokenWindows, rank: int) -> Compression:
    """Every layer's queries and keys at ``rank``, all else whole, calibrated on what the stock model produces."""
    whole = [{name: shape.full for name, shape in layer.modules.items()} for layer in model_geometry(model)]
    ranks = [LayerRanks(**full | {"qk": rank}) for full in whole]
    engine = Engine(resident(model), data, batch_size=2)
    with engine.active():
        return engine.compress(ModeGPT(1e-4), Choice(ranks, [{} for _ in ranks]), sequential=False)


@torch.no_grad()
def attention_inputs(model: PreTrainedModel, data: TokenWindows) -> list[torch.Tensor]:
    """What enters the attention of each layer of a stock model at real tokens (N, d)."""
    family = family_of(model)
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0].flatten(0, 1) if data.mask is None else args[0][data.mask])

    maps = [
        layer.get_submodule(f"{family.description.attention}.{family.description.query}")
        for layer in decoder_layers(model, family)
    ]
    hooks = [module.register_forward_pre_hook(keep) for module in maps]
    model(data.ids, attention_mask=data.mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@dataclass
class NormUse:
    """One norm of one layer, dense and compressed, on the same tokens."""

    joint: bool
    dense: torch.Tensor
    """What enters the dense norm (N, heads, h), centred where the norm centres."""
    compressed: torch.Tensor
    """What enters the compressed norm (N, heads, k)."""
    channels: torch.Tensor
    """What is kept (heads, k)."""
    norm: CompactNorm

    def loss(self, squares: torch.Tensor) -> torch.Tensor:
        """Summed squared relative error of the mean ``squares`` (N, 1 or heads) over the tokens, for each norm."""
        return (squares / self.mean_square(self.dense) - 1).square().sum(0)

    def mean_square(self, x: torch.Tensor, factor: float | torch.Tensor = 1.0) -> torch.Tensor:
        """``factor`` times the sum of squares of x over one head's channels, or all, by the dense norm's n."""
        total = x.square().sum((-2, -1) if self.joint else -1) / self.dense.shape[-1]
        total = total[:, None] / self.dense.shape[1] if self.joint else total
        return factor * total

    def used(self) -> torch.Tensor:
        """The mean square that the compressed norm divides by, from what it makes of its input."""
        result = self.norm(self.compressed[None].float())[0].double()
        bias = 0 if self.norm.bias is None else self.norm.bias
        unscaled = (result - bias) / (self.norm.weight + self.norm.offset)
        if self.joint:
            return (self.compressed.square().sum((-2, -1)) / unscaled.square().sum((-2, -1)))[:, None] - self.norm.eps
        return self.compressed.square().sum(-1) / unscaled.square().sum(-1) - self.norm.eps


@torch.no_grad()
def norm_uses(model: PreTrainedModel, result: Compression, data: TokenWindows) -> Iterator[NormUse]:
    """All norms of queries and keys, on the attention inputs of the stock model."""
    family: Family = family_of(model).description
    layers = zip(
        decoder_layers(model, family_of(model)),
        result.model.base_model.get_submodule(family.layers),
        attention_inputs(model, data),
        result.layers,
        strict=True,
    )
    for layer, thin, x, found in layers:
        dense, compressed = layer.get_submodule(family.attention), thin.get_submodule(family.attention)
        shape = HeadShape.of(layer, model.config, family)
        kept = torch.tensor(found.modules["qk"].kept)
        for name, thin_name, norm in ((family.query, "q_proj", "q_norm"), (family.key, "k_proj", "k_norm")):
            before = getattr(dense, name)(x).unflatten(-1, (-1, shape.head)).double()
            before = before - before.mean(-1, keepdim=True) if family.norm_centred else before
            heads = before.shape[1]
            after = getattr(compressed, thin_name)(x).unflatten(-1, (heads, -1)).double()
            channels = kept.repeat_interleave(heads // shape.groups, 0)
            yield NormUse(model.config.model_type == "olmo2", before, after, channels, getattr(compressed, norm))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_compressed_norms_divide_by_nearly_what_the_dense_ones_do(name: str, share: float) -> None:
    """Better than doing nothing, than the mean over what is kept, and than the best constant."""
    model, data = BY_NAME[name].build(), token_windows(masked=False)
    full = model_geometry(model)[0].modules["qk"].full
    uses = list(norm_uses(model, compress_queries_and_keys(model, data, max(1, int(share * full))), data))
    assert len(uses) == 6
    for use in uses:
        width, kept = use.dense.shape[-1], use.channels.shape[-1]
        assert kept == use.compressed.shape[-1] < width
        expected = use.dense.gather(-1, use.channels.expand(len(use.dense), -1, -1))
        torch.testing.assert_close(use.compressed, expected, rtol=1e-4, atol=1e-5)
        share_kept = use.mean_square(use.compressed) / use.mean_square(use.dense)
        constant = share_kept.sum(0) / share_kept.square().sum(0)
        ours = use.loss(use.used())
        for factor in (1.0, width / kept, constant):
            other = use.loss(use.mean_square(use.compressed, factor))
            assert (ours <= other * (1 + 1e-4)).all()
            assert ours.sum() < 0.999 * other.sum()
        assert ours.sum() < 0.95 * use.loss(use.mean_square(use.compressed)).sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NORMED)
def test_energies_are_those_of_the_real_tokens(name: str, masked: bool) -> None:
    model, data = BY_NAME[name].build(), token_windows(masked)
    for use in norm_uses(model, compress_queries_and_keys(model, data, 2), data):
        heads, width = use.dense.shape[1:]
        assert len(use.dense) == data.tokens
        if use.joint:
            columns = use.channels + width * torch.arange(heads)[:, None]
            expected = norm_energy(gram(normalised_squares(use.dense.flatten(1))), columns.flatten()).view(heads, -1)
        else:
            expected = norm_energy(gram(normalised_squares(use.dense.movedim(1, 0))), use.channels)
        torch.testing.assert_close(use.norm.energy.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NORMED)
def test_whole_queries_and_keys_have_energies_of_one(name: str) -> None:
    model, data = BY_NAME[name].build(), token_windows(masked=True)
    full = model_geometry(model)[0].modules["qk"].full
    result = compress_queries_and_keys(model, data, full)
    for use in norm_uses(model, result, data):
        assert torch.equal(use.norm.energy, torch.ones_like(use.norm.energy))
    with torch.no_grad():
        actual, expected = (each(data.ids, attention_mask=data.mask).logits for each in (result.model, model))
    mask = torch.ones_like(data.ids, dtype=torch.bool) if data.mask is None else data.mask
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-4, atol=1e-4)
