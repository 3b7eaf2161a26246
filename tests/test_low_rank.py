"""Truncated singular value decompositions, weighted and joint."""

from __future__ import annotations

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import LowRank, activation_scales, break_even, low_rank, whitening

RIDGE = 1e-10


def product(found: LowRank, rank: int) -> torch.Tensor:
    first, seconds = found.at(rank)
    return first @ torch.cat(seconds, dim=1)


def test_a_matrix_of_known_singular_values() -> None:
    left, right = (torch.linalg.qr(randn(6, 6, seed=seed)).Q for seed in (1, 2))
    weight = left @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)) @ right.mT
    found = low_rank([weight], 6)
    assert torch.allclose(found.errors, torch.tensor([55.0, 30.0, 14.0, 5.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    expected = left[:, :2] @ torch.diag(torch.tensor([5.0, 4.0], dtype=torch.float64)) @ right[:, :2].mT
    assert torch.allclose(product(found, 2), expected)


@pytest.mark.parametrize(("inputs", "widths"), [(10, (7,)), (6, (9,)), (8, (5, 6)), (5, (1, 2, 9))])
@pytest.mark.parametrize("kind", ["plain", "scaled", "whitened"])
def test_errors_are_the_objective_at_every_rank(inputs: int, widths: tuple[int, ...], kind: str) -> None:
    maps = [randn(inputs, width, seed=width) for width in widths]
    gram = (x := mixed(40, inputs)).mT @ x
    scales = activation_scales(gram.diagonal(), RIDGE)
    root = {"plain": None, "scaled": scales, "whitened": whitening(gram, RIDGE)}[kind]
    whole = torch.cat(maps, dim=1)
    found = low_rank(maps, 100, root)
    assert len(found.errors) == min(inputs, sum(widths)) + 1
    for rank, error in enumerate(found.errors.tolist()):
        difference = whole - product(found, rank)
        weighted = difference
        if root is not None:
            weighted = root[:, None] * difference if root.dim() == 1 else root.mT @ difference
        assert error == pytest.approx(squared(weighted), rel=1e-8, abs=1e-9 * float(found.errors[0]))
        assert [second.shape for second in found.at(rank)[1]] == [(rank, width) for width in widths]


def test_the_whitened_error_is_that_of_the_outputs() -> None:
    x, weight = mixed(50, 9), randn(9, 12, seed=3)
    found = low_rank([weight], 5, whitening(x.mT @ x, RIDGE))
    for rank in range(1, 6):
        assert float(found.errors[rank]) == pytest.approx(squared(x @ weight - x @ product(found, rank)), rel=1e-6)


def test_no_perturbation_of_the_factors_is_better() -> None:
    x, maps = mixed(50, 9), [randn(9, 5, seed=3), randn(9, 8, seed=4)]
    whole = torch.cat(maps, dim=1)
    found = low_rank(maps, 4, whitening(x.mT @ x, RIDGE))
    first, seconds = found.at(4)
    second = torch.cat(seconds, dim=1)
    best = squared(x @ (whole - first @ second))
    for seed in range(50):
        for size in (1e-3, 1e-2, 0.1):
            other_first = first + size * randn(*first.shape, seed=seed)
            other_second = second + size * randn(*second.shape, seed=seed + 100)
            assert squared(x @ (whole - other_first @ other_second)) > best
            refit = torch.linalg.lstsq(x @ other_first, x @ whole).solution  # the best for another first factor
            assert squared(x @ whole - x @ other_first @ refit) >= best * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_each_method_is_best_by_its_own_objective(seed: int) -> None:
    x, weight = mixed(60, 10, seed=seed), randn(10, 14, seed=seed + 50)
    gram = x.mT @ x
    scales = activation_scales(gram.diagonal(), RIDGE)
    plain, scaled, whitened = (low_rank([weight], 6, root) for root in (None, scales, whitening(gram, RIDGE)))
    for rank in range(1, 7):
        differences = [weight - product(found, rank) for found in (plain, scaled, whitened)]
        of_weights, of_outputs = [squared(one) for one in differences], [squared(x @ one) for one in differences]
        of_scaled = [squared(scales[:, None] * one) for one in differences]
        assert of_weights[0] == min(of_weights)
        assert of_scaled[1] == min(of_scaled)
        assert of_outputs[2] == min(of_outputs) < of_outputs[0]


def test_truly_low_rank_maps_come_back_exactly() -> None:
    shared = randn(12, 3)
    maps = [shared @ randn(3, 7, seed=1), shared @ randn(3, 9, seed=2)]
    found = low_rank(maps, 5)
    first, seconds = found.at(3)
    assert float(found.errors[3]) < 1e-20 * float(found.errors[0])
    for weight, second in zip(maps, seconds, strict=True):
        assert torch.allclose(first @ second, weight)


def test_a_shared_factor_costs_less_where_maps_share_directions() -> None:
    shared = randn(12, 3)
    maps = [shared @ randn(3, 8, seed=1), shared @ randn(3, 8, seed=2)]
    noise = [randn(12, 8, seed=5) * 0.01, randn(12, 8, seed=6) * 0.01]
    maps = [weight + extra for weight, extra in zip(maps, noise, strict=True)]
    joint = low_rank(maps, 3)
    parameters = 3 * (12 + 16)
    alone = [low_rank([weight], 2) for weight in maps]  # 2 * 2 * (12 + 8) parameters, nearly as many
    assert parameters <= 2 * 2 * (12 + 8) + 4
    assert float(joint.errors[3]) < sum(float(one.errors[2]) for one in alone)


def test_factors_are_balanced() -> None:
    weight = 1e-4 * randn(10, 12)
    x = 1e3 * mixed(30, 10)
    found = low_rank([weight], 8, whitening(x.mT @ x, RIDGE))
    assert torch.allclose(found.first.norm(dim=0), found.second.norm(dim=1))


def test_a_zero_map_has_zero_factors() -> None:
    found = low_rank([torch.zeros(6, 4, dtype=torch.float64)], 2)
    assert float(found.errors.abs().max()) == 0
    assert squared(product(found, 2)) == 0
    assert bool(found.first.isfinite().all())
    assert bool(found.second.isfinite().all())


def test_whitening_is_a_root_of_the_gram_matrix() -> None:
    gram = (x := mixed(30, 8)).mT @ x
    root = whitening(gram, 1e-3)
    shifted = gram + 1e-3 * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.allclose(root @ root.mT, shifted)
    assert torch.equal(root, root.tril())


def test_whitening_where_rounding_outweighs_the_ridge() -> None:
    x = randn(3, 8)
    gram = x.mT @ x - 1e-6 * torch.eye(8, dtype=torch.float64)  # three tokens, and eigenvalues below zero
    root = whitening(gram, 1e-9)
    assert torch.equal(root, root.tril())
    assert torch.allclose(root @ root.mT, gram, atol=2e-6)
    found = low_rank([randn(8, 5, seed=1)], 4, root)
    assert bool(found.first.isfinite().all())
    assert squared(x @ (randn(8, 5, seed=1) - product(found, 3))) < 1e-6  # three tokens need three directions


def test_a_layer_that_was_never_used_is_truncated_as_without_data() -> None:
    weight, nothing = randn(6, 5), torch.zeros(6, 6, dtype=torch.float64)
    plain = product(low_rank([weight], 2), 2)
    for root in (activation_scales(nothing.diagonal(), 1e-4), whitening(nothing, 1e-4)):
        assert torch.allclose(product(low_rank([weight], 2, root), 2), plain)


def test_scales_are_powers_of_the_root_mean_square() -> None:
    x = mixed(30, 5)
    energy = x.square().sum(0)
    sizes = (energy / 30).sqrt()
    scales = activation_scales(energy, 1e-12)
    assert torch.allclose(scales / scales[0], (sizes / sizes[0]).sqrt())
    assert torch.allclose(activation_scales(energy, 1e-12, alpha=1.0), energy.sqrt())
    assert bool((activation_scales(torch.tensor([4.0, 0.0]).double(), 1e-4) > 0).all())


@pytest.mark.parametrize(("inputs", "outputs", "expected"), [(4096, 4096, 2048), (4096, 8192, 2730), (1, 7, 0)])
def test_break_even(inputs: int, outputs: int, expected: int) -> None:
    rank = break_even(inputs, outputs)
    assert rank == expected
    assert rank * (inputs + outputs) <= inputs * outputs < (rank + 1) * (inputs + outputs)
