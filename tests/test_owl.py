"""OWL's allocation: outliers counted by hand, budgets, intervals, and the scores of whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from family_table import BY_NAME, layers_of
from helpers import randn, run_cli, token_windows
from modegpt.allocation import bounded_allocation
from modegpt.config import CompressionConfig
from modegpt.decompositions import outlier_share
from modegpt.engine import Engine, compress_model
from modegpt.errors import InvalidRequest
from modegpt.layered import resident
from modegpt.methods import METHODS
from modegpt.methods.factorised import Factorised


def test_outliers_are_counted_over_all_maps_together() -> None:
    maps = [(randn(6, 5, seed=0), randn(6, seed=1).abs()), (randn(4, 7, seed=2), 3 * randn(4, seed=3).abs())]
    scores = torch.cat([(weight.abs() * norms[:, None]).flatten() for weight, norms in maps])
    for threshold in (1.0, 1.5, 3.0):
        expected = float((scores > threshold * scores.mean()).double().mean())
        assert outlier_share(lambda: maps, threshold) == pytest.approx(expected)
    assert outlier_share(lambda: maps, 1.0) > outlier_share(lambda: maps, 3.0) > 0


def test_channels_without_input_have_no_outliers() -> None:
    weight, norms = torch.ones(4, 2), torch.tensor([0.0, 1.0, 1.0, 100.0], dtype=torch.float64)
    weight[0] = 1e6
    assert outlier_share(lambda: [(weight, norms)], 2.0) == 2 / 8
    assert outlier_share(lambda: [(torch.zeros(3, 3), torch.ones(3).double())], 5.0) == 0.0


def test_two_layers_have_a_known_answer() -> None:
    assert bounded_allocation([0.02, 0.04], [1, 1], 0.3, 0.08) == pytest.approx([0.38, 0.22])
    # A mean weighted by 3 and 1: the lighter layer is three times as far from it.
    assert bounded_allocation([0.0, 0.04], [3, 1], 0.3, 0.06) == pytest.approx([0.32, 0.24])


@pytest.mark.parametrize("average", [0.03, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_mean_is_exact_and_nothing_leaves_the_interval(seed: int, average: float) -> None:
    scores, weights = randn(12, seed=seed).square().tolist(), (1 + randn(12, seed=9).square()).tolist()
    shares = bounded_allocation(scores, weights, average, 0.08)
    mean = sum(w * share for w, share in zip(weights, shares, strict=True)) / sum(weights)
    assert mean == pytest.approx(average)
    reach = min(0.08, average, 1 - average)
    assert max(abs(share - average) for share in shares) == pytest.approx(reach)
    ordered = [share for _, share in sorted(zip(scores, shares, strict=True))]
    assert ordered == sorted(shares, reverse=True)


def test_equal_layers_lose_equally() -> None:
    assert bounded_allocation([0.1] * 4, [1, 2, 3, 4], 0.25, 0.08) == [0.25] * 4


def expected_shares(model: PreTrainedModel, ids: torch.Tensor, threshold: float) -> list[float]:
    """By hooks on every linear map of a plain forward."""
    shares = []
    for layer in layers_of(model):
        seen: list[tuple[nn.Module, torch.Tensor]] = []
        handles = []

        def keep(module: nn.Module, args: Any, seen: list[tuple[nn.Module, torch.Tensor]] = seen) -> None:
            seen.append((module, args[0].double().flatten(0, -2).norm(dim=0)))

        for module in layer.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                handles.append(module.register_forward_pre_hook(keep))
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        scores = [
            ((module.weight.T if isinstance(module, nn.Linear) else module.weight).double().abs() * norms[:, None])
            for module, norms in seen
        ]
        flat = torch.cat([score.flatten() for score in scores])
        shares.append(float((flat > threshold * flat.mean()).double().mean()))
    return shares


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "gpt2", "opt", "phi3", "gemma3", "gpt-neox", "qwen3"])
def test_scores_are_those_of_every_linear_map(name: str) -> None:
    model = BY_NAME[name].build()
    engine = Engine(resident(model), token_windows(), 3)
    config = CompressionConfig.validated(ratio=0.3, method="magnitude", allocation="owl", owl_threshold=2.0)
    with engine.active():
        choice = engine.choose_ranks(config)
    assert choice.scores is not None
    found = [score for (score,) in choice.scores]
    assert found == pytest.approx(expected_shares(model, token_windows().ids, 2.0), abs=2e-4)
    for share, score in zip(choice.sparsity, found, strict=True):
        for other, better in zip(choice.sparsity, found, strict=True):
            assert (score < better) <= (share["mlp"] > other["mlp"])


@pytest.mark.parametrize("reach", [0.02, 0.2])
def test_the_reach_is_that_of_the_option(reach: float) -> None:
    engine = Engine(resident(BY_NAME["llama-gqa"].build()), token_windows(), 3)
    options = {"ratio": 0.3, "method": "magnitude", "owl_threshold": 2.0, "owl_reach": reach}
    configs = [CompressionConfig.validated(**options, allocation=one) for one in ("owl", "uniform")]
    with engine.active():
        shares, equal = ([layer["mlp"] for layer in engine.choose_ranks(one).sparsity] for one in configs)
    assert max(abs(share - equal[0]) for share in shares) == pytest.approx(reach)


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if "owl" in one.allocations])
@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_every_method_meets_the_budget_with_it(name: str, method: str) -> None:
    model = BY_NAME[name].build(hidden_size=64, intermediate_size=176)
    config = CompressionConfig.validated(ratio=0.3, method=method, allocation="owl", owl_threshold=2.0)
    if name == "mixtral" and (method == "flap" or issubclass(METHODS[method], Factorised)):
        with pytest.raises(InvalidRequest, match="experts"):
            compress_model(model, token_windows(), config)
        return
    result = compress_model(model, token_windows(), config)
    dense, kept = (sum(p.numel() for p in layers_of(one).parameters()) for one in (model, result.model))
    assert abs((1 - kept / dense) - 0.3) < 0.01


@pytest.mark.parametrize(
    ("option", "value"),
    [("--owl-threshold", "0.5"), ("--owl-threshold", "x"), ("--owl-reach", "0"), ("--owl-reach", "1")],
)
def test_nonsense_is_refused(option: str, value: str) -> None:
    outcome = run_cli("compress", "model", "--ratio", "0.3", "--output", "out", "--allocation", "owl", option, value)
    assert outcome.code == 2
    assert option in outcome.err
