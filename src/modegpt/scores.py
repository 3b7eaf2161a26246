"""How much the layers of the dense model matter: passes over them that allocations take their scores from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from .activations import Activations
from .data import TokenWindows
from .decompositions import outlier_share
from .layout import HeadShape, expert_count, linear, mlp_maps, query_key_value
from .runner import Capture, real_rows
from .statistics import LayerStatistics, Statistic

if TYPE_CHECKING:
    from .engine import Engine

_T = TypeVar("_T")
#: Keeps the cosine of a zero vector finite, namely zero.
_TINY = 1e-30
#: The sizes of what enters every linear map.
_INPUTS: frozenset[Statistic] = frozenset(
    {"attention_input_moments", "head_outputs_moments", "mlp_input_moments", "mlp_moments"}
)


def over_layers(engine: Engine, what: str, score: Callable[[int, nn.Module, Activations], _T]) -> list[_T]:
    """``score`` of every dense layer, which it runs on the hidden states that it is given."""
    scores, dense = [], engine.dense
    hidden = engine.activations("scores", engine.batches)
    with engine.progress.phase("scores", len(dense.layers)), engine.runner.active():
        for index in range(len(dense.layers)):
            engine.progress.detail(what)
            with dense.live(index) as layer:
                dense.prefetch(index + 1)
                scores.append(score(index, layer, hidden))
            hidden.complete(index + 1)
            engine.progress.advance()
    hidden.remove()
    return scores


def block_influence(engine: Engine) -> list[tuple[float, float, float]]:
    """1 - E[cos(input, output)] of every dense layer: of the whole, of its attention and of its MLP.

    ShortGPT's block influence over all real calibration tokens (paper, section 3.3 and B.11).
    """
    return over_layers(engine, "block influence", lambda *place: _influence(engine, *place))


def _influence(engine: Engine, index: int, layer: nn.Module, hidden: Activations) -> tuple[float, float, float]:
    description = engine.family.description
    path = description.middle(engine.dense.model.config)
    middle = Capture(layer.get_submodule(path or description.attention), outputs=path is None)
    totals = torch.zeros(4, dtype=torch.float64, device=engine.dense.device)

    def score(batch: TokenWindows, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        # Where attention and MLP are parallel, attention counts as the first to add to the stream.
        between = middle.value.view_as(entering) if path else entering + middle.value
        start, between, end = (real_rows(x, batch).float() for x in (entering, between, leaving))
        sizes = [x.norm(dim=-1) for x in (start, between, end)]
        pairs = ((start, end, 0, 2), (start, between, 0, 1), (between, end, 1, 2))
        for slot, (one, other, i, j) in enumerate(pairs):
            similarity = torch.linalg.vecdot(one, other) / (sizes[i] * sizes[j]).clamp_min(_TINY)
            totals[slot] += (1 - similarity.double()).sum()
        totals[3] += len(start)

    with middle.attached():
        engine.runner.run_layer(index, hidden, after=score)
    engine.workers.sum(totals)
    whole, attention, mlp = (totals[:3] / totals[3]).tolist()
    return whole, attention, mlp


def outlier_shares(engine: Engine, threshold: float) -> list[float]:
    """OWL's share of outliers among the linear maps of every dense layer, see :func:`decompositions.outlier_share`.

    Routers of experts do not count.
    """

    def score(index: int, layer: nn.Module, hidden: Activations) -> float:
        statistics = engine.calibrate(index, layer, hidden, _INPUTS, keep=True)
        return outlier_share(lambda: _maps(engine, layer, statistics), threshold)

    return over_layers(engine, "outliers", score)


def _maps(engine: Engine, layer: nn.Module, statistics: LayerStatistics) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every linear map of a layer (in, out), and the sizes (in,) of what enters its input channels."""
    family = engine.family.description
    sizes = {name: statistics[name].select(-2, 1).sqrt() for name in _INPUTS}
    heads = HeadShape.of(layer, engine.dense.model.config, family)
    if (bias := query_key_value(layer, family, heads)[2][1]) is not None:  # which the moments leave out
        shift = bias.repeat_interleave(heads.heads // heads.groups, 0).flatten()
        first, second = statistics["head_outputs_moments"]
        squares = second + 2 * shift * first + statistics.tokens * shift.square()
        sizes["head_outputs_moments"] = squares.clamp_min(0).sqrt()
    for name in family.input_maps:
        yield linear(layer, f"{family.attention}.{name}")[0], sizes["attention_input_moments"]
    yield linear(layer, f"{family.attention}.{family.output}")[0], sizes["head_outputs_moments"]
    experts = expert_count(layer, family)
    for expert in range(experts) if experts else (None,):
        inputs, output = mlp_maps(layer, family, expert)
        entering, inner = (
            sizes[name] if expert is None else sizes[name][expert] for name in ("mlp_input_moments", "mlp_moments")
        )
        for weight, _ in inputs:
            yield weight, entering
        yield output, inner
