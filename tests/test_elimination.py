"""Greedy elimination against brute force, least squares and the paper's choice."""

from __future__ import annotations

import pytest
import torch

from helpers import mixed, randn
from modegpt.decompositions import (
    greedy_elimination,
    nystrom_decomposition,
    refit,
    regularised,
    ridge_leverage_scores,
    top_indices,
    unit_channels,
    weight_energies,
)
from modegpt.methods import Greedy, Method
from modegpt.methods.greedy import DEAD
from modegpt.statistics import LayerStatistics
from modegpt.weights import MLPWeights

M, D, TOKENS = 24, 7, 60


def problem(seed: int, *, channels: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations Z (N, m) of very different sizes, and an output map (m, d) whose rows differ as well."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, channels, dtype=torch.float64)[torch.randperm(channels, generator=draw)]
    activations = torch.randn(TOKENS, channels, generator=draw, dtype=torch.float64) @ (mixing * sizes)
    rows = torch.logspace(1, -1, channels, dtype=torch.float64)[torch.randperm(channels, generator=draw)]
    return activations, torch.randn(channels, D, generator=draw, dtype=torch.float64) * rows[:, None]


def objective(matrix: torch.Tensor, output: torch.Tensor, kept: torch.Tensor, fitted: torch.Tensor) -> float:
    change = output.clone()
    change[kept] -= fitted
    return float((change * (matrix @ change)).sum())


def least_squares(matrix: torch.Tensor, output: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The minimum of J over W' by a solver that knows nothing of channels."""
    root = torch.linalg.cholesky(matrix).T
    fitted = torch.linalg.lstsq(root[:, kept], root @ output).solution
    return fitted, objective(matrix, output, kept, fitted)


def channels(units: list[int], width: int) -> torch.Tensor:
    return torch.tensor([unit * width + number for unit in units for number in range(width)])


def brute_force(matrix: torch.Tensor, output: torch.Tensor, width: int = 1) -> list[int]:
    """Every step of the greedy elimination, each by fitting what every choice leaves."""
    left, order = list(range(len(matrix) // width)), []
    while len(left) > 1:
        costs = {
            one: least_squares(matrix, output, channels([other for other in left if other != one], width))[1]
            for one in left
        }
        cheapest = min(costs, key=lambda one: costs[one])
        left.remove(cheapest)
        order.append(cheapest)
    return order


@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_the_cheapest(seed: int) -> None:
    activations, output = problem(seed)
    matrix = regularised(activations.T @ activations, 1e-6)
    for block in (1, M):
        assert greedy_elimination(matrix, output, block).order.tolist() == brute_force(matrix, output)


@pytest.mark.parametrize("width", [2, 3, 8, 24])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_in_blocks_of_channels_is_the_cheapest(seed: int, width: int) -> None:
    activations, output = problem(seed)
    matrix = regularised(activations.T @ activations, 1e-6)
    expected = brute_force(matrix, output, width)
    norm = float((output * (matrix @ output)).sum())
    for block in (1, M):
        result = greedy_elimination(matrix, output, block, width)
        assert result.order.tolist() == expected
        for rank in range(1, M // width + 1):
            kept = unit_channels(result.kept(rank), width)
            assert torch.equal(kept, channels(result.kept(rank).tolist(), width))
            error = least_squares(matrix, output, kept)[1]
            assert float(result.errors[M // width - rank]) == pytest.approx(error, rel=1e-6, abs=1e-9 * norm)


def test_dead_and_copied_blocks_go_first_and_leave_no_trace() -> None:
    activations, output = problem(5)
    activations[:, 6:9] = 0
    activations[:, 15:18] = activations[:, :3] @ torch.tensor([[1, 2, 0], [0, 1, 0], [3, 0, 1]]).double()
    matrix = regularised(activations.T @ activations, 1e-10)
    result = greedy_elimination(matrix, output, width=3)
    assert {int(result.order[0]), int(result.order[1])} in ({2, 5}, {2, 0})
    kept = unit_channels(result.kept(M // 3 - 2), 3)
    fitted, _ = refit(matrix, output, kept)
    exact = activations @ output
    torch.testing.assert_close(activations[:, kept] @ fitted, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("block", [1, 5, M])
@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 1.0])
def test_errors_are_those_of_the_least_squares_fit(ridge: float, block: int) -> None:
    activations, output = problem(3)
    matrix = regularised(activations.T @ activations, ridge)
    result = greedy_elimination(matrix, output, block)
    assert sorted([*result.order.tolist(), *result.kept(1).tolist()]) == list(range(M))
    for rank in range(1, M + 1):
        kept = result.kept(rank)
        fitted, error = least_squares(matrix, output, kept)
        ours, stated = refit(matrix, output, kept)
        torch.testing.assert_close(ours, fitted, rtol=1e-6, atol=1e-6 * float(output.abs().max()))
        scale = float((output * (matrix @ output)).sum())
        assert stated == pytest.approx(error, rel=1e-6, abs=1e-9 * scale)
        assert float(result.errors[M - rank]) == pytest.approx(error, rel=1e-6, abs=1e-9 * scale)


def test_blocks_cost_next_to_nothing() -> None:
    activations, output = problem(4, channels=400)
    gram = regularised(activations.T @ activations / TOKENS + torch.eye(400), 1e-3)
    exact, blocks = (greedy_elimination(gram, output, block).errors for block in (1, 32))
    assert float((blocks[100:300] / exact[100:300]).max()) < 1.01


def test_dead_and_copied_channels_go_first_and_leave_no_trace() -> None:
    activations, output = problem(5)
    activations[:, 3] = 0
    activations[:, 7] = 2 * activations[:, 1]
    matrix = regularised(activations.T @ activations, 1e-10)
    result = greedy_elimination(matrix, output)
    assert {int(result.order[0]), int(result.order[1])} in ({3, 7}, {3, 1})
    norm = float((output * (matrix @ output)).sum())
    assert float(result.errors[2]) < 1e-9 * norm < float(result.errors[3])
    kept = result.kept(M - 2)
    fitted, _ = refit(matrix, output, kept)
    torch.testing.assert_close(activations[:, kept] @ fitted, activations @ output, rtol=1e-6, atol=1e-6)


def test_nothing_is_decided_by_channels_without_energy() -> None:
    result = greedy_elimination(regularised(torch.zeros(4, 4, dtype=torch.float64), 1e-3), torch.eye(4).double())
    assert torch.equal(result.errors, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))


def test_rounding_that_outweighs_the_ridge() -> None:
    """Ten tokens in single precision: the matrix has eigenvalues below zero."""
    activations = mixed(10, M).float()
    gram, output = (activations.T @ activations).double(), randn(M, D)
    gram = (gram + gram.T) / 2
    matrix = regularised(gram, 1e-12)
    assert torch.linalg.eigvalsh(matrix)[0] < 0
    result = greedy_elimination(matrix, output)
    assert result.errors.isfinite().all()
    kept = result.kept(12)
    fitted, error = refit(matrix, output, kept)
    assert 0 <= error < 1e-3 * float((output * (gram @ output)).sum())
    assert fitted.isfinite().all()


def hostile(kind: str, activations: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The problem with what calibration text does to real MLPs."""
    m = len(output)
    if kind == "few tokens":
        activations = activations[: m // 2]
    elif kind == "dead and copied channels":
        activations = activations.clone()
        activations[:, : m // 4] = 0
        activations[:, m // 4 : m // 2] = activations[:, m // 2 : m // 2 + m // 4]
    elif kind == "one huge channel":
        activations = activations * torch.where(torch.arange(m) == 1, 1e4, 1.0)
    elif kind == "rows of the output map that are zero":
        output = output * (torch.arange(m) % 3 > 0)[:, None]
    return activations, output


@pytest.mark.parametrize("channels", [8, 200])  # 200: several blocks, and the inverse is made smaller on the way
@pytest.mark.parametrize(
    "kind", ["few tokens", "dead and copied channels", "one huge channel", "rows of the output map that are zero"]
)
@pytest.mark.parametrize("single", [False, True], ids=["float64", "products in float32"])
def test_never_worse_than_the_paper_on_hostile_inputs(kind: str, channels: int, single: bool) -> None:
    for seed in range(40 if channels == 8 else 2):
        activations, output = hostile(kind, *problem(seed, channels=channels))
        gram = (activations.float().T @ activations.float()).double() if single else activations.T @ activations
        weights = MLPWeights((randn(3, channels, seed=seed),), (None,), output)
        ladder = Greedy(Greedy.default_ridge).mlp(weights, LayerStatistics({"mlp": gram}))
        matrix = regularised(gram, Greedy.default_ridge, weight_energies(weights.inputs).clamp_min(DEAD))
        for rank in (channels // 4, channels // 2, channels - 2):
            ours, paper = ladder.at(rank), nystrom_decomposition(gram, output, rank, Method.default_ridge)
            theirs = objective(matrix, output, paper.kept, paper.output)
            assert ours.error <= theirs * (1 + 1e-6), (seed, rank)
            loss = objective(matrix, output, ours.kept, ours.weights.output)
            assert loss == pytest.approx(ours.error, rel=1e-4, abs=1e-9 * ours.norm)


def ours_and_the_papers(seed: int, rank: int) -> tuple[float, float]:
    """Our objective, and that of the paper's channels and output map."""
    activations, output = problem(seed, channels=8)
    gram, inputs = activations.T @ activations, (randn(3, 8, seed=seed), randn(3, 8, seed=seed + 500))
    inputs[0][:, 3] = 0  # a channel that weights alone would call dead
    weights = MLPWeights(inputs, (None, None), output)
    ours = Greedy(Greedy.default_ridge).mlp(weights, LayerStatistics({"mlp": gram})).at(rank)
    paper = nystrom_decomposition(gram, output, rank, Method.default_ridge)
    matrix = regularised(gram, Greedy.default_ridge, weight_energies(inputs).clamp_min(DEAD))
    return ours.error, objective(matrix, output, paper.kept, paper.output)


def test_never_worse_than_the_paper() -> None:
    for seed in range(200):
        for rank in (2, 4, 6):
            ours, theirs = ours_and_the_papers(seed, rank)
            assert ours <= theirs * (1 + 1e-9), (seed, rank)


def test_channels_that_the_text_never_uses_go_by_what_their_weights_could_do() -> None:
    """Of channels without energy the one goes first that could have least, and a dead one before all others."""
    activations, output = problem(1, channels=6)
    activations[:, 2:] = 0
    inputs = torch.ones(3, 6)
    inputs[:, 3], inputs[:, 4], inputs[:, 5] = 0.5, 3, 0
    weights = MLPWeights((inputs,), (None,), output / output.norm(dim=1, keepdim=True))
    ladder = Greedy(1e-2).mlp(weights, LayerStatistics({"mlp": activations.T @ activations}))
    kept = [set(ladder.at(rank).kept.tolist()) for rank in range(5, 1, -1)]
    assert kept == [{0, 1, 2, 3, 4}, {0, 1, 2, 4}, {0, 1, 4}, {0, 1}]


def test_energies_that_weights_suggest() -> None:
    inputs = (torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    torch.testing.assert_close(weight_energies(inputs), torch.tensor([10.0, 72.0], dtype=torch.float64) / 41)
    assert torch.equal(weight_energies((torch.zeros(2, 3),)), torch.zeros(3, dtype=torch.float64))


def test_never_worse_than_the_paper_on_the_theorem_s_own_objective() -> None:
    for seed in range(200):
        activations, output = problem(seed, channels=8)
        gram, weights = activations.T @ activations, MLPWeights((randn(3, 8, seed=seed),), (None,), output)
        for rank in (2, 4, 6):
            ours = Greedy(1e-9).mlp(weights, LayerStatistics({"mlp": gram})).at(rank)
            paper = nystrom_decomposition(gram, output, rank, Method.default_ridge)
            loss = objective(gram, output, ours.kept, ours.weights.output)  # without any ridge
            assert loss <= paper.error + 1e-6 * paper.norm, (seed, rank)


def test_the_paper_is_followed_where_greedy_steps_lead_astray() -> None:
    followed = 0
    for seed in range(300):
        draw = torch.Generator().manual_seed(seed)
        activations = torch.randn(6, 6, generator=draw, dtype=torch.float64)
        gram, output = activations.T @ activations, torch.eye(6, dtype=torch.float64)
        matrix = regularised(gram, 1e-2)
        greedy = refit(matrix, output, greedy_elimination(matrix, output).kept(2))[1]
        chosen = top_indices(ridge_leverage_scores(gram, Method.default_ridge), 2)
        paper = refit(matrix, output, chosen)[1]
        if paper < greedy * (1 - 1e-6):
            followed += 1
            weights = MLPWeights((torch.ones(3, 6),), (None,), output)
            ours = Greedy(1e-2).mlp(weights, LayerStatistics({"mlp": gram})).at(2)
            assert ours.error == pytest.approx(paper)
            assert torch.equal(ours.kept, chosen)
    assert followed > 0


def test_much_better_than_the_paper_where_output_rows_differ() -> None:
    _, output = problem(6)
    activations = torch.randn(TOKENS, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = activations.T @ activations
    weights = MLPWeights((torch.ones(3, M),), (None,), output)
    ours = Greedy(1e-4).mlp(weights, LayerStatistics({"mlp": gram})).at(M // 2).error
    assert ours < 0.2 * nystrom_decomposition(gram, output, M // 2, 1e-4).error
