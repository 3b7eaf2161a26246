"""The second fit of a gated MLP's maps against their normal equations, and through real MLPs."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch

from helpers import tiny_llama
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows
from modegpt.decompositions import GatedRows, gated, gated_fit
from modegpt.decompositions.gated import CURVATURE_ROWS, HELD_OUT, split_rows
from modegpt.engine import compress_model
from modegpt.families import family_of
from modegpt.layout import is_gated
from modegpt.methods import Greedy
from modegpt.statistics import LayerStatistics, through_mlp
from modegpt.weights import read_mlp

D, K, E = 6, 5, 7


def problem(
    seed: int, n: int = 800, noise: float = 0.0, size: float = 1.0
) -> tuple[GatedRows, torch.Tensor, torch.Tensor]:
    """Rows, W_D', and the D that explains their residual but for the ``noise``."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = normal(n, D) @ normal(D, D)
    g = normal(n, K).abs() + 0.3 * x[:, :K].square()
    output, wanted = normal(K, E), size * normal(D, K)
    residual = (g * (x @ wanted)) @ output + noise * normal(n, E)
    return GatedRows(x, g, g * (x @ normal(D, K)), residual), output, wanted


def gram(rows: GatedRows) -> torch.Tensor:
    return (rows.channels.mT @ rows.channels).double() + 1e-9 * torch.eye(K, dtype=torch.float64)


def left(rows: GatedRows, output: torch.Tensor, change: torch.Tensor, turned: torch.Tensor | None = None) -> float:
    """What is left of the residual after D, and E where given."""
    thin = rows.gates * (rows.inputs @ change)
    result = rows.residual - thin @ output
    return float((result if turned is None else result - (rows.channels + thin) @ turned).square().sum())


def split(rows: GatedRows) -> tuple[torch.Tensor, torch.Tensor]:
    return split_rows(len(rows.inputs), rows.inputs.device)


def unseen(rows: GatedRows) -> GatedRows:
    return rows.at(split(rows)[1])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 16384])
def test_every_row_is_fitted_or_held_out(count: int) -> None:
    seen, held = split_rows(count, torch.device("cpu"))
    assert len(held) == count // HELD_OUT
    assert torch.equal(torch.cat((seen, held)).sort().values, torch.arange(count))
    assert all(torch.equal(*pair) for pair in zip((seen, held), split_rows(count, torch.device("cpu")), strict=True))


@pytest.mark.parametrize("period", [64, 1000, 1024, 2048])
def test_rows_of_a_period_are_fitted_and_held_out_alike(period: int) -> None:
    """Such as the first tokens of windows: about as many as their number says are held out, and of the curvature."""
    seen, held = split_rows(16384, torch.device("cpu"))
    found = [int((part % period == 0).sum()) for part in (held, seen[:CURVATURE_ROWS])]
    for count, share in zip(found, (1 / HELD_OUT, CURVATURE_ROWS / 16384), strict=True):
        mean = 16384 / period * share
        assert abs(count - mean) < 3 * mean**0.5


@pytest.mark.parametrize("seed", range(4))
def test_a_correction_that_explains_the_residual_is_found(seed: int) -> None:
    rows, output, wanted = problem(seed)
    fit = gated_fit(rows, output, gram(rows), steps=60)
    torch.testing.assert_close(fit.change, wanted, rtol=1e-5, atol=1e-5)
    assert fit.share < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_many_steps_come_to_the_solution_of_the_normal_equations(seed: int) -> None:
    """Where the residual has a part that nothing explains, of the rows that are fitted."""
    rows, output, wanted = problem(seed, noise=0.1)
    seen, _ = split(rows)
    # Column (i, j) of the design is what D_ij = 1 puts out: x_i g_j W_D[j].
    design = torch.einsum("ni,nj,je->neij", rows.inputs[seen], rows.gates[seen], output).flatten(2).flatten(0, 1)
    solution = torch.linalg.lstsq(design, rows.residual[seen].flatten()[:, None]).solution.view_as(wanted)
    fit = gated_fit(rows, output, gram(rows), steps=200)
    best, mine = (left(unseen(rows), output, change) for change in (solution, fit.change))
    assert mine <= 1.02 * best
    final = left(unseen(rows), output, fit.change, fit.output)
    assert fit.share == pytest.approx(final / float(unseen(rows).residual.square().sum()))


@pytest.mark.parametrize("seed", range(4))
def test_the_output_map_follows_the_changed_channels(seed: int) -> None:
    """Where it was the optimum for the channels as they were, it goes towards the one for those that they are."""
    rows, output, _ = problem(seed, noise=0.3, size=0.1)
    best = torch.linalg.lstsq(rows.channels, rows.residual).solution
    rows = GatedRows(rows.inputs, rows.gates, rows.channels, rows.residual - rows.channels @ best)
    output = output + best
    fit = gated_fit(rows, output, gram(rows))
    thin = rows.gates * (rows.inputs @ fit.change)
    channels, residual = rows.channels + thin, rows.residual - thin @ output
    optimum = torch.linalg.lstsq(channels, residual).solution
    losses = [float((residual - channels @ turned).square().sum()) for turned in (0 * optimum, fit.output, optimum)]
    assert losses[1] - losses[2] < 0.2 * (losses[0] - losses[2])


@pytest.mark.parametrize("seed", range(4))
def test_the_output_map_starts_from_the_optimum_with_the_ridge(seed: int) -> None:
    """Of the slope at W_D' only what the change adds: Z'^T R is what the ridge holds against, and no reason to move."""
    rows, dense, _ = problem(seed, noise=0.3, size=0.1)
    target = rows.channels @ dense + rows.residual
    ridge = 50.0 * torch.eye(K, dtype=torch.float64)
    matrix = rows.channels.mT @ rows.channels + ridge
    output = torch.linalg.solve(matrix, rows.channels.mT @ target + ridge @ dense)
    rows = GatedRows(rows.inputs, rows.gates, rows.channels, target - rows.channels @ output)
    assert float((rows.channels.mT @ rows.residual).norm()) > 1
    seen = torch.arange(len(rows.inputs))
    nothing = torch.zeros(D, K, dtype=torch.float64)
    assert not gated._output_direction(rows, seen, output, matrix, nothing).any()
    change = 1e-4 * torch.randn(D, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channels = rows.channels + rows.gates * (rows.inputs @ change)
    optimum = torch.linalg.solve(channels.mT @ channels + ridge, channels.mT @ target + ridge @ dense)
    found = gated._output_direction(rows, seen, output, matrix, change)
    torch.testing.assert_close(found, optimum - output, rtol=0.02, atol=0.02 * float((optimum - output).abs().max()))


def test_what_is_not_finite_changes_nothing() -> None:
    rows, output, _ = problem(0, noise=1.0)
    rows.gates[5, 2] = torch.inf
    fit = gated_fit(rows, output, gram(rows))
    assert not fit.change.any()
    assert not fit.output.any()
    assert fit.share == 1


def test_gates_that_are_closed_on_the_rows_of_the_curvature() -> None:
    rows, output, _ = problem(0, noise=1.0)
    seen, _ = split(rows)
    with patch.object(gated, "CURVATURE_ROWS", 100):
        rows.gates[seen[:100]] = 0
        fit = gated_fit(rows, output, gram(rows))
    assert fit.change.isfinite().all()
    assert fit.share <= 1


def test_the_curvature_of_some_rows_does() -> None:
    rows, output, _ = problem(0, n=8000, noise=5.0)
    whole = gated_fit(rows, output, gram(rows))
    with patch.object(gated, "CURVATURE_ROWS", 500):
        some = gated_fit(rows, output, gram(rows))
    assert not torch.equal(some.change, whole.change)
    assert some.share < 0.2


def test_rows_in_float32_come_to_what_those_in_float64_do() -> None:
    rows, output, _ = problem(0)
    expected = gated_fit(rows, output, gram(rows))
    single = GatedRows(*(one.float() for one in (rows.inputs, rows.gates, rows.channels, rows.residual)))
    found = gated_fit(single, output.float(), gram(rows))
    assert found.change.dtype == found.output.dtype == torch.float32
    torch.testing.assert_close(found.change.double(), expected.change, rtol=1e-3, atol=1e-3)
    assert found.share == pytest.approx(expected.share, rel=1e-3)


@pytest.mark.parametrize("n", [0, 1, 5, 40, 800])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e12])
def test_unseen_rows_never_lose(n: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(n)
    rows, output, _ = problem(n, n=n)
    nothing = scale * torch.randn(n, E, generator=draw, dtype=torch.float64)
    rows = GatedRows(rows.inputs, rows.gates, rows.channels, nothing)
    fit = gated_fit(rows, output, gram(rows))
    assert 0 <= fit.share <= 1
    assert fit.change.isfinite().all()
    assert fit.output.isfinite().all()
    assert left(unseen(rows), output, fit.change, fit.output) <= float(unseen(rows).residual.square().sum()) * (
        1 + 1e-9
    )
    if scale == 0 or n < HELD_OUT:  # nothing to explain, or nothing to judge by
        assert not fit.change.any()
        assert not fit.output.any()


@pytest.mark.parametrize("silent", [slice(None), slice(0, 1)])
def test_channels_that_are_silent(silent: slice) -> None:
    rows, output, _ = problem(0, noise=1.0)
    rows.gates[:, silent] = 0
    rows.channels[:, silent] = 0
    fit = gated_fit(rows, output, gram(rows))
    assert fit.change.isfinite().all()
    assert fit.output.isfinite().all()
    assert not fit.change[:, silent].any()
    assert fit.share <= 1


def windows(count: int, seed: int = 1) -> TokenWindows:
    return TokenWindows(torch.randint(0, 128, (count, 16), generator=torch.Generator().manual_seed(seed)))


def test_the_mlp_of_a_model_comes_closer_to_the_dense_one_on_other_text() -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=96)
    config = CompressionConfig.validated(ratio=0.3, method="greedy", allocation="uniform", modules="mlp")
    fitted = compress_model(model, windows(256), config)
    with patch.object(Greedy, "finished_mlp", lambda _, solution, *__: solution):
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
        assert not torch.equal(mine.up_proj.weight, theirs.up_proj.weight)
        assert not torch.equal(mine.down_proj.weight, theirs.down_proj.weight)
        with torch.no_grad():
            losses = [float((dense(x) - thin(x)).square().sum()) for thin in (mine, theirs)]
        assert losses[0] < losses[1]


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_mlp_of_a_model_is_closer_to_the_dense_one_than_the_papers(ratio: float) -> None:
    """As it is in the end, on all tokens that calibrate, with the same ranks."""
    model = tiny_llama(hidden_size=32, intermediate_size=96)
    options = {"ratio": ratio, "allocation": "uniform", "modules": "mlp", "statistics": "dense"}
    ours, paper = (
        compress_model(model, windows(256), CompressionConfig.validated(method=method, **options))
        for method in ("greedy", "modegpt")
    )
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: entering.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows(256).ids)
        for index, x in enumerate(tuple(entering)):
            dense, mine, theirs = (each.model.layers[index].mlp for each in (model, ours.model, paper.model))
            assert mine.up_proj.weight.shape == theirs.up_proj.weight.shape
            losses = [float((dense(x) - thin(x)).square().sum()) for thin in (mine, theirs)]
            assert losses[0] < losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_through_the_mlp_are_what_its_maps_make_of_them(dtype: torch.dtype) -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=96, mlp_bias=True).to(dtype)
    layer, family = model.model.layers[0], family_of(model).description
    assert is_gated(layer, family)
    with torch.no_grad():
        for map in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            map.bias.normal_()
        layer.mlp.up_proj.weight[3] = 0
        layer.mlp.up_proj.bias[3] = 0
    kept = torch.tensor([0, 3, 50, 95])
    x = torch.randn(5000, 32, dtype=dtype)
    gates, channels, outputs = through_mlp(layer, family, x, kept)
    assert {gates.dtype, channels.dtype, outputs.dtype} == {torch.promote_types(dtype, torch.float32)}
    with torch.no_grad():
        expected = layer.mlp.act_fn(layer.mlp.gate_proj(x))
        inner = expected * layer.mlp.up_proj(x)
        whole = inner @ layer.mlp.down_proj.weight.T
    close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(channels.to(dtype), inner[:, kept], **close)
    torch.testing.assert_close(outputs.to(dtype), whole, **close)
    assert not gates[:, 1].any()  # of a channel that is always zero, nothing is known
    seen = [0, 2, 3]
    torch.testing.assert_close(gates[:, seen].to(dtype), expected[:, kept[seen]], **close)


def test_an_mlp_that_keeps_nearly_all_channels_is_left_as_it_is() -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=96)
    layer, family = model.model.layers[0], family_of(model).description
    weights, rows = read_mlp(layer, family), torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    z = layer.mlp.act_fn(layer.mlp.gate_proj(rows)) * layer.mlp.up_proj(rows)
    gram = (z.T @ z).detach().double()
    statistics = LayerStatistics({"mlp": gram}, rows=rows, passed=partial(through_mlp, layer, family, rows))
    ladder = Greedy(1e-2).mlp(weights, statistics)
    for rank, changes in ((96, False), (91, False), (90, True), (40, True)):
        plain, final = ladder.at(rank), ladder.final(rank)
        assert (final.error < plain.error) == changes
        assert torch.equal(final.weights.inputs[1], plain.weights.inputs[1]) != changes
        assert torch.equal(final.weights.inputs[0], plain.weights.inputs[0])
