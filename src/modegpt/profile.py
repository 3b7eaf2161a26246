"""What compressing each module alone costs the model: error against rank, scaled by a measured divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .activations import Activations
from .budget import LayerRanks, Module, whole
from .data import TokenWindows
from .errors import NumericalError
from .evaluation import Loss, Predictions
from .layered import evict, place
from .least_loss import Part, part_of
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
#: At least so many windows are taken of several texts, so that each has about its share.
_OF_A_MIXTURE = 8
#: Every second prediction is compared: neighbours say much the same, and the head takes as long as several layers.
PROBE_STEP = 2
#: A module of a layer.
Place = tuple[int, Module]


def probe_windows(length: int) -> int:
    """How many windows of ``length`` tokens sensitivities are measured on."""
    return probe_shape(length)[0]


def probe_shape(length: int, sources: int = 1) -> tuple[int, int]:
    """How many windows, and how many of the first of their ``length`` tokens; ``sources`` can have their shares."""
    least = 1 if sources == 1 else max(_OF_A_MIXTURE, sources)
    piece = max(2, min(PROBE_LENGTH, length, PROBE_TOKENS // least))
    return max(least, PROBE_TOKENS // piece), piece


def parts_of(modules: Sequence[Module]) -> dict[Part, tuple[Module, ...]]:
    """Those of ``modules`` that belong to each part of a layer."""
    parts: dict[Part, tuple[Module, ...]] = {}
    for module in modules:
        parts[part_of(module)] = (*parts.get(part_of(module), ()), module)
    return parts


class Profiler:
    """One pass over the dense model that solves every layer and carries along what each module alone would change.

    For every module of every layer a stream of hidden states of the probe windows goes through that module
    compressed and everything after it dense. The streams of all modules so far pass a layer together, so that every
    layer is live once, and the last ones end in the logits. One more for each part of the layers goes through its
    modules compressed in all of them. Forward passes only.
    """

    def __init__(self, engine: Engine, method: Method, modules: Sequence[Module], probe: TokenWindows) -> None:
        self._engine = engine
        self._method, self._modules = method, modules
        self._batches = engine.own_batches(probe)
        self._runner = LayerRunner(engine.dense, self._batches, engine.workers)
        self._geometry = engine.geometry(method)
        self._solver = LayerSolver(engine.dense, self._geometry, engine.workers, engine.progress)
        self._parts = parts_of(modules)
        groups = dict.fromkeys([*((module,) for module in modules), *self._parts.values()])
        self._probed = {group: self._ranks(group) for group in groups}
        self._thin = {
            group: engine.skeleton(self._geometry, ranks, share=True) for group, ranks in self._probed.items()
        }
        self._clean = Activations(len(self._batches))
        self._streams: dict[Place, Activations] = {}
        self._together = {part: self._clean.copy() for part in self._parts}

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
                    found = self._solver.eliminations(ladders)
                    if engine.workers.first:
                        engine.kept.put(index, replace(statistics, eliminations=found))
                    del statistics
                    curves.append(self._solver.curves(ladders))
                    self._pass_on(index, layer, ladders)
                engine.progress.advance()
            hidden.remove()
            engine.progress.detail("divergence")
            divergences, perplexity = self._divergences([*self._streams.values(), *self._together.values()])
        own = dict(zip(self._streams, divergences, strict=False))
        modules = [
            {
                module: ModuleProfile.of(curve[module], self._probed[module,][index][module], own[index, module])
                for module in self._modules
            }
            for index, curve in enumerate(curves)
        ]
        return Profile(modules, perplexity, dict(zip(self._parts, divergences[len(own) :], strict=True)))

    def _ranks(self, group: Sequence[Module]) -> list[LayerRanks]:
        """Everything whole but the modules of ``group``."""
        result = []
        for layer in self._geometry:
            rank = whole(layer)
            for module in group:
                rank[module] = layer.modules[module].nearest(PROBED_SHARE * layer.modules[module].full, 1)
            result.append(rank)
        return result

    def _pass_on(self, index: int, layer: nn.Module, ladders: LayerLadders) -> None:
        """Take all streams through layer ``index``, and start those of its modules."""
        self._engine.progress.detail("passing on")
        with self._runner.active():
            for stream in self._streams.values():
                self._runner.run_layer(index, stream)
        for group, thin in self._thin.items():
            state, _ = self._solver.cut(ladders, layer, thin.layers[index], self._probed[group][index], final=False)
            streams = [self._together[part] for part, modules in self._parts.items() if modules == group]
            if len(group) == 1:
                self._streams[index, group[0]] = self._clean.copy()
                streams.append(self._streams[index, group[0]])
            runner = LayerRunner(thin, self._batches, self._engine.workers)
            place(thin.layers[index], state)
            with runner.active():
                for stream in streams:
                    runner.run_layer(index, stream)
            evict(thin.layers[index])
        with self._runner.active():
            self._runner.run_layer(index, self._clean)

    def _divergences(self, streams: Sequence[Activations]) -> tuple[list[float], float]:
        """E over tokens of KL(dense || stream) of every stream, and the dense model's perplexity."""
        loss = Loss()
        totals = torch.zeros(len(streams) + 1, dtype=torch.float64)
        with self._runner.active():
            for number, batch in enumerate(self._batches):
                for positions, logits in self._runner.head(number, self._clean, PROBE_STEP):
                    loss.add(logits, batch, positions)
                    dense = Predictions(logits, batch, positions)
                    totals[-1] += dense.count
                    for slot, stream in enumerate(streams):
                        other = self._runner.logits(number, stream, positions)
                        totals[slot] += dense.divergence(other)
        self._engine.workers.sum(totals)
        self._engine.workers.sum(loss.totals)
        means = (totals[:-1] / totals[-1]).clamp_min(0)
        if not bool(means.isfinite().all()):
            raise NumericalError("NaN or infinite logits with one module compressed")
        return means.tolist(), loss.perplexity()
