"""Type III: Algorithm 3, Theorem 3 and appendix B.1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import SVDDecomposition, svd_decomposition

HIDDEN, HEAD = 12, 6
Data = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Makes inputs X and a value map W_v."""


def weights(heads: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W_v (d, h) and W_o (g, h, d)."""
    return randn(HIDDEN, HEAD, seed=seed + 10), randn(heads, HEAD, HIDDEN, seed=seed + 20)


def output_error(inputs: torch.Tensor, value: torch.Tensor, output: torch.Tensor, result: SVDDecomposition) -> float:
    """sum over heads of ||X W_v W_o - X W_v' W_o'||_F^2 from its definition."""
    return squared(inputs @ value @ output - inputs @ result.value @ result.output)


def roots(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C^(1/2) and C^(-1/2) of a regular C."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T, vectors @ torch.diag(values.rsqrt()) @ vectors.T


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-9) -> None:
    """Compare relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


def test_one_head_keeps_the_largest_singular_values_of_the_product() -> None:
    identity = torch.eye(3, dtype=torch.float64)
    output = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    result = svd_decomposition(identity, identity, output[None], 2)
    assert result.error == pytest.approx(1, rel=1e-13)
    assert result.norm == pytest.approx(14, rel=1e-13)
    assert result.singular is not None
    assert_near(result.singular, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), rtol=1e-14)
    assert_near(
        result.value @ result.output[0], torch.diag(torch.tensor([0.0, 3.0, 2.0], dtype=torch.float64)), rtol=1e-14
    )


def test_group_keeps_the_largest_singular_values_of_the_weighted_value_map() -> None:
    """C = diag(c), W_v = I: the channels of largest c stay, whatever the output maps weigh."""
    gram = torch.diag(torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64))
    value, output = torch.eye(3, dtype=torch.float64), randn(2, 3, 3)
    result = svd_decomposition(gram, value, output, 2)
    expected = output.clone()
    expected[:, 2] = 0
    assert_near(result.value @ result.output, expected, rtol=1e-14)
    assert result.error == pytest.approx(squared(output[:, 2]), rel=1e-13)
    assert result.singular is not None
    assert_near(result.singular, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), rtol=1e-14)
    assert result.norm == pytest.approx(sum(c * squared(output[:, i]) for i, c in enumerate((4, 9, 1))), rel=1e-13)


@pytest.mark.parametrize("tokens", [100, 12, 7, 3])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_error_and_norm_equal_their_definitions(heads: int, rank: int, tokens: int) -> None:
    inputs, (value, output) = mixed(tokens, HIDDEN, seed=rank), weights(heads, seed=rank)
    result = svd_decomposition(inputs.T @ inputs, value, output, rank)
    assert result.value.shape == (HIDDEN, rank)
    assert result.output.shape == (heads, rank, HIDDEN)
    assert result.norm == pytest.approx(squared(inputs @ value @ output), rel=1e-11)
    expected = output_error(inputs, value, output, result)
    assert result.error == pytest.approx(expected, rel=1e-8, abs=1e-12 * result.norm)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_one_head_loses_the_tail_of_the_singular_values(rank: int) -> None:
    inputs, (value, output) = mixed(100, HIDDEN), weights(1)
    gram = inputs.T @ inputs
    result = svd_decomposition(gram, value, output, rank)
    tail = torch.linalg.svdvals(roots(gram)[0] @ value @ output[0])[rank:]
    assert result.error == pytest.approx(squared(tail), rel=1e-9)


def test_one_head_is_not_improved_by_other_factors_of_the_same_rank() -> None:
    inputs, (value, output) = mixed(100, HIDDEN), weights(1)
    result = svd_decomposition(inputs.T @ inputs, value, output, 3)
    for seed in range(30):
        columns, rows = randn(HIDDEN, 3, seed=seed), randn(1, 3, HIDDEN, seed=seed + 500)
        fitted = torch.linalg.lstsq(inputs @ columns, inputs @ value @ output[0]).solution[None]
        for other in (
            SVDDecomposition(columns, rows, 0, 0),
            SVDDecomposition(columns, fitted, 0, 0),
            SVDDecomposition(result.value + 1e-3 * columns, result.output, 0, 0),
            SVDDecomposition(result.value, result.output + 1e-3 * rows, 0, 0),
        ):
            assert output_error(inputs, value, output, other) > result.error


def assert_equal_up_to_scale(result: SVDDecomposition, value: torch.Tensor, output: torch.Tensor) -> None:
    """The same channels in the same order; a value column may be any multiple, its output row the inverse one."""
    assert_near(result.value @ result.output, value @ output)
    for index in range(value.shape[1]):
        factor = (result.value[:, index] @ value[:, index]) / value[:, index].square().sum()
        assert_near(result.value[:, index], factor * value[:, index])
        assert_near(result.output[:, index], output[:, index] / factor)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_values_and_outputs_share_their_size_evenly(heads: int, tokens: int) -> None:
    """However much calibration text there was: nothing leaves the range of 16-bit formats."""
    inputs, (value, output) = mixed(100, HIDDEN), weights(heads)
    result = svd_decomposition(tokens * inputs.T @ inputs, value, output, 3)
    assert_near(result.value.norm(dim=0), result.output.norm(dim=(0, 2)))
    reference = svd_decomposition(inputs.T @ inputs, value, output, 3)
    assert_near(result.value.abs(), reference.value.abs())


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_one_head_equals_algorithm_3_with_matrix_roots(rank: int) -> None:
    inputs, (value, output) = mixed(100, HIDDEN), weights(1)
    gram = inputs.T @ inputs
    root, inverse_root = roots(gram)
    left, singular, right = torch.linalg.svd(root @ value, full_matrices=False)
    left2, singular2, right2 = torch.linalg.svd(torch.diag(singular) @ right @ output[0], full_matrices=False)
    published_value = inverse_root @ left @ left2[:, :rank]
    published_output = torch.diag(singular2[:rank]) @ right2[:rank]

    assert_equal_up_to_scale(svd_decomposition(gram, value, output, rank), published_value, published_output[None])


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("heads", [2, 4])
def test_group_equals_appendix_b1_with_matrix_roots(heads: int, rank: int) -> None:
    inputs, (value, output) = mixed(100, HIDDEN), weights(heads)
    gram = inputs.T @ inputs
    root, inverse_root = roots(gram)
    left, singular, right = torch.linalg.svd(root @ value, full_matrices=False)
    published_value = inverse_root @ left[:, :rank]
    published_output = torch.stack([torch.diag(singular[:rank]) @ right[:rank] @ head for head in output])

    assert_equal_up_to_scale(svd_decomposition(gram, value, output, rank), published_value, published_output)


@pytest.mark.parametrize("heads", [1, 3])
def test_full_rank_changes_nothing(heads: int) -> None:
    inputs, (value, output) = mixed(100, HIDDEN), weights(heads)
    result = svd_decomposition(inputs.T @ inputs, value, output, HEAD)
    assert torch.equal(result.value, value)
    assert torch.equal(result.output, output)
    assert result.error == 0
    assert result.norm == pytest.approx(squared(inputs @ value @ output), rel=1e-11)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_result_does_not_depend_on_the_scale_of_the_inputs(scale: float, heads: int) -> None:
    inputs, (value, output) = mixed(100, HIDDEN), weights(heads)
    gram = inputs.T @ inputs
    result, scaled = (svd_decomposition(c, value, output, 3) for c in (gram, scale * gram))
    assert_near(scaled.value @ scaled.output, result.value @ result.output, rtol=1e-11)
    assert scaled.error == pytest.approx(scale * result.error, rel=1e-11)


def few_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(3, HIDDEN), randn(HIDDEN, HEAD, seed=1)


def dead_features() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = randn(60, HIDDEN)
    inputs[:, 3:] = 0
    return inputs, randn(HIDDEN, HEAD, seed=1)


def duplicated_features() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(60, 3).repeat(1, HIDDEN // 3), randn(HIDDEN, HEAD, seed=1)


def duplicated_value_channels() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(60, HIDDEN), randn(HIDDEN, HEAD // 2, seed=1).repeat(1, 2)


def dead_value_channels() -> tuple[torch.Tensor, torch.Tensor]:
    value = randn(HIDDEN, HEAD, seed=1)
    value[:, ::2] = 0
    return randn(60, HIDDEN), value


DEGENERATE = [few_tokens, dead_features, duplicated_features, duplicated_value_channels, dead_value_channels]


@pytest.mark.parametrize("data", DEGENERATE)
@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("heads", [1, 3])
def test_dropping_directions_without_data_is_free(data: Data, heads: int, rank: int) -> None:
    """In all these cases X W_v has rank 3."""
    (inputs, value), output = data(), randn(heads, HEAD, HIDDEN, seed=2)
    result = svd_decomposition(inputs.T @ inputs, value, output, rank)
    assert result.value.shape == (HIDDEN, rank)
    assert result.output.shape == (heads, rank, HIDDEN)
    assert result.value.abs().max() < 1e3 * value.abs().max()  # not noise divided by noise
    assert result.output.isfinite().all()
    assert result.error <= 1e-13 * result.norm
    assert output_error(inputs, value, output, result) <= 1e-13 * result.norm


@pytest.mark.parametrize("data", DEGENERATE)
@pytest.mark.parametrize("heads", [1, 3])
def test_singular_gram_still_gives_the_exact_error(data: Data, heads: int) -> None:
    (inputs, value), output = data(), randn(heads, HEAD, HIDDEN, seed=2)
    result = svd_decomposition(inputs.T @ inputs, value, output, 2)
    assert result.error > 1e-3 * result.norm
    assert result.error == pytest.approx(output_error(inputs, value, output, result), rel=1e-9)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("silent", ["gram", "value"])
def test_all_zero_input_or_value_gives_zero_factors(silent: str, heads: int) -> None:
    value, output = weights(heads)
    gram = torch.eye(HIDDEN, dtype=torch.float64)
    result = svd_decomposition(gram * (silent != "gram"), value * (silent != "value"), output, 2)
    assert torch.count_nonzero(result.value @ result.output) == 0
    assert result.value.isfinite().all()
    assert result.error == result.norm == 0


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_wider_than_the_model_are_padded_with_nothing(heads: int) -> None:
    """Of 8 directions in a model of 4 at most 4 matter: rank 6 is exact and 6 wide."""
    gram, value, output = randn(4, 4), randn(1, 4, 8, seed=1), randn(1, heads, 8, 4, seed=2)
    gram = gram @ gram.T
    result = svd_decomposition(gram, value, output, 6)
    assert result.value.shape == (1, 4, 6)
    assert result.singular is not None
    assert result.singular.shape == (1, 8)
    assert result.output.shape == (1, heads, 6, 4)
    torch.testing.assert_close(result.value[:, None] @ result.output, value[:, None] @ output, rtol=1e-9, atol=1e-9)
    assert result.error <= 1e-12 * result.norm
