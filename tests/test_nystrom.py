"""Type I: Algorithm 1 and Theorem 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import NystromDecomposition, nystrom_decomposition, ridge_leverage_scores

RIDGE = 1e-4


def output_error(activations: torch.Tensor, output: torch.Tensor, result: NystromDecomposition) -> float:
    """||Z W_D - Z S W_D'||_F^2 from its definition."""
    return squared(activations @ output - activations[:, result.kept] @ result.output)


def test_orthogonal_channels_keep_their_weights_and_cost_their_energy() -> None:
    energy = torch.tensor([9.0, 1.0, 16.0, 4.0], dtype=torch.float64)
    output = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], dtype=torch.float64)
    result = nystrom_decomposition(torch.diag(energy), output, 2, RIDGE)
    assert result.kept.tolist() == [0, 2]
    assert result.kept.dtype == torch.int64
    assert torch.equal(result.output, output[[0, 2]])
    assert result.error == pytest.approx(1 * (9 + 16) + 4 * (49 + 64), rel=1e-14)
    assert result.norm == pytest.approx(9 * (1 + 4) + 1 * (9 + 16) + 16 * (25 + 36) + 4 * (49 + 64), rel=1e-14)


def test_dropped_multiple_of_a_channel_moves_into_its_weights() -> None:
    """z_2 = 2 z_0, so dropping channel 0 adds half its output row to row 2."""
    orthogonal = torch.linalg.qr(randn(20, 2)).Q
    activations = torch.stack((orthogonal[:, 0], 3 * orthogonal[:, 1], 2 * orthogonal[:, 0]), dim=1)
    output = randn(3, 4, seed=1)
    result = nystrom_decomposition(activations.T @ activations, output, 2, RIDGE)
    assert result.kept.tolist() == [1, 2]
    torch.testing.assert_close(result.output, torch.stack((output[1], output[2] + output[0] / 2)), rtol=1e-13, atol=0)
    assert result.error <= 1e-13 * result.norm


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("tokens", [200, 12, 7])
def test_error_and_norm_equal_their_definitions(tokens: int, rank: int) -> None:
    activations, output = mixed(tokens, 12, seed=rank), randn(12, 6, seed=2)
    result = nystrom_decomposition(activations.T @ activations, output, rank, RIDGE)
    assert result.norm == pytest.approx(squared(activations @ output), rel=1e-12)
    expected = output_error(activations, output, result)
    assert result.error == pytest.approx(expected, rel=1e-9, abs=1e-12 * result.norm)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_output_map_is_the_least_squares_optimum(rank: int) -> None:
    activations, output = mixed(300, 10, seed=rank), randn(10, 6, seed=2)
    result = nystrom_decomposition(activations.T @ activations, output, rank, RIDGE)
    optimum = torch.linalg.lstsq(activations[:, result.kept], activations @ output).solution
    torch.testing.assert_close(result.output, optimum, rtol=0, atol=1e-10 * float(optimum.abs().max()))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_perturbed_output_maps_are_worse(size: float) -> None:
    activations, output = mixed(300, 10), randn(10, 6, seed=2)
    result = nystrom_decomposition(activations.T @ activations, output, 4, RIDGE)
    for seed in range(20):
        other = NystromDecomposition(result.kept, result.output + size * randn(4, 6, seed=seed), 0, 0)
        assert output_error(activations, output, other) > result.error


def test_output_map_equals_the_published_formula() -> None:
    activations, output = mixed(300, 10), randn(10, 6, seed=2)
    gram = activations.T @ activations
    result = nystrom_decomposition(gram, output, 4, RIDGE)
    select = torch.eye(10, dtype=torch.float64)[:, result.kept]
    published = torch.linalg.pinv(select.T @ gram @ select, hermitian=True) @ select.T @ gram @ output
    torch.testing.assert_close(result.output, published, rtol=0, atol=1e-10 * float(published.abs().max()))


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [200, 5])
def test_scores_equal_the_definition(tokens: int, ridge: float) -> None:
    activations = mixed(tokens, 8)
    gram = activations.T @ activations
    shift = ridge * gram.trace() / 8 * torch.eye(8, dtype=torch.float64)
    expected = torch.diagonal(gram @ torch.linalg.inv(gram + shift))
    scores = ridge_leverage_scores(gram, ridge)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_scores_of_a_diagonal_gram_are_known() -> None:
    energy = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)  # mean 1.5, so lambda = 0.5 * 1.5
    expected = energy / (energy + 0.75)
    torch.testing.assert_close(ridge_leverage_scores(torch.diag(energy), 0.5), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-12, 0.37, 1e9])
def test_scores_do_not_depend_on_the_scale_of_the_activations(scale: float) -> None:
    activations = mixed(50, 8)
    gram = activations.T @ activations
    torch.testing.assert_close(
        ridge_leverage_scores(scale * gram, RIDGE), ridge_leverage_scores(gram, RIDGE), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_channels_of_largest_leverage_are_kept(ridge: float) -> None:
    activations = mixed(100, 16)
    gram = activations.T @ activations
    shift = ridge * gram.trace() / 16 * torch.eye(16, dtype=torch.float64)
    scores = torch.diagonal(gram @ torch.linalg.inv(gram + shift)).tolist()
    best = sorted(range(16), key=lambda index: -scores[index])[:6]
    result = nystrom_decomposition(gram, randn(16, 3), 6, ridge)
    assert result.kept.tolist() == sorted(best)
    assert result.scores is not None
    assert result.scores.tolist() == pytest.approx(scores, rel=1e-9)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_ridge_must_be_positive(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge must be positive"):
        ridge_leverage_scores(torch.eye(3, dtype=torch.float64), ridge)


def test_full_rank_changes_nothing() -> None:
    activations, output = mixed(40, 8), randn(8, 3)
    result = nystrom_decomposition(activations.T @ activations, output, 8, RIDGE)
    assert result.kept.tolist() == list(range(8))
    assert torch.equal(result.output, output)
    assert result.error == 0
    assert result.norm == pytest.approx(squared(activations @ output), rel=1e-12)


def dead_channels() -> torch.Tensor:
    activations = randn(60, 12)
    activations[:, [0, 3, 5, 6, 10, 11]] = 0
    return activations


def duplicated_channels() -> torch.Tensor:
    return randn(60, 6).repeat(1, 2)


def scaled_combinations() -> torch.Tensor:
    return randn(60, 6) @ randn(6, 12, seed=1) * torch.logspace(-3, 3, 12, dtype=torch.float64)


def few_tokens() -> torch.Tensor:
    return randn(6, 12)


@pytest.mark.parametrize(
    ("activations", "rank"),
    [(data, rank) for data in (dead_channels, scaled_combinations, few_tokens) for rank in (6, 8, 11)]
    + [(duplicated_channels, 11)],  # leverage scores cannot tell which of two equal channels to drop
)
def test_dropping_redundant_channels_is_free(activations: Callable[[], torch.Tensor], rank: int) -> None:
    """All these activations have rank 6."""
    z, output = activations(), randn(12, 5, seed=2)
    result = nystrom_decomposition(z.T @ z, output, rank, RIDGE)
    assert result.output.isfinite().all()
    assert result.error <= 1e-11 * result.norm
    assert output_error(z, output, result) <= 1e-11 * result.norm


@pytest.mark.parametrize("activations", [dead_channels, duplicated_channels, scaled_combinations, few_tokens])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_singular_gram_still_gives_the_exact_error_and_optimum(
    activations: Callable[[], torch.Tensor], rank: int
) -> None:
    z, output = activations(), randn(12, 5, seed=2)
    result = nystrom_decomposition(z.T @ z, output, rank, RIDGE)
    kept = z[:, result.kept]
    optimum = squared(z @ output - kept @ torch.linalg.pinv(kept) @ z @ output)
    assert result.error == pytest.approx(optimum, rel=1e-8)
    assert output_error(z, output, result) == pytest.approx(optimum, rel=1e-8)


def test_all_zero_gram_keeps_the_original_weights() -> None:
    output = randn(6, 3)
    result = nystrom_decomposition(torch.zeros(6, 6, dtype=torch.float64), output, 4, RIDGE)
    assert torch.equal(result.output, output[:4])
    assert result.error == result.norm == 0


def test_kept_dead_channel_keeps_its_original_weights() -> None:
    activations, output = randn(50, 4), randn(4, 3, seed=1)
    activations[:, [1, 3]] = 0
    result = nystrom_decomposition(activations.T @ activations, output, 3, RIDGE)
    assert result.kept.tolist() == [0, 1, 2]
    torch.testing.assert_close(result.output, output[:3], rtol=1e-14, atol=0)
