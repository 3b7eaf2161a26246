"""The up-projection's second fit against its normal equations, and through real MLPs."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from helpers import tiny_llama
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows
from modegpt.decompositions import gated_correction
from modegpt.decompositions.gated import HELD_OUT
from modegpt.engine import compress_model
from modegpt.families import family_of
from modegpt.layout import is_gated
from modegpt.methods import Greedy
from modegpt.statistics import gates_of


def problem(seed: int, n: int = 800, d: int = 6, k: int = 5, e: int = 4) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    x, g, output = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((n, d), (n, k), (k, e)))
    mixed = x @ torch.randn(d, d, generator=draw, dtype=torch.float64)
    return mixed, g.abs() + 0.3 * mixed[:, :k].square(), output, torch.randn(n, e, generator=draw, dtype=torch.float64)


def loss(x: torch.Tensor, g: torch.Tensor, output: torch.Tensor, rows: torch.Tensor, change: torch.Tensor) -> float:
    return float((rows - (g * (x @ change)) @ output).square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_a_correction_that_explains_the_residual_is_found(seed: int) -> None:
    x, g, output, _ = problem(seed, e=7)
    wanted = torch.randn(x.shape[1], g.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    residual = (g * (x @ wanted)) @ output
    found, share = gated_correction(x, g, output, residual, steps=60)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert share < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_many_steps_come_to_the_solution_of_the_normal_equations(seed: int) -> None:
    """Where the residual has a part that nothing explains, of the rows that are fitted."""
    x, g, output, noise = problem(seed)
    wanted = torch.randn(x.shape[1], g.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    residual = (g * (x @ wanted)) @ output + 0.1 * noise
    seen = torch.arange(len(x)) % HELD_OUT != HELD_OUT - 1
    # Column (i, j) of the design is what D_ij = 1 puts out: x_i g_j W_D[j].
    design = torch.einsum("ni,nj,je->neij", x[seen], g[seen], output).flatten(2).flatten(0, 1)
    solution = torch.linalg.lstsq(design, residual[seen].flatten()[:, None]).solution.view_as(wanted)
    found, share = gated_correction(x, g, output, residual, steps=200)
    unseen = [one[~seen] for one in (x, g)]
    best, mine = (loss(*unseen, output, residual[~seen], change) for change in (solution, found))
    assert mine <= 1.02 * best
    assert share == pytest.approx(mine / loss(*unseen, output, residual[~seen], torch.zeros_like(wanted)))


def test_rows_in_float32_come_to_what_those_in_float64_do() -> None:
    x, g, output, _ = problem(0)
    residual = (g * (x @ torch.ones(x.shape[1], g.shape[1], dtype=torch.float64))) @ output
    expected, share = gated_correction(x, g, output, residual)
    found, single = gated_correction(x.float(), g.float(), output.float(), residual.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert single == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 5, 40, 800])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e12])
def test_unseen_rows_never_lose(rows: int, scale: float) -> None:
    x, g, output, noise = problem(rows, n=rows)
    found, share = gated_correction(x, g, output, scale * noise)
    assert 0 <= share <= 1
    assert found.isfinite().all()
    if scale == 0 or rows < HELD_OUT:  # nothing to explain, or nothing to judge by
        assert not found.any()


@pytest.mark.parametrize("gates", ["zero", "one channel"])
def test_channels_that_are_silent(gates: str) -> None:
    x, g, output, noise = problem(0)
    g = torch.zeros_like(g) if gates == "zero" else g * torch.tensor([0.0, 1, 1, 1, 1], dtype=g.dtype)
    found, share = gated_correction(x, g, output, noise)
    assert found.isfinite().all()
    assert not found[:, 0].any()
    assert share <= 1


def windows(count: int, seed: int = 1) -> TokenWindows:
    return TokenWindows(torch.randint(0, 128, (count, 16), generator=torch.Generator().manual_seed(seed)))


def test_the_mlp_of_a_model_comes_closer_to_the_dense_one_on_other_text() -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=96)
    config = CompressionConfig.validated(ratio=0.3, method="greedy", allocation="uniform", modules="mlp")
    fitted = compress_model(model, windows(256), config)
    with patch.object(Greedy, "finished", lambda _, solution, *__: solution):
        plain = compress_model(model, windows(256), config)
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: entering.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows(32, seed=2).ids)
    for index, (one, other) in enumerate(zip(fitted.layers, plain.layers, strict=True)):
        x = entering[index]
        assert one.modules["mlp"].relative_error < other.modules["mlp"].relative_error
        assert one.modules["mlp"].kept == other.modules["mlp"].kept
        dense, mine, theirs = (each.model.layers[index].mlp for each in (model, fitted.model, plain.model))
        assert torch.equal(mine.gate_proj.weight, theirs.gate_proj.weight)
        assert torch.equal(mine.down_proj.weight, theirs.down_proj.weight)
        with torch.no_grad():
            losses = [float((dense(x) - thin(x)).square().sum()) for thin in (mine, theirs)]
        assert losses[0] < losses[1]


def test_gates_are_what_the_up_projection_is_multiplied_with() -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=96)
    layer, family = model.model.layers[0], family_of(model).description
    assert is_gated(layer, family)
    x = torch.randn(50, 32)
    with torch.no_grad():
        expected = layer.mlp.act_fn(layer.mlp.gate_proj(x))
    torch.testing.assert_close(gates_of(layer, family, x), expected)
    torch.testing.assert_close(gates_of(layer, family, x.double()), expected.double())
