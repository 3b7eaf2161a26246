"""Values fitted to what the heads put out, against least squares and against the paper's factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modegpt.decompositions import energy_bases, group_bases, regularised, svd_decomposition, value_ladder
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


def least_error(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor) -> float:
    """The least J for given bases (G, h, k) by a solver that knows nothing of heads."""
    per_group = output.shape[1]
    blocks = torch.block_diag(*[one for one in basis for _ in range(per_group)])
    root, flat = torch.linalg.cholesky(matrix).T, output.flatten(0, 2)
    fit = torch.linalg.lstsq(root @ blocks, root @ flat).solution
    return float((root @ (blocks @ fit - flat)).square().sum())


@pytest.mark.parametrize("bases", [group_bases, energy_bases])
def test_errors_and_maps_of_every_rank_are_the_least_squares_ones(bases: Any) -> None:
    matrix, output = problem(0)
    ladder = value_ladder(matrix, output, bases(matrix, output))
    norm = float((output.flatten(0, 2) * (matrix @ output.flatten(0, 2))).sum())
    assert float(ladder.errors[0]) == pytest.approx(norm)
    for rank in range(1, H + 1):
        basis, fitted = ladder.at(rank)
        change = (output - basis.unsqueeze(1) @ fitted).flatten(0, 2)
        error = float((change * (matrix @ change)).sum())
        assert error == pytest.approx(least_error(matrix, output, basis), rel=1e-6, abs=1e-9 * norm)
        assert float(ladder.errors[rank]) == pytest.approx(error, rel=1e-6, abs=1e-9 * norm)


def test_one_head_is_the_papers_optimum() -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(100, 15, generator=draw, dtype=torch.float64)
    value = torch.randn(1, 15, H, generator=draw, dtype=torch.float64)
    output = torch.randn(1, 1, H, D, generator=draw, dtype=torch.float64)
    matrix = value[0].T @ inputs.T @ inputs @ value[0]
    ladder = value_ladder(matrix, output, group_bases(matrix, output))
    for rank in range(1, H):
        paper = svd_decomposition(inputs.T @ inputs, value, output, rank)
        assert float(ladder.errors[rank]) == pytest.approx(paper.error, rel=1e-8)


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
        errors = value_ladder(matrix, output, group_bases(matrix, output)).errors
        assert float(errors[rank]) == pytest.approx(tail, rel=1e-8)


def values_of(matrix: torch.Tensor, output: torch.Tensor, rank: int, ridge: float = 1e-4) -> Any:
    weights = ValueOutputWeights(torch.randn(G, 9, H, dtype=torch.float64), output, None)
    return weights, Greedy(ridge).value_output(weights, LayerStatistics({"head_outputs": matrix})).at(rank)


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
            paper = least_error(ridged, output, energy_bases(ridged, output)[..., :rank])
            assert ours.error <= paper * (1 + 1e-7)


def test_hardly_ever_worse_than_algorithm_3_and_its_grouped_form() -> None:
    """Its factors, found on the inputs alone, under the objective on what the heads put out.

    Never is proved of the bases that are compared (above); those found on the inputs are not among them, and where
    attention mixes tokens at random they can be the better ones by chance.
    """
    ratios = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        inputs = torch.randn(60, 15, generator=draw, dtype=torch.float64)
        inputs = inputs * torch.logspace(-1, 1, 15, dtype=torch.float64)
        value = torch.randn(G, 15, H, generator=draw, dtype=torch.float64)
        output = torch.randn(G, HEADS, H, D, generator=draw, dtype=torch.float64)
        attention = (3 * torch.randn(G, HEADS, 60, 60, generator=draw, dtype=torch.float64)).softmax(-1)

        def outputs(thin: torch.Tensor, inputs: torch.Tensor = inputs, a: torch.Tensor = attention) -> torch.Tensor:
            return a @ (inputs @ thin)[:, None]  # (G, g, N, k)

        heads = outputs(value).permute(2, 0, 1, 3).flatten(1)
        for rank in range(1, H):
            weights = ValueOutputWeights(value, output, None)
            sums = LayerStatistics({"head_outputs": heads.T @ heads})
            ours = Greedy(1e-9).value_output(weights, sums).at(rank).weights
            paper = svd_decomposition(inputs.T @ inputs, value, output, rank)
            errors = [
                float((outputs(thin.value) @ thin.output - outputs(value) @ output).sum((0, 1)).square().sum())
                for thin in (ours, paper)
            ]
            ratios.append(errors[0] / errors[1])
    assert sum(ratio > 1 + 1e-6 for ratio in ratios) <= 0.01 * len(ratios)
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) < 0.9


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
