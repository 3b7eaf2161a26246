"""Selection by the norms of weights: known scores, exactness for units without weights, no statistics anywhere."""

from __future__ import annotations

import pytest
import torch

from family_table import BY_NAME
from helpers import randn, squared, token_windows
from modegpt.config import CompressionConfig
from modegpt.decompositions import selection_losses
from modegpt.engine import Engine, compress_model
from modegpt.layered import resident
from modegpt.methods import Magnitude
from modegpt.statistics import LayerStatistics
from modegpt.weights import MLPWeights, QueryKeyWeights, ValueOutputWeights

NOTHING = LayerStatistics({})


def test_losses_are_the_sums_of_what_goes() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.5, 4.0, 0.0]])
    assert selection_losses(scores).tolist() == [10.5, 3.5, 1.0, 0.0]
    assert selection_losses(scores[0]).tolist() == [6.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("biased", [False, True])
def test_channels_of_smallest_weights_go(biased: bool) -> None:
    gate, up, output = randn(5, 8, seed=0), randn(5, 8, seed=1), randn(8, 5, seed=2)
    bias = randn(8, seed=3) if biased else None
    ladder = Magnitude().mlp(MLPWeights((gate, up), (bias, None), output), NOTHING)
    squares = [
        squared(gate[:, i]) + squared(up[:, i]) + squared(output[i]) + (0.0 if bias is None else float(bias[i]) ** 2)
        for i in range(8)
    ]
    for rank in range(1, 9):
        expected = sorted(sorted(range(8), key=lambda i: -squares[i])[:rank])
        solution = ladder.at(rank)
        assert solution.kept.tolist() == expected
        assert torch.equal(solution.weights.output, output[expected])
        assert torch.equal(solution.weights.inputs[1], up[:, expected])
        lost = sum(squares[i] for i in range(8) if i not in expected)
        assert solution.error == pytest.approx(lost, abs=1e-12)
        assert float(ladder.curve()[rank]) == pytest.approx(lost, abs=1e-12)
        assert solution.norm == pytest.approx(sum(squares))


@pytest.mark.parametrize("neighbours", [False, True])
def test_rotary_pairs_of_smallest_weights_go_in_every_group_by_themselves(neighbours: bool) -> None:
    query, key = randn(2, 3, 5, 8, seed=0), randn(2, 5, 8, seed=1)
    ladder = Magnitude().query_key(QueryKeyWeights(query, key, None, None, rotary=8, neighbours=neighbours), NOTHING)
    pairs = [(2 * p, 2 * p + 1) if neighbours else (p, p + 4) for p in range(4)]
    for rank in range(1, 5):
        solution = ladder.at(rank)
        assert solution.pairs is not None
        for group in range(2):
            squares = [sum(squared(query[group, ..., i]) + squared(key[group, :, i]) for i in pair) for pair in pairs]
            expected = sorted(sorted(range(4), key=lambda p: -squares[p])[:rank])
            assert solution.pairs[group].tolist() == expected
            channels = [pairs[p][0] for p in expected] + [pairs[p][1] for p in expected]
            assert torch.equal(solution.weights.key[group], key[group][:, channels])


def test_value_channels_of_smallest_weights_go_in_every_group_by_themselves() -> None:
    value, output, bias = randn(2, 5, 4, seed=0), randn(2, 3, 4, 5, seed=1), randn(5, seed=2)
    ladder = Magnitude().value_output(ValueOutputWeights(value, output, bias), NOTHING)
    for rank in range(1, 5):
        solution = ladder.at(rank)
        assert torch.equal(solution.weights.output_bias, bias)
        for group in range(2):
            squares = [squared(value[group, :, i]) + squared(output[group, :, i]) for i in range(4)]
            expected = sorted(sorted(range(4), key=lambda i: -squares[i])[:rank])
            assert torch.equal(solution.weights.value[group], value[group][:, expected])
            assert torch.equal(solution.weights.output[group], output[group][:, expected])


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "olmo2", "cohere-norms", "mixtral", "gpt2"])
def test_nothing_is_gathered_and_calibration_does_not_matter(name: str) -> None:
    model = BY_NAME[name].build()
    config = CompressionConfig.validated(ratio=0.3, method="magnitude")
    engine = Engine(resident(model), token_windows(), 4)
    with engine.active(), torch.no_grad():
        hidden = engine.activations("test", engine.batches)
        with engine.runner.active():
            gathered = engine.calibrate(0, engine.dense.layers[0], hidden, Magnitude.statistics, keep=True)
    assert gathered.sums == {}
    assert gathered.expert_tokens is None
    assert hidden.get(0) is not None  # the layer ran all the same
    one, other = (compress_model(model, token_windows(seed=seed), config).model.state_dict() for seed in (1, 2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
