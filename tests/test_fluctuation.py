"""FLAP's metric and compensation against the activations they stand for."""

from __future__ import annotations

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import fluctuation, mean_contribution, standardised
from modegpt.methods import FLAP
from modegpt.statistics import LayerStatistics
from modegpt.weights import MLPWeights

TOKENS, M, D = 200, 12, 5


def moments(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x.sum(0), x.square().sum(0)))


def test_the_metric_is_the_error_of_one_channel() -> None:
    x, output = mixed(TOKENS, M) + 5 * randn(M, seed=2), randn(M, D, seed=1)
    found = fluctuation(moments(x), TOKENS, output)
    for channel in range(M):
        change = (x[:, channel] - x[:, channel].mean())[:, None] * output[channel]
        assert float(found[channel]) == pytest.approx(squared(change) / TOKENS, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 5, 11, 12])
def test_the_mean_is_the_best_constant(rank: int) -> None:
    """With uncorrelated channels the stated error is the exact one, and no other bias does better."""
    x = torch.linalg.qr(randn(TOKENS, M + 1))[0][:, 1:]  # orthogonal, but not to the ones
    x = x - x.mean(0)
    x = torch.linalg.qr(x)[0] * torch.logspace(0, 1, M, dtype=torch.float64) + 3 * randn(M, seed=2)
    output, bias = randn(M, D, seed=1), randn(D, seed=3)
    weights = MLPWeights((randn(3, M),), (None,), output, bias)
    solution = FLAP().mlp(weights, LayerStatistics({"mlp_moments": moments(x)}, tokens=TOKENS)).at(rank)
    thin = solution.weights
    assert thin.output_bias is not None
    change = x @ output + bias - x[:, solution.kept] @ thin.output - thin.output_bias
    assert squared(change) == pytest.approx(solution.error, rel=1e-9, abs=1e-9)
    for seed in range(5):
        assert squared(change + 0.01 * randn(D, seed=seed)) > squared(change)
    dropped = torch.tensor([i for i in range(M) if i not in solution.kept.tolist()], dtype=torch.int64)
    expected = (x[:, dropped] @ output[dropped]).mean(0)
    torch.testing.assert_close(mean_contribution(moments(x), TOKENS, output, dropped), expected)


def test_scores_are_standardised_channel_by_channel() -> None:
    scores = randn(12).square()
    z = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(standardised(scores), z)
    torch.testing.assert_close(standardised(scores, 4), torch.stack([z[:4].mean(), z[4:8].mean(), z[8:].mean()]))
    assert torch.equal(standardised(torch.ones(6)), torch.zeros(6))
