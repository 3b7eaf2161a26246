"""Values fitted to what the heads put out, against least squares and against the paper's factors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from modegpt.decompositions import (
    alternating_fit,
    energy_bases,
    group_bases,
    mean_blocks,
    output_fit,
    regularised,
    svd_decomposition,
    value_errors,
    values,
)
from modegpt.methods import Greedy
from modegpt.statistics import LayerStatistics
from modegpt.weights import ValueOutputWeights

G, HEADS, H, D = 2, 3, 6, 20


def problem(seed: int, *, per_group: int = HEADS) -> tuple[torch.Tensor, torch.Tensor]:
    """A = Z^T Z + ridge of correlated heads, and W_o (G, g, h, d)."""
    draw = torch.Generator().manual_seed(seed)
    size = G * per_group * H
    outputs = torch.randn(200, size, generator=draw, dtype=torch.float64)
    outputs = outputs @ torch.randn(size, size, generator=draw, dtype=torch.float64)
    output = torch.randn(G, per_group, H, D, generator=draw, dtype=torch.float64)
    return regularised(outputs.T @ outputs, 1e-6), output


def joint(matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return group_bases(mean_blocks(matrix, output), output)


def by_energy(matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return energy_bases(mean_blocks(matrix, output))


def least_error(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor) -> float:
    """The least J for given bases (G, h, k) by a solver that knows nothing of heads."""
    per_group = output.shape[1]
    blocks = torch.block_diag(*[one for one in basis for _ in range(per_group)])
    root, flat = torch.linalg.cholesky(matrix).T, output.flatten(0, 2)
    fit = torch.linalg.lstsq(root @ blocks, root @ flat).solution
    return float((root @ (blocks @ fit - flat)).square().sum())


@pytest.mark.parametrize("bases", [joint, by_energy])
def test_errors_and_maps_of_every_rank_are_the_least_squares_ones(bases: Any) -> None:
    matrix, output = problem(0)
    whole = bases(matrix, output)
    errors = value_errors(matrix, output, whole)
    norm = float((output.flatten(0, 2) * (matrix @ output.flatten(0, 2))).sum())
    assert float(errors[0]) == pytest.approx(norm)
    for rank in range(1, H + 1):
        basis = whole[..., :rank]
        fitted = output_fit(matrix, output, basis)
        change = (output - basis.unsqueeze(1) @ fitted).flatten(0, 2)
        error = float((change * (matrix @ change)).sum())
        assert error == pytest.approx(least_error(matrix, output, basis), rel=1e-6, abs=1e-9 * norm)
        assert float(errors[rank]) == pytest.approx(error, rel=1e-6, abs=1e-9 * norm)


def test_one_head_is_the_papers_optimum() -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(100, 15, generator=draw, dtype=torch.float64)
    value = torch.randn(1, 15, H, generator=draw, dtype=torch.float64)
    output = torch.randn(1, 1, H, D, generator=draw, dtype=torch.float64)
    matrix = value[0].T @ inputs.T @ inputs @ value[0]
    errors = value_errors(matrix, output, joint(matrix, output))
    for rank in range(1, H):
        paper = svd_decomposition(inputs.T @ inputs, value, output, rank)
        assert float(errors[rank]) == pytest.approx(paper.error, rel=1e-8)


def test_heads_that_agree_get_the_joint_optimum() -> None:
    """With one A for all heads of a group and none in common between them, no basis is better."""
    matrix, output = problem(2)
    block = matrix[:H, :H]
    matrix = torch.block_diag(*[block] * (G * HEADS))
    root = torch.linalg.cholesky(block).T
    for rank in range(1, H):
        tail = sum(
            float(torch.linalg.svdvals(root @ output[group].transpose(0, 1).flatten(1))[rank:].square().sum())
            for group in range(G)
        )
        errors = value_errors(matrix, output, joint(matrix, output))
        assert float(errors[rank]) == pytest.approx(tail, rel=1e-8)


def loss_of(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
    change = (output - basis.unsqueeze(1) @ fitted).flatten(0, 2)
    return (change * (matrix @ change)).sum()


@pytest.mark.parametrize("rank", range(1, H))
def test_bases_and_maps_in_turn_have_the_stated_error_which_falls(rank: int) -> None:
    for seed in range(5):
        matrix, output = problem(seed)
        start = joint(matrix, output)
        before = float(value_errors(matrix, output, start)[rank])
        basis, fitted, error = alternating_fit(matrix, output, start[..., :rank])
        assert error < before
        assert float(loss_of(matrix, output, basis, fitted)) == pytest.approx(error, rel=1e-7)
        assert least_error(matrix, output, basis) == pytest.approx(error, rel=1e-7)


def test_many_rounds_end_where_neither_can_do_better() -> None:
    matrix, output = problem(0)
    with patch.object(values, "ROUNDS", 2000):
        basis, fitted, error = alternating_fit(matrix, output, joint(matrix, output)[..., :3])
    basis.requires_grad_(), fitted.requires_grad_()
    slopes = torch.autograd.grad(loss_of(matrix, output, basis, fitted), (basis, fitted))
    for slope, x in zip(slopes, (basis, fitted), strict=True):
        assert float(slope.norm() * x.detach().norm()) < 1e-3 * error


@pytest.mark.parametrize("rank", range(1, H))
def test_where_the_joint_svd_is_the_optimum_nothing_changes(rank: int) -> None:
    matrix, output = problem(2)
    alike = torch.block_diag(*[matrix[:H, :H]] * (G * HEADS))
    errors = value_errors(alike, output, joint(alike, output))
    _, _, error = alternating_fit(alike, output, joint(alike, output)[..., :rank])
    assert error == pytest.approx(float(errors[rank]), rel=1e-8)


@pytest.mark.parametrize("what", ["nothing put out", "one silent head", "narrow"])
def test_degenerate_heads_stay_finite_in_turn(what: str) -> None:
    matrix, output = problem(0)
    if what == "narrow":  # fewer output channels than values: W_o' has less than full rank
        output = output[..., :2]
    elif what == "one silent head":
        output = output.clone()
        output[0, 0] = 0
    else:
        output = torch.zeros_like(output)
    basis, fitted, error = alternating_fit(matrix, output, joint(matrix, output)[..., :4])
    assert basis.isfinite().all()
    assert fitted.isfinite().all()
    assert 0 <= error <= float(value_errors(matrix, output, joint(matrix, output))[4]) * (1 + 1e-9) + 1e-12


def values_of(matrix: torch.Tensor, output: torch.Tensor, rank: int, ridge: float = 1e-4) -> Any:
    weights = ValueOutputWeights(torch.randn(G, 9, H, dtype=torch.float64), output, None)
    return weights, Greedy(ridge).value_output(
        weights, LayerStatistics({"head_outputs": matrix, "value": mean_blocks(matrix, output)})
    ).final(rank)


@pytest.mark.parametrize("adversarial", [False, True])
def test_never_worse_than_the_papers_bases(adversarial: bool) -> None:
    for seed in range(40):
        matrix, output = problem(seed)
        if adversarial:  # the mean of a group's blocks says little about any of them
            sizes = torch.logspace(-4, 4, G * HEADS, dtype=torch.float64)
            sizes = sizes[torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))]
            scale = sizes.repeat_interleave(H)
            matrix = matrix * scale[:, None] * scale
        for rank in range(1, H):
            _, ours = values_of(matrix, output, rank)
            ridged = regularised(matrix, 1e-4)
            paper = least_error(ridged, output, by_energy(ridged, output)[..., :rank])
            assert ours.error <= paper * (1 + 1e-7)


def nothing(outputs: torch.Tensor) -> float:
    """What a ridge of 1e-9 and rounding leave of an error that is zero."""
    return 1e-7 * float(outputs.square().sum())


@pytest.mark.parametrize("per_group", [1, HEADS])
@pytest.mark.parametrize("attention", ["to itself", "sharp", "even"])
@pytest.mark.parametrize("few", [False, True], ids=["", "inputs of less than full rank"])
def test_never_worse_than_algorithm_3_and_its_grouped_form(per_group: int, attention: str, few: bool) -> None:
    """Its factors, found on the inputs alone, under the objective on what the heads put out."""
    ratios = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        inputs = torch.randn(60, 15, generator=draw, dtype=torch.float64)
        inputs = inputs * torch.logspace(-1, 1, 15, dtype=torch.float64)
        if few:
            inputs[:, 5:] = 0
        value = torch.randn(G, 15, H, generator=draw, dtype=torch.float64)
        output = torch.randn(G, per_group, H, D, generator=draw, dtype=torch.float64)
        sharpness = {"to itself": 0.0, "sharp": 3.0, "even": 0.1}[attention]
        paid = (sharpness * torch.randn(G, per_group, 60, 60, generator=draw, dtype=torch.float64)).softmax(-1)
        if attention == "to itself":
            paid = torch.eye(60, dtype=torch.float64).expand_as(paid)

        def outputs(thin: torch.Tensor, inputs: torch.Tensor = inputs, a: torch.Tensor = paid) -> torch.Tensor:
            return a @ (inputs @ thin)[:, None]  # (G, g, N, k)

        heads = outputs(value).permute(2, 0, 1, 3).flatten(1)
        moment = value.mT @ (inputs.T @ inputs) @ value
        for rank in range(1, H):
            weights = ValueOutputWeights(value, output, None)
            sums = LayerStatistics({"head_outputs": heads.T @ heads, "value": moment})
            paper = svd_decomposition(inputs.T @ inputs, value, output, rank)
            solutions = (getattr(Greedy(1e-9).value_output(weights, sums), name)(rank) for name in ("at", "final"))
            whole = (outputs(value) @ output).sum((0, 1))
            basis = torch.linalg.lstsq(value, paper.value).solution
            ridged = float(loss_of(regularised(heads.T @ heads, 1e-2), output, basis, paper.output))
            assert Greedy(1e-2).value_output(weights, sums).at(rank).error <= ridged * (1 + 1e-6)
            errors = [  # none is less than rounding
                max(float(((outputs(thin.value) @ thin.output).sum((0, 1)) - whole).square().sum()), nothing(whole))
                for thin in (paper, *(solution.weights for solution in solutions))
            ]
            ratios.append([errors[1] / errors[0], errors[2] / errors[1]])
    assert max(ratio for one in ratios for ratio in one) <= 1 + 1e-6
    assert sum(one[0] for one in ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("per_group", [1, HEADS])
def test_values_that_are_always_zero_change_nothing_for_the_others(per_group: int) -> None:
    matrix, output = problem(0, per_group=per_group)
    inputs = mean_blocks(matrix, output)
    matrix[: per_group * H] = 0
    matrix[:, : per_group * H] = 0
    inputs[0] = 0
    weights = ValueOutputWeights(torch.randn(G, 9, H, dtype=torch.float64), output, None)
    ladder = Greedy(1e-4).value_output(weights, LayerStatistics({"head_outputs": matrix, "value": inputs}))
    ridged = regularised(matrix, 1e-4)
    for rank in range(1, H):
        plain, final = ladder.at(rank), ladder.final(rank)
        assert final.error <= plain.error * (1 + 1e-9)
        basis = torch.linalg.lstsq(weights.value, final.weights.value).solution
        assert float(loss_of(ridged, output, basis, final.weights.output)) == pytest.approx(final.error, rel=1e-6)


def test_weights_have_the_stated_error_and_are_balanced() -> None:
    matrix, output = problem(3)
    weights, ours = values_of(matrix, output, 3)
    # W_v = V fixes P by V P = W_v'.
    basis = torch.linalg.lstsq(weights.value, ours.weights.value).solution
    change = (output - basis.unsqueeze(1) @ ours.weights.output).flatten(0, 2)
    ridged = regularised(matrix, 1e-4)
    assert float((change * (ridged @ change)).sum()) == pytest.approx(ours.error, rel=1e-6)
    torch.testing.assert_close(ours.weights.value.norm(dim=-2), ours.weights.output.norm(dim=(-3, -1)))
    assert values_of(matrix, output, H)[1].weights.output is output
