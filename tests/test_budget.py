"""Parameter counts and the rounding of ranks, against really built models."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from helpers import tiny_llama
from modegpt.budget import (
    MODULES,
    LayerGeometry,
    LayerRanks,
    Module,
    ModuleGeometry,
    average_sparsity,
    kept_parameters,
    ranks_from_sparsity,
)
from modegpt.data import TokenWindows
from modegpt.engine import Engine
from modegpt.errors import InvalidRequest
from modegpt.families import family_of, model_geometry
from modegpt.layered import resident

SUBSETS: list[tuple[Module, ...]] = [subset for size in (1, 2, 3) for subset in combinations(MODULES, size)]

TINY_VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "all biases, mha": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "wide heads": {"head_dim": 20},
}

LARGE_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "smollm-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "smollm-135m with biases": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "attention_bias": True,
    },
}


@cache
def large_geometry(name: str) -> list[LayerGeometry]:
    with torch.device("meta"):
        return model_geometry(LlamaForCausalLM(LlamaConfig(vocab_size=8, **LARGE_SHAPES[name])))


def compressed(model: PreTrainedModel, ranks: Sequence[LayerRanks]) -> PreTrainedModel:
    """The compressed model of these ranks, without weights."""
    config = Engine(resident(model), TokenWindows(torch.zeros(1, 2, dtype=torch.int64)), 1).compressed_config(
        model_geometry(model), ranks
    )
    with torch.device("meta"):
        return family_of(model).causal_lm(config)


def block_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.base_model.layers.parameters())


def full_ranks(geometry: Sequence[LayerGeometry]) -> list[LayerRanks]:
    return [LayerRanks(**{module: layer.modules[module].full for module in MODULES}) for layer in geometry]


def ideal_parameters(layers: Sequence[LayerGeometry], sparsity: Sequence[Mapping[Module, float]]) -> float:
    removed = [
        share * layer.modules[module].parameters
        for layer, shares in zip(layers, sparsity, strict=True)
        for module, share in shares.items()
    ]
    return sum(layer.parameters + layer.extra for layer in layers) - math.fsum(removed)


def half_step(layer: LayerGeometry, modules: Sequence[Module], align: int) -> float:
    """Half the parameters of the smallest step the finest of ``modules`` can take."""
    finest = min((layer.modules[module] for module in modules), key=lambda geometry: geometry.unit_parameters)
    return finest.unit_parameters * math.lcm(align, finest.channels) / finest.channels / 2


def random_sparsity(
    layers: int, modules: Sequence[Module], low: float, high: float, seed: int
) -> list[dict[Module, float]]:
    generator = random.Random(seed)
    return [{module: generator.uniform(low, high) for module in modules} for _ in range(layers)]


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_geometry_counts_the_parameters_of_the_built_model(variant: str) -> None:
    model = tiny_llama(**TINY_VARIANTS[variant])
    geometry = model_geometry(model)
    assert sum(layer.parameters for layer in geometry) == block_parameters(model)
    head_dim = model.config.head_dim
    assert {module: part.full for module, part in geometry[0].modules.items()} == {
        "mlp": 48,
        "qk": head_dim // 2,
        "vo": head_dim,
    }
    # Llama's attention has biases in all maps or in none: the output's takes up the values'.
    gone = model.config.num_key_value_heads * head_dim if model.config.attention_bias else 0
    assert [layer.extra for layer in geometry] == [-gone] * len(geometry)
    assert block_parameters(compressed(model, full_ranks(geometry))) == block_parameters(model) - len(geometry) * gone


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_a_unit_counts_the_parameters_it_removes_from_the_built_model(variant: str, module: Module) -> None:
    model = tiny_llama(**TINY_VARIANTS[variant])
    geometry = model_geometry(model)
    ranks = full_ranks(geometry)
    whole = block_parameters(compressed(model, ranks))
    part = geometry[1].modules[module]
    ranks[1] = LayerRanks(**{name: ranks[1][name] - (name == module) for name in MODULES})
    assert whole - block_parameters(compressed(model, ranks)) == part.unit_parameters


def test_geometry_of_a_llama_layer_is_known() -> None:
    """Llama-2-7B: 4 d^2 + 3 d m + 2 d parameters in a layer, of which the norms' 2 d stay."""
    (layer, *_), d = large_geometry("llama-2-7b"), 4096
    assert layer.modules["mlp"] == ModuleGeometry(11008, 3 * d)
    assert layer.modules["qk"] == ModuleGeometry(64, 2 * 2 * 32 * d, channels=2)
    assert layer.modules["vo"] == ModuleGeometry(128, 2 * 32 * d)
    assert layer.parameters == sum(part.parameters for part in layer.modules.values()) + 2 * d


@pytest.mark.parametrize("variant", TINY_VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_kept_parameters_equal_those_of_the_built_model(variant: str, seed: int) -> None:
    model = tiny_llama(**TINY_VARIANTS[variant])
    geometry = model_geometry(model)
    generator = random.Random(seed)
    ranks = [
        LayerRanks(**{module: generator.randint(1, layer.modules[module].full) for module in MODULES})
        for layer in geometry
    ]
    assert kept_parameters(geometry, ranks) == block_parameters(compressed(model, ranks))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("align", [1, 2, 4, 8])
@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_total_is_the_one_asked_for_within_half_a_step(
    shape: str, modules: tuple[Module, ...], align: int, seed: int
) -> None:
    layers = large_geometry(shape)
    sparsity = random_sparsity(len(layers), modules, 0.15, 0.75, seed)
    ranks = ranks_from_sparsity(layers, sparsity, align)
    off = kept_parameters(layers, ranks) - ideal_parameters(layers, sparsity)
    assert abs(off) <= half_step(layers[0], modules, align) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("modules", "ratio"),
    [
        (("mlp",), 0.05),
        (("mlp",), 0.5),
        (("qk", "vo"), 0.1),
        (("mlp", "vo"), 0.6),
        (MODULES, 0.2),
        (MODULES, 0.3),
        (MODULES, 0.8),
    ],
)
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_uniform_sparsity_removes_the_ratio_asked_for(shape: str, modules: tuple[Module, ...], ratio: float) -> None:
    assert_removed_uniformly(large_geometry(shape), modules, ratio)


def assert_removed_uniformly(layers: list[LayerGeometry], modules: tuple[Module, ...], ratio: float) -> None:
    """Where every module loses the same share, ``ratio`` of the blocks goes."""
    blocks = sum(layer.parameters for layer in layers)
    share = average_sparsity(layers, modules, ratio)
    ranks = ranks_from_sparsity(layers, [dict.fromkeys(modules, share) for _ in layers], align=1)
    removed = blocks - kept_parameters(layers, ranks)
    assert abs(removed - ratio * blocks) <= half_step(layers[0], modules, 1) * (1 + 1e-9)


def test_each_layer_stays_within_one_step_of_its_own_ideal() -> None:
    """Rounding moves parameters between modules and neighbours, not across the model."""
    layers = large_geometry("llama-2-7b")
    sparsity = random_sparsity(32, MODULES, 0.15, 0.75, seed=0)
    for layer, shares, ranks in zip(layers, sparsity, ranks_from_sparsity(layers, sparsity, 1), strict=True):
        off = kept_parameters([layer], [ranks]) - ideal_parameters([layer], [shares])
        assert abs(off) <= 2 * half_step(layer, MODULES, 1)
        for module in ("qk", "vo"):
            ideal = (1 - shares[module]) * layer.modules[module].full
            assert abs(ranks[module] - ideal) <= 0.5


@pytest.mark.parametrize("align", [1, 2, 3, 8, 16, 32, 64, 96])
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_ranks_are_multiples_of_the_alignment_or_full(shape: str, align: int) -> None:
    layers = large_geometry(shape)
    sparsity = random_sparsity(len(layers), MODULES, 0.0, 1.0, seed=align)
    for layer, ranks in zip(layers, ranks_from_sparsity(layers, sparsity, align), strict=True):
        for module, part in layer.modules.items():
            rank = ranks[module]
            assert 1 <= rank <= part.full
            assert rank == part.full or rank * part.channels % align == 0


@pytest.mark.parametrize(
    ("units", "align", "expected"),
    [(0.0, 1, 1), (0.4, 1, 1), (1.6, 1, 2), (63.7, 1, 64), (70.0, 1, 64), (3.0, 8, 8), (13.0, 8, 16), (61.0, 8, 64)],
)
def test_nearest_allowed_rank_of_single_channels(units: float, align: int, expected: int) -> None:
    assert ModuleGeometry(full=64, unit_parameters=1).nearest(units, align) == expected


@pytest.mark.parametrize(
    ("units", "align", "expected"), [(5.4, 1, 5), (5.4, 2, 5), (5.4, 8, 4), (6.1, 8, 8), (5.4, 3, 6), (0.1, 8, 4)]
)
def test_nearest_allowed_rank_of_pairs_counts_two_channels_each(units: float, align: int, expected: int) -> None:
    assert ModuleGeometry(full=32, unit_parameters=1, channels=2).nearest(units, align) == expected


@pytest.mark.parametrize(("full", "units", "align"), [(80, 80.0, 64), (48, 47.0, 32), (40, 40.0, 32)])
def test_nearest_allowed_rank_can_be_full_where_that_is_not_a_multiple(full: int, units: float, align: int) -> None:
    assert ModuleGeometry(full=full, unit_parameters=1).nearest(units, align) == full


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_modules_not_named_and_modules_losing_nothing_stay_whole(modules: tuple[Module, ...]) -> None:
    layers = large_geometry("smollm-135m")
    ranks = ranks_from_sparsity(layers, [dict.fromkeys(modules, 0.4) for _ in layers], align=1)
    for module in set(MODULES) - set(modules):
        assert {rank[module] for rank in ranks} == {layers[0].modules[module].full}
    assert ranks_from_sparsity(layers, [dict.fromkeys(modules, 0.0) for _ in layers], align=1) == full_ranks(layers)


def test_steps_as_large_as_another_module_are_spread_over_the_layers() -> None:
    """Experts go in steps of eight channels: attention keeps close to its share instead of making up for them."""
    experts = ModuleGeometry(64, 1500, multiple=8)
    layer = LayerGeometry({"mlp": experts, "qk": ModuleGeometry(32, 300, 2), "vo": ModuleGeometry(128, 100)}, 118400)
    for ratio in (0.1, 0.15, 0.3, 0.45):
        average = average_sparsity([layer] * 24, MODULES, ratio)
        ranks = ranks_from_sparsity([layer] * 24, [dict.fromkeys(MODULES, average)] * 24, align=1)
        assert {rank["mlp"] % 8 for rank in ranks} == {0}
        assert max(abs(rank["vo"] - (1 - average) * 128) for rank in ranks) < 0.1 * 128
        assert max(abs(rank["mlp"] - (1 - average) * 64) for rank in ranks) < 12
        assert kept_parameters([layer] * 24, ranks) == pytest.approx((1 - ratio) * 24 * layer.parameters, abs=100)


def test_the_total_is_met_where_the_finest_module_has_no_room_left() -> None:
    layer = LayerGeometry(
        {"mlp": ModuleGeometry(48, 400, multiple=8), "qk": ModuleGeometry(4, 100, 2), "vo": ModuleGeometry(8, 50)},
        20000,
    )
    for share in (0.02, 0.1, 0.3, 0.8):
        sparsity: list[dict[Module, float]] = [{"mlp": share, "qk": 0.01, "vo": 0.01}] * 2
        ranks = ranks_from_sparsity([layer] * 2, sparsity, align=1)
        ideal = 2 * (20000 - share * 48 * 400 - 0.01 * 800)
        assert abs(kept_parameters([layer] * 2, ranks) - ideal) < 8 * 400 / 2


def test_what_the_finest_module_cannot_take_goes_to_the_next_layer() -> None:
    layer = LayerGeometry(
        {"mlp": ModuleGeometry(300, 3), "qk": ModuleGeometry(4, 30, 2), "vo": ModuleGeometry(8, 15)}, 1200
    )
    # Layer 0: 2.6 pairs become 3, 12 parameters too many: the MLP gives 4 channels.
    # Layer 1: 2.4 pairs become 2, 12 parameters too few, for which a whole MLP has no room: layer 2 takes them.
    sparsity: list[dict[Module, float]] = [
        {"mlp": 0.0, "qk": 0.35, "vo": 0.0},
        {"mlp": 0.0, "qk": 0.4, "vo": 0.0},
        {"mlp": 0.5, "qk": 0.0, "vo": 0.0},
    ]
    assert ranks_from_sparsity([layer] * 3, sparsity, align=1) == [
        LayerRanks(mlp=296, qk=3, vo=8),
        LayerRanks(mlp=300, qk=2, vo=8),
        LayerRanks(mlp=154, qk=4, vo=8),
    ]


def test_total_is_met_when_the_last_layer_loses_almost_nothing() -> None:
    modules = {"mlp": ModuleGeometry(100, 3), "qk": ModuleGeometry(4, 30, 2), "vo": ModuleGeometry(8, 15)}
    layer = LayerGeometry(modules, 540)
    sparsity: list[dict[Module, float]] = [{"mlp": 0.5, "qk": 0.5}, {"mlp": 0.0, "qk": 0.4}]
    ranks = ranks_from_sparsity([layer] * 2, sparsity, align=1)
    assert abs(kept_parameters([layer] * 2, ranks) - ideal_parameters([layer] * 2, sparsity)) <= 1.5


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_average_sparsity_refers_to_the_whole_decoder_blocks(modules: tuple[Module, ...]) -> None:
    layers = large_geometry("llama-3.2-1b")
    share = average_sparsity(layers, modules, 0.02)
    removed = sum(share * layer.modules[module].parameters for layer in layers for module in modules)
    assert removed / sum(layer.parameters for layer in layers) == pytest.approx(0.02, rel=1e-13)


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_unreachable_ratio_is_refused_with_a_maximum_that_works(shape: str, modules: tuple[Module, ...]) -> None:
    layers = large_geometry(shape)
    with pytest.raises(InvalidRequest) as refusal:
        average_sparsity(layers, modules, 0.999)
    message = str(refusal.value)
    assert message.startswith(f"--ratio 0.999 is out of reach with --modules {','.join(modules)} and --align 1: ")
    largest = float(re.search(r"at most (\S+) of the decoder blocks' parameters can go", message)[1])
    assert_removed_uniformly(layers, modules, largest)
    with pytest.raises(InvalidRequest):
        average_sparsity(layers, modules, largest + 0.0011)


def test_ranks_become_layer_widths() -> None:
    rank, modules = LayerRanks(mlp=30, qk=3, vo=5), {"mlp": ModuleGeometry(48, 1), "vo": ModuleGeometry(8, 1)}
    for channels in (1, 2):  # of a query-key unit: without and with rotary embedding
        sizes = LayerGeometry(modules | {"qk": ModuleGeometry(4, 1, channels)}, 600).sizes(rank)
        assert (sizes.intermediate_size, sizes.qk_head_dim, sizes.v_head_dim) == (30, 3 * channels, 5)


@pytest.mark.parametrize(
    ("shape", "modules", "align", "ratio"),
    [("smollm-135m", ("qk", "vo"), 64, 0.1), ("llama-2-7b", ("qk", "vo"), 64, 0.3), ("llama-2-7b", MODULES, 128, 0.8)],
)
def test_ratio_out_of_reach_of_the_alignment_is_refused(
    shape: str, modules: tuple[Module, ...], align: int, ratio: float
) -> None:
    layers = large_geometry(shape)
    average_sparsity(layers, modules, ratio, align=1)
    with pytest.raises(InvalidRequest, match=f"--align {align}"):
        average_sparsity(layers, modules, ratio, align=align)
