"""How fast this machine is: one random layer of a model's shape is really run and solved.

One of a smaller width and the same proportions where that would take long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .activations import Activations
from .config import RunConfig
from .costs import Sizes, forward_flops, gram_flops, head_flops, resized
from .data import SAMPLED_AT_ONCE, TokenWindows
from .decompositions import principal_directions
from .families import family_of
from .layered import LayeredModel, resident
from .layout import HeadShape, expert_count
from .methods import METHODS
from .parallel import Workers
from .progress import Progress
from .runner import LayerRunner
from .solving import LayerSolver
from .statistics import StatisticsCollector, observable

_WIDTH, _TOKENS, _VOCABULARY, _TIMES = 1024, 2048, 2048, 2


@dataclass(frozen=True)
class Rates:
    """Operations per second, measured on one layer."""

    forward: float
    gram: float
    solve: float
    head: float
    sample: float
    products: float
    """Of rows, in float32 (float64 for a model of that)."""


def measured_rates(config: RunConfig, model: PreTrainedModel, dtype: torch.dtype, kept: float) -> Rates:
    """How fast this machine is at one random layer of the proportions of ``model``, of which ``kept`` stays."""
    real = Sizes.of(model)
    on_gpu = torch.device(config.device).type == "cuda"  # fast enough for the real width
    sizes = real if on_gpu else real.scaled(min(1.0, _WIDTH / real.hidden))
    window = min(config.sequence_length, _TOKENS)
    method = METHODS[config.method].from_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = _one_layer(model, sizes, dtype).to(config.device)  # type: ignore[arg-type]
        batch = TokenWindows(torch.randint(_VOCABULARY, (1, window)))
    seconds = _time_layer(config, resident(probe), sizes, batch, kept)
    return Rates(
        forward=window * forward_flops(sizes, window) / seconds["forward"],
        # Overlapping measurements can come out the wrong way round on a busy machine.
        gram=window
        * gram_flops(sizes, METHODS[config.method].statistics, window)
        / max(seconds["calibrate"] - seconds["forward"], seconds["forward"] / 100),
        solve=sum(method.solve_flops(module, sizes, kept) for module in method.modules) / seconds["solve"],
        head=window * head_flops(sizes.hidden, _VOCABULARY) / seconds["head"],
        products=2 * window * sizes.hidden * sizes.intermediate / seconds["products"],
        sample=SAMPLED_AT_ONCE * (forward_flops(sizes, 1) + head_flops(sizes.hidden, _VOCABULARY)) / seconds["sample"],
    )


def _time_layer(
    config: RunConfig, model: LayeredModel, sizes: Sizes, batch: TokenWindows, kept: float
) -> dict[str, float]:
    """Run, calibrate and solve the one layer of ``model`` as the engine does; the best seconds of each."""
    seconds: dict[str, float] = {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        _wait(config.device)
        started = time.perf_counter()
        yield
        _wait(config.device)
        seconds[name] = min(time.perf_counter() - started, seconds.get(name, math.inf))  # the first time warms up

    def rank(full: int) -> int:
        return max(1, round(kept * full))

    method, family = METHODS[config.method].from_config(config), model.family.description
    layer, hidden = model.layers[0], Activations(1)
    heads, experts = HeadShape.of(layer, model.model.config, family), expert_count(layer, family)
    with observable(model.model), LayerRunner(model, [batch], Workers()).active() as runner:
        for _ in range(_TIMES):
            with (
                clock("calibrate"),
                (collector := StatisticsCollector(layer, family, heads, method.statistics)).attached(),
            ):
                runner.run_layer(0, hidden, keep=False, before=collector.next_batch)
            with clock("forward"):
                runner.run_layer(0, hidden)
            with clock("head"):
                list(runner.head(0, hidden))
            hidden.remove()
    wide = torch.float64 if model.model.dtype == torch.float64 else torch.float32
    rows, maps = (
        torch.ones(shape, dtype=wide, device=config.device)
        for shape in ((batch.ids.shape[1], sizes.hidden), (sizes.hidden, sizes.intermediate))
    )
    with torch.no_grad():
        for _ in range(_TIMES):
            with clock("products"):
                rows @ maps
            with clock("sample"):
                model.model(input_ids=batch.ids[0, :1].expand(SAMPLED_AT_ONCE, 1).to(model.model.device))
    statistics = replace(collector.result(Workers()), rows=None)  # what they are for is no part of the rate
    of_mlp = statistics.of_expert(0) if experts and "mlp" in method.statistics else statistics
    enough = config.samples * config.sequence_length >= sizes.intermediate
    if "mlp" in method.statistics and enough and sizes.intermediate > batch.tokens // (2 * sizes.experts):
        # Few tokens make the correlation singular, which takes longer to solve; all of them will not.
        of_mlp["mlp"].diagonal().add_(of_mlp["mlp"].diagonal().mean().clamp_min(1))
    solver = LayerSolver(model, [], Workers(), Progress())
    with clock("solve"):
        for module, shape in method.geometry(layer, model.model.config, family).modules.items():
            if module == "stream":  # two points
                for name in ("attention_input", "mlp_input"):
                    principal_directions(statistics[name])
            elif module != "layer":
                part = (module, 0 if experts and module == "mlp" else None)
                solver.ladder(part, method, layer, statistics).final(rank(shape.full))
    return seconds


def _one_layer(model: PreTrainedModel, sizes: Sizes, dtype: torch.dtype) -> PreTrainedModel:
    """A random model of one layer of these ``sizes``, otherwise configured like ``model``."""
    config = resized(model.config, family_of(model).description, sizes, vocabulary=_VOCABULARY)
    probe: PreTrainedModel = type(model)._from_config(config, dtype=dtype)
    probe.eval()
    return probe


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
