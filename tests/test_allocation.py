"""Global sparsity allocation: eq. 10, 11 and 43."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import pytest

from modegpt.allocation import LARGEST_SPARSITY, allocate, auto_temperature, entropic_allocation
from modegpt.errors import InvalidRequest

# The ranks of Llama-2-7B's layers (of 4096) at 30 % compression and temperature 0.1, as printed in the
# appendix of the MoDeGPT paper (arXiv 2408.09632), "Layer Rank".
LLAMA_2_7B_RANKS = [
    *(3989, 3886, 3813, 3889, 3750, 3616, 3598, 3612),
    *(3625, 3593, 3546, 3660, 3654, 3568, 3575, 3544),
    *(3453, 3241, 2997, 2703, 2413, 1741, 1620, 1217),
    *(1129, 1254, 1054, 741, 1203, 1363, 2640, 4060),
]


def random_scores(count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.uniform(0.02, 0.5) for _ in range(count)]


def random_weights(count: int, seed: int) -> list[float]:
    generator = random.Random(1000 + seed)
    return [generator.uniform(1, 5) for _ in range(count)]


def weighted_mean(values: list[float], weights: list[float]) -> float:
    return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / math.fsum(weights)


def objective(sparsities: list[float], scores: list[float], weights: list[float], temperature: float) -> float:
    """eq. 10, every block counted by its weight: sum_j w_j (s_j (1 - phi_j) - eps phi_j log phi_j)."""
    return math.fsum(
        w * (s * (1 - phi) - temperature * phi * math.log(phi))
        for w, s, phi in zip(weights, scores, sparsities, strict=True)
    )


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_equal_weights_give_equation_11(temperature: float) -> None:
    """phi = L * phi_avg * softmax(-s / eps)."""
    scores = random_scores(32, seed=0)
    total = math.fsum(math.exp(-s / temperature) for s in scores)
    expected = [32 * 0.3 * math.exp(-s / temperature) / total for s in scores]
    assert entropic_allocation(scores, [7.0] * 32, 0.3, temperature) == pytest.approx(expected, rel=1e-13)


def test_attention_and_mlp_weights_give_equation_43() -> None:
    """phi_jl = L (w_mlp + w_mha) phi_avg exp(-s_jl / eps) / sum_j'l' w_j' exp(-s_j'l' / eps)."""
    layers, weight, average, temperature = 10, {"mha": 67.1, "mlp": 135.3}, 0.25, 0.1
    score = {"mha": random_scores(layers, seed=1), "mlp": random_scores(layers, seed=2)}
    total = math.fsum(weight[j] * math.exp(-s / temperature) for j in weight for s in score[j])
    expected = [
        layers * (weight["mlp"] + weight["mha"]) * average * math.exp(-score[j][layer] / temperature) / total
        for layer in range(layers)
        for j in weight
    ]
    flat = [score[j][layer] for layer in range(layers) for j in weight]
    actual = entropic_allocation(flat, [*weight.values()] * layers, average, temperature)
    assert actual == pytest.approx(expected, rel=1e-13)


def test_two_blocks_have_a_known_answer() -> None:
    """exp(-s / eps) is 1 and 1/3, so the first block loses three times as much as the second."""
    actual = entropic_allocation([0.2, 0.2 + 0.1 * math.log(3)], [1, 1], 0.4, 0.1)
    assert actual == pytest.approx([0.6, 0.2], rel=1e-14)
    actual = entropic_allocation([0.2, 0.2 + 0.1 * math.log(3)], [1, 3], 0.3, 0.1)
    assert actual == pytest.approx([0.6, 0.2], rel=1e-14)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 2.0, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_mean_is_the_average_asked_for(seed: int, temperature: float) -> None:
    scores, weights = random_scores(24, seed), random_weights(24, seed)
    sparsities = entropic_allocation(scores, weights, 0.37, temperature)
    assert weighted_mean(sparsities, weights) == pytest.approx(0.37, rel=1e-14)


@pytest.mark.parametrize("size", [1e-1, 1e-3])
@pytest.mark.parametrize("weighted", [False, True])
def test_feasible_perturbations_do_not_improve_the_objective(weighted: bool, size: float) -> None:
    scores, temperature = random_scores(16, seed=3), 0.1
    weights = random_weights(16, seed=3) if weighted else [1.0] * 16
    best = entropic_allocation(scores, weights, 0.3, temperature)
    generator = random.Random(0)
    for _ in range(200):
        step = [generator.gauss(0, 1) for _ in scores]
        mean = weighted_mean(step, weights)
        other = [phi * (1 + size * math.tanh(x - mean)) for phi, x in zip(best, step, strict=True)]
        scale = 0.3 / weighted_mean(other, weights)  # back on the budget
        other = [scale * phi for phi in other]
        assert objective(other, scores, weights, temperature) < objective(best, scores, weights, temperature)


def test_splitting_a_block_in_two_of_half_the_weight_changes_nothing() -> None:
    whole = entropic_allocation([0.1, 0.3, 0.2], [2.0, 3.0, 1.0], 0.3, 0.1)
    split = entropic_allocation([0.1, 0.3, 0.3, 0.2], [2.0, 1.5, 1.5, 1.0], 0.3, 0.1)
    assert [split[0], split[1], split[3]] == pytest.approx(whole, rel=1e-14)
    assert split[1] == split[2]


def test_only_score_differences_matter() -> None:
    scores, weights = random_scores(8, seed=4), random_weights(8, seed=4)
    shifted = [score + 1000 for score in scores]
    assert entropic_allocation(shifted, weights, 0.3, 0.1) == pytest.approx(
        entropic_allocation(scores, weights, 0.3, 0.1), rel=1e-10
    )


def test_more_important_blocks_lose_less() -> None:
    scores = random_scores(32, seed=5)
    sparsities = entropic_allocation(scores, [1.0] * 32, 0.3, 0.1)
    by_score = [phi for _, phi in sorted(zip(scores, sparsities, strict=True))]
    assert all(first > second for first, second in pairwise(by_score))


def test_lower_temperature_concentrates_the_loss() -> None:
    scores = random_scores(32, seed=6)
    largest = [max(entropic_allocation(scores, [1.0] * 32, 0.3, eps)) for eps in (10, 1, 0.5, 0.1, 0.05, 0.01)]
    assert all(first < second for first, second in pairwise(largest))


@pytest.mark.parametrize(("temperature", "tolerance"), [(math.inf, 1e-14), (1e6, 1e-6)])
def test_high_temperature_is_uniform(temperature: float, tolerance: float) -> None:
    scores, weights = random_scores(8, seed=7), random_weights(8, seed=7)
    assert entropic_allocation(scores, weights, 0.3, temperature) == pytest.approx([0.3] * 8, rel=tolerance)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-320])
def test_low_temperature_puts_the_whole_loss_on_the_least_important_block(temperature: float) -> None:
    assert entropic_allocation([0.5, 0.1, 0.9], [1, 1, 1], 0.2, temperature) == pytest.approx([0, 0.6, 0], abs=1e-15)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, math.inf])
def test_equal_scores_share_equally(temperature: float) -> None:
    assert entropic_allocation([0.3] * 5, [1, 2, 3, 4, 5], 0.25, temperature) == pytest.approx([0.25] * 5, rel=1e-14)


@pytest.mark.parametrize("average", [0.1, 0.3, 0.5, 0.79])
@pytest.mark.parametrize("seed", range(3))
def test_automatic_temperature_lets_the_largest_sparsity_be_80_percent(seed: int, average: float) -> None:
    scores, weights = random_scores(64, seed), random_weights(64, seed)
    sparsities, temperature = allocate(scores, weights, average, None)
    assert max(sparsities) == pytest.approx(LARGEST_SPARSITY, rel=1e-9)
    assert LARGEST_SPARSITY == 0.8
    assert sparsities == entropic_allocation(scores, weights, average, temperature)


@pytest.mark.parametrize(
    ("scores", "average"),
    [
        ([0.0, 0.01, 0.02, 0.03, 1.0], 0.3),
        ([*(0.04 + 0.001 * layer for layer in range(30)), 0.4, 0.9], 0.3),
        ([0.02 + 0.01 * layer for layer in range(32)], 0.05),
    ],
    ids=["one outlier", "two outliers", "small average"],
)
def test_automatic_temperature_reaches_80_percent_wherever_the_budget_allows(
    scores: list[float], average: float
) -> None:
    weights = [1.0] * len(scores)
    assert max(entropic_allocation(scores, weights, average, 1e-3)) > LARGEST_SPARSITY
    assert max(allocate(scores, weights, average, None)[0]) == pytest.approx(LARGEST_SPARSITY, rel=1e-6)


@pytest.mark.parametrize("average", [0.8, 0.9])
def test_automatic_allocation_is_uniform_where_the_average_reaches_the_largest(average: float) -> None:
    sparsities, temperature = allocate([0.1, 0.2, 0.3], [1, 1, 1], average, None)
    assert temperature == math.inf
    assert sparsities == pytest.approx([average] * 3, rel=1e-14)


def test_automatic_allocation_of_equal_scores_is_uniform() -> None:
    sparsities, temperature = allocate([0.2] * 4, [1, 2, 3, 4], 0.3, None)
    assert temperature == math.inf
    assert sparsities == pytest.approx([0.3] * 4, rel=1e-14)


def test_automatic_temperature_has_a_floor_where_too_few_blocks_carry_the_budget() -> None:
    """Two blocks with an average of 0.3 can give at most 0.6 to one of them."""
    scores = [0.1, 0.3]
    assert auto_temperature(scores, [1, 1], 0.3) == pytest.approx(0.2 / 1000, rel=1e-9)
    assert max(allocate(scores, [1, 1], 0.3, None)[0]) == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("average", [0.1, 0.3, 0.6, 0.9, 0.96])
def test_too_low_a_temperature_is_refused_with_one_that_works(seed: int, average: float) -> None:
    scores, weights = random_scores(32, seed), random_weights(32, seed)
    with pytest.raises(InvalidRequest) as refusal:
        allocate(scores, weights, average, 1e-4)
    message = str(refusal.value)
    assert message.startswith("--temperature 0.0001 asks one of the blocks for a sparsity of ")
    usable = float(re.search(r"at least (\S+)$", message)[1])
    assert math.isfinite(usable)
    sparsities, temperature = allocate(scores, weights, average, usable)
    assert temperature == usable
    assert max(sparsities) < 1
    assert weighted_mean(sparsities, weights) == pytest.approx(average, rel=1e-13)


def test_given_temperature_is_used_as_it_is() -> None:
    scores, weights = random_scores(32, seed=8), random_weights(32, seed=8)
    sparsities, temperature = allocate(scores, weights, 0.2, 0.15)
    assert temperature == 0.15
    assert sparsities == entropic_allocation(scores, weights, 0.2, 0.15)


def test_published_llama_2_7b_ranks_are_reproduced() -> None:
    """The scores follow from the printed ranks up to a constant, and give them back at the paper's temperature."""
    sparsities = [1 - rank / 4096 for rank in LLAMA_2_7B_RANKS]
    average = sum(sparsities) / 32
    assert 1 - average == pytest.approx(0.69997, abs=5e-6)
    scores = [0.7 - 0.1 * math.log(phi) for phi in sparsities]
    again = entropic_allocation(scores, [1.0] * 32, average, 0.1)
    assert [round(4096 * (1 - phi)) for phi in again] == LLAMA_2_7B_RANKS


def test_automatic_temperature_comes_close_to_the_published_one() -> None:
    """The paper's 0.1 gives its layer 27 a sparsity of 81.9 %; 80 % needs a slightly higher temperature."""
    sparsities = [1 - rank / 4096 for rank in LLAMA_2_7B_RANKS]
    scores = [-0.1 * math.log(phi) for phi in sparsities]
    assert max(sparsities) == pytest.approx(0.819, abs=5e-4)
    assert 0.1 < auto_temperature(scores, [1.0] * 32, 0.3) < 0.105
