"""Whole layers go: each time the one that the loss on some text rises least without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..activations import Activations
from ..evaluation import Loss
from ..results import Choice
from ..runner import LayerRunner
from .shortgpt import WholeLayers, without

if TYPE_CHECKING:
    from ..config import CompressionConfig
    from ..engine import Engine


class SLEB(WholeLayers):
    """argmin_j L(model without the layers gone so far and j) goes, again and again; L is measured anew every time.

    Song et al., arXiv 2402.09025 (algorithm 1). L is the mean negative log-likelihood of the next token, here over
    the windows that sensitivities are measured on (about two thousand tokens, which do not calibrate where the text has
    others), where the authors take all 128 windows: it only has to rank a model's layers.
    """

    name = "sleb"
    summary = "whole layers go, each time the one that the loss rises least without"

    def removal_passes(self, layers: int, ratio: float) -> tuple[float, float]:
        """Half of the other layers for every layer that is tried, and the head for it."""
        left = range(layers, layers - max(1, round(ratio * layers)), -1)
        return sum(count * (count + 1) / 2 for count in left), sum(left)

    def choose(self, engine: Engine, config: CompressionConfig, ratio: float) -> Choice:
        """As many rounds as layers go."""
        geometry, gone = engine.geometry(self), list[int]()
        sizes = [layer.parameters for layer in geometry]
        wanted = ratio * sum(sizes)
        with engine.progress.phase("scores", max(1, round(wanted / max(sizes)))):
            while not gone or sum(sizes[index] for index in gone) < wanted - min(sizes) / 2:
                engine.progress.detail(f"without {len(gone) + 1}")
                losses = engine.once(f"without {gone}", lambda: losses_without(engine, gone))
                gone.append(min((loss, index) for index, loss in losses)[1])
                engine.progress.advance()
        ranks = without(gone, geometry, ratio)
        return Choice(ranks, [{"layer": float(1 - rank["layer"])} for rank in ranks])


def losses_without(engine: Engine, gone: list[int]) -> list[tuple[int, float]]:
    """The losses of the dense model without the layers ``gone`` and each of the others: pairs of layer and loss.

    One stream of the probe windows' hidden states goes through the layers that are left, and for each of them another
    one begins behind it with what enters it. So each layer is live once, what comes before a layer is computed once for
    all that come later, and memory holds a stream for every layer. Forward passes only.
    """
    assert engine.probe is not None
    batches = engine.own_batches(engine.probe)
    runner = LayerRunner(engine.dense, batches, engine.workers)
    clean, streams = Activations(len(batches)), dict[int, Activations]()
    left = [index for index in range(len(engine.dense.layers)) if index not in gone]
    with runner.active():
        for index, following in zip(left, [*left[1:], len(engine.dense.layers)], strict=True):
            with engine.dense.live(index):
                engine.dense.prefetch(following)
                for stream in streams.values():
                    runner.run_layer(index, stream)
                streams[index] = clean.copy()
                runner.run_layer(index, clean)
        losses = []
        for index, stream in streams.items():
            loss = Loss()
            for number, batch in enumerate(batches):
                for positions, logits in runner.head(number, stream):
                    loss.add(logits, batch, positions)
            engine.workers.sum(loss.totals)
            losses.append((index, loss.mean()))
    return losses
