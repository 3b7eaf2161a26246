"""The linear algebra the decompositions share."""

from __future__ import annotations

import pytest
import torch

from helpers import mixed, randn
from modegpt.decompositions.linalg import conjugate_gradients, solve_psd, top_indices


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Compare relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_well_conditioned_matrix_is_inverted(size: int) -> None:
    factor = randn(4 * size + 4, size, seed=size)
    matrix, rhs = factor.T @ factor, randn(size, 3)
    assert_near(solve_psd(matrix, rhs), torch.linalg.pinv(matrix, hermitian=True) @ rhs, rtol=1e-11)


def test_diagonal_matrix_has_the_reciprocal_as_its_answer() -> None:
    diagonal = torch.tensor([4.0, 0.5, 0.0, 10.0], dtype=torch.float64)
    expected = torch.diag(torch.tensor([0.25, 2.0, 0.0, 0.1], dtype=torch.float64))
    assert_near(solve_psd(torch.diag(diagonal), torch.eye(4, dtype=torch.float64)), expected, rtol=1e-15)


@pytest.mark.parametrize("decades", [4, 8, 14])
def test_badly_scaled_channels_do_not_cost_accuracy(decades: int) -> None:
    """With A = D U D the answer is D^-1 U^-1 D^-1, however far apart the entries of D are."""
    factor = randn(60, 12)
    unit, scale = factor.T @ factor, torch.logspace(-decades / 2, decades / 2, 12, dtype=torch.float64)
    rhs = randn(12, 5, seed=1)
    actual = solve_psd(unit * scale[:, None] * scale, rhs * scale[:, None]) * scale[:, None]
    assert_near(actual, torch.linalg.pinv(unit, hermitian=True) @ rhs, rtol=1e-11)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_singular_matrix_with_unit_diagonal_gives_the_pseudo_inverse(rank: int) -> None:
    vectors = torch.nn.functional.normalize(randn(rank, 10), dim=0)
    matrix, rhs = vectors.T @ vectors, randn(10, 4, seed=1)
    assert_near(solve_psd(matrix, rhs), torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ rhs, rtol=1e-10)


def test_rounding_does_not_hide_a_singular_direction() -> None:
    """One direction is missing; in part of these cases rounding lets a Cholesky factorisation succeed."""
    for size in (3, 10, 30):
        for seed in range(100):
            vectors = torch.nn.functional.normalize(randn(size - 1, size, seed=seed), dim=0)
            matrix = vectors.T @ vectors
            expected = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
            assert_near(solve_psd(matrix, torch.eye(size, dtype=torch.float64)), expected, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_singular_matrix_still_solves_every_consistent_system(rank: int) -> None:
    activations = mixed(rank, 10)
    matrix = activations.T @ activations
    rhs = matrix @ randn(10, 4, seed=1)
    assert_near(matrix @ solve_psd(matrix, rhs), rhs, rtol=1e-10)


def test_dead_channels_give_zero_rows_and_leave_the_others_alone() -> None:
    activations = randn(50, 6)
    activations[:, [1, 4]] = 0
    alive = torch.tensor([0, 2, 3, 5])
    matrix, rhs = activations.T @ activations, randn(6, 3, seed=1)
    actual = solve_psd(matrix, rhs)
    assert torch.equal(actual[[1, 4]], torch.zeros(2, 3, dtype=torch.float64))
    assert_near(actual[alive], torch.linalg.inv(matrix[alive][:, alive]) @ rhs[alive], rtol=1e-11)


def test_zero_matrix_gives_zero() -> None:
    assert torch.equal(
        solve_psd(torch.zeros(4, 4, dtype=torch.float64), randn(4, 2)), torch.zeros(4, 2, dtype=torch.float64)
    )


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 0.0])
def test_nearly_equal_channels_stay_accurate_where_the_data_are(gap: float) -> None:
    activations, weights = randn(100, 5), randn(5, 3, seed=2)
    activations[:, 4] = activations[:, 3] + gap * randn(100, seed=1)
    matrix = activations.T @ activations
    solution = solve_psd(matrix, matrix @ weights)
    assert solution.abs().max() < 10
    assert_near(activations @ solution, activations @ weights, rtol=1e-8)


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 2.0, 2.0, 2.0], 2, [1, 2]),
        ([5.0, 5.0, 5.0], 1, [0]),
        ([0.0, 0.0, 1.0, 0.0], 3, [0, 1, 2]),
        ([0.1, 0.2, 0.3], 3, [0, 1, 2]),
    ],
)
def test_top_indices_ascend_and_ties_go_to_the_lower_index(
    scores: list[float], count: int, expected: list[int]
) -> None:
    assert top_indices(torch.tensor(scores), count).tolist() == expected


def test_top_indices_breaks_many_ties_stably() -> None:
    scores = torch.tensor([float(index % 3) for index in range(3000)])
    assert top_indices(scores, 1500).tolist() == sorted([*range(2, 3000, 3), *range(1, 1500, 3)])


def test_top_indices_works_along_the_last_axis() -> None:
    assert top_indices(torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]]), 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_as_many_steps_as_unknowns_solve_the_system(size: int) -> None:
    factor = randn(4 * size + 4, size, seed=size)
    matrix, rhs = factor.T @ factor, randn(size, 3)
    found = conjugate_gradients(rhs, lambda x: matrix @ x, lambda x: x / matrix.diagonal()[:, None], 3 * size)
    assert_near(found, torch.linalg.solve(matrix, rhs), rtol=1e-8)


def test_one_step_with_the_inverse_as_preconditioner_is_enough() -> None:
    factor = randn(30, 5)
    matrix, rhs = factor.T @ factor, randn(5, 2)
    answer = torch.linalg.solve(matrix, rhs)
    assert_near(
        conjugate_gradients(rhs, lambda x: matrix @ x, lambda x: torch.linalg.solve(matrix, x), 1), answer, rtol=1e-12
    )


@pytest.mark.parametrize("flat", [False, True])
def test_where_there_is_nothing_to_gain_no_step_is_taken(flat: bool) -> None:
    rhs = randn(4, 2) if flat else torch.zeros(4, 2, dtype=torch.float64)
    assert not conjugate_gradients(rhs, lambda x: 0 * x if flat else x, lambda x: x, 5).any()
