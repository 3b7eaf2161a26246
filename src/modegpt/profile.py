"""What compressing each module alone costs the model: error against rank, scaled by a measured divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .activations import Activations
from .budget import LayerRanks, Module, whole
from .data import TokenWindows
from .errors import NumericalError
from .evaluation import Loss, Predictions
from .layered import LayeredModel, evict, place
from .methods import Method
from .results import ModuleProfile, Profile
from .runner import LayerRunner
from .solving import LayerLadders, LayerSolver

if TYPE_CHECKING:
    from .engine import Engine

#: What a module is left with when its divergence is measured.
PROBED_SHARE = 0.5
#: Tokens that sensitivities are measured on, in windows of at most :data:`PROBE_LENGTH`.
PROBE_TOKENS, PROBE_LENGTH = 2048, 1024
#: Every second prediction is compared: neighbours say much the same, and the head takes as long as several layers.
PROBE_STEP = 2
#: A module of a layer.
Place = tuple[int, Module]


def probe_windows(length: int) -> int:
    """How many windows of ``length`` tokens sensitivities are measured on."""
    return probe_shape(length)[0]


def probe_shape(length: int, sources: int = 1) -> tuple[int, int]:
    """How many windows, and how many of the first of their ``length`` tokens; some windows of each of ``sources``."""
    piece = max(2, min(PROBE_LENGTH, length, PROBE_TOKENS // sources))
    return max(sources, PROBE_TOKENS // piece), piece


class Profiler:
    """One pass over the dense model that solves every layer and carries along what each module alone would change.

    For every module of every layer a stream of hidden states of the probe windows goes through that module
    compressed and everything after it dense. The streams of all modules so far pass a layer together, so that every
    layer is live once, and the last ones end in the logits. Forward passes only.
    """

    def __init__(self, engine: Engine, method: Method, modules: Sequence[Module], probe: TokenWindows) -> None:
        self._engine = engine
        self._method = method
        self._batches = engine.own_batches(probe)
        self._runner = LayerRunner(engine.dense, self._batches, engine.workers)
        self._geometry = engine.geometry(method)
        self._solver = LayerSolver(engine.dense, self._geometry, engine.workers, engine.progress)
        self._probed = {module: self._ranks(module) for module in modules}
        self._thin = {
            module: engine.skeleton(self._geometry, ranks, share=True) for module, ranks in self._probed.items()
        }
        self._clean = Activations(len(self._batches))
        self._streams: dict[Place, Activations] = {}

    def run(self, seed: int) -> Profile:
        """Profile all layers."""
        engine, layers = self._engine, self._engine.dense.layers
        hidden, wanted = engine.activations("profile", engine.batches), self._method.statistics
        curves = []
        with engine.progress.phase("profile", len(layers)):
            for index in range(len(layers)):
                engine.progress.detail("reading the layer")
                with engine.dense.live(index) as layer:
                    with engine.runner.active():
                        statistics = engine.calibrate(index, layer, hidden, wanted, keep=bool(wanted))
                    if wanted:
                        hidden.complete(index + 1)
                    engine.dense.prefetch(index + 1)
                    ladders = self._solver.ladders(index, self._method, layer, statistics, seed)
                    if engine.workers.first:
                        engine.kept.put(index, statistics)
                    del statistics
                    curves.append(self._solver.curves(ladders))
                    self._pass_on(index, layer, ladders)
                engine.progress.advance()
            hidden.remove()
            engine.progress.detail("divergence")
            divergences, perplexity = self._divergences()
        modules = [
            {
                module: ModuleProfile.of(curve[module], ranks[index][module], divergences[index, module])
                for module, ranks in self._probed.items()
            }
            for index, curve in enumerate(curves)
        ]
        return Profile(modules, perplexity)

    def _ranks(self, module: Module) -> list[LayerRanks]:
        """Everything whole but ``module``."""
        result = []
        for layer in self._geometry:
            rank, shape = whole(layer), layer.modules[module]
            rank[module] = shape.nearest(PROBED_SHARE * shape.full, 1)
            result.append(rank)
        return result

    def _pass_on(self, index: int, layer: nn.Module, ladders: LayerLadders) -> None:
        """Take all streams through layer ``index``, and start those of its modules."""
        self._engine.progress.detail("passing on")
        with self._runner.active():
            for stream in self._streams.values():
                self._runner.run_layer(index, stream)
        for module, thin in self._thin.items():
            state, _ = self._solver.cut(ladders, layer, thin.layers[index], self._probed[module][index])
            self._streams[index, module] = self._through(index, thin, state)
        with self._runner.active():
            self._runner.run_layer(index, self._clean)

    def _through(self, index: int, thin: LayeredModel, state: Mapping[str, torch.Tensor]) -> Activations:
        stream = self._clean.copy()
        runner = LayerRunner(thin, self._batches, self._engine.workers)
        place(thin.layers[index], state)
        with runner.active():
            runner.run_layer(index, stream)
        evict(thin.layers[index])
        return stream

    def _divergences(self) -> tuple[dict[Place, float], float]:
        """E over tokens of KL(dense || stream) of every stream, and the dense model's perplexity."""
        loss = Loss()
        totals = torch.zeros(len(self._streams) + 1, dtype=torch.float64)
        with self._runner.active():
            for number, batch in enumerate(self._batches):
                for positions, logits in self._runner.head(number, self._clean, PROBE_STEP):
                    loss.add(logits, batch, positions)
                    dense = Predictions(logits, batch, positions)
                    totals[-1] += dense.count
                    for slot, stream in enumerate(self._streams.values()):
                        other = self._runner.logits(number, stream, positions)
                        totals[slot] += dense.divergence(other)
        self._engine.workers.sum(totals)
        self._engine.workers.sum(loss.totals)
        means = (totals[:-1] / totals[-1]).clamp_min(0)
        if not bool(means.isfinite().all()):
            raise NumericalError("NaN or infinite logits with one module compressed")
        return dict(zip(self._streams, means.tolist(), strict=True)), loss.perplexity()
