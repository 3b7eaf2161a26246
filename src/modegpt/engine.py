"""The layer-by-layer engine: token windows in, compressed layers out.

For every decoder layer in turn: run the calibration windows through the dense layer and gather its
statistics, solve its modules, keep the compressed layer, and pass on the layer's outputs. One layer is live at
a time; everything else of the model's forward (masks, positions, embeddings) is the stock model's own code.
The same loop serves a model in memory and one that is read layer by layer, a new run and a resumed one, one
worker and many.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from .activations import Activations, DiskActivations
from .alignment import USUAL_RATIO, Alignment, measure_alignments, widths_of
from .budget import LayerGeometry, LayerRanks, Module, staying, whole
from .choosing import choose_ranks
from .config import CompressionConfig
from .data import TokenWindows
from .errors import NumericalError
from .evaluation import Loss
from .families import is_capped, model_geometry, values_of_layers
from .journal import Journal
from .kept import Kept, unpacked
from .layered import LayeredModel, place, resident
from .layout import HeadShape
from .methods import METHODS, Method
from .parallel import Workers
from .profile import PROBE_LENGTH, PROBE_TOKENS, Profiler
from .progress import Progress
from .results import Choice, LayerResult, ModuleResult, Profile
from .runner import LayerRunner
from .scores import block_influence
from .solving import LayerSolver, Tensors
from .statistics import LayerStatistics, Statistic, StatisticsCollector, observable, sampled_tokens
from .weights import copy_rest


@dataclass(frozen=True)
class Compression:
    """A compressed model and how it came about."""

    thin: LayeredModel
    layers: list[LayerResult]
    choice: Choice
    alignment: Alignment | None = None
    """Where it was measured."""

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model; its layers are on the meta device where a journal has them."""
        return self.thin.model


def compress_model(
    model: PreTrainedModel,
    windows: TokenWindows | None,
    config: CompressionConfig,
    progress: Progress | None = None,
    probe: TokenWindows | None = None,
) -> Compression:
    """Compress a stock causal language model with calibration ``windows``; the model itself is not changed.

    They can be None where ``config`` calibrates nothing. ``probe`` are the windows that sensitivities are measured on,
    as :class:`Engine` takes them.
    """
    engine = Engine(resident(model), windows, config.batch_size, probe=probe, progress=progress)
    with engine.active():
        return engine.run(config)


class Engine:
    """One run over a stock model: scores, ranks, then the layer loop. Use within :meth:`active`.

    ``workers`` share the windows and the solving. With a ``journal`` (the first worker's), finished layers go to
    disk and out of memory, and those already there are not done again; hidden states go where it says. Sensitivities
    are measured on the ``probe`` windows, best others than those that calibrate: the first of these where not given.
    The statistics that were gathered on the way are ``kept`` (in the journal's directory, otherwise in memory), and
    where a finished profile is there already, no ``windows`` are needed; nor where nothing is learnt from text. An
    engine makes one profile, of one method.
    """

    def __init__(
        self,
        dense: LayeredModel,
        windows: TokenWindows | None,
        batch_size: int,
        *,
        probe: TokenWindows | None = None,
        progress: Progress | None = None,
        workers: Workers | None = None,
        journal: Journal | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.dense = dense
        self.family = dense.family
        self.progress = progress or Progress()
        self.workers = workers or Workers()
        self._journal = journal
        self._durable = self.workers.tell(journal is not None)
        self._states = self.workers.tell(journal.states if journal else None)
        self._batch_size = batch_size
        self._attention = "eager" if is_capped(dense.model) else dense.model.config._attn_implementation
        self.kept = kept or (journal.kept if journal else Kept())
        self.batches = self.own_batches(windows) if windows else []
        self._sampled = self.workers.share(sampled_tokens(windows).split(batch_size)) if windows else []
        probe = probe or windows
        self.probe = probe.pieces(PROBE_TOKENS, PROBE_LENGTH) if probe else None
        self.runner = LayerRunner(dense, self.batches, self.workers)

    def geometry(self, method: Method) -> list[LayerGeometry]:
        """What ``method`` can remove of every layer."""
        return model_geometry(self.dense.model, method.geometry)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Prepare the model for single-layer runs; it is as before afterwards."""
        model = self.dense.model
        training, precision = model.training, torch.get_float32_matmul_precision()
        model.eval()
        torch.set_float32_matmul_precision("highest")  # statistics count on float32 being float32
        try:
            with observable(model):
                yield
        finally:
            torch.set_float32_matmul_precision(precision)
            model.train(training)

    def run(self, config: CompressionConfig) -> Compression:
        """Everything that ``config`` asks for."""
        alignment = self.fastest_alignment(config) if config.align == "auto" else None
        if alignment is not None:
            config = config.model_copy(update={"align": alignment.chosen})
        choice = self.choose_ranks(config)
        method = METHODS[config.method].from_config(config)
        result = self.compress(method, choice, sequential=config.statistics == "sequential", seed=config.seed)
        return replace(result, alignment=alignment)

    def fastest_alignment(self, config: CompressionConfig) -> Alignment:
        """What the products of the first chosen layer are fastest by, see :mod:`modegpt.alignment`."""
        method, dense = METHODS[config.method].from_config(config), self.dense.model
        index = config.chosen_layers(len(self.dense.layers))[0]
        shape = self._heads(self.dense.layers[index])
        widths = widths_of(self.geometry(method)[index], shape, dense.config.hidden_size, config.modules)
        ratio, device = config.ratio or USUAL_RATIO, self.dense.device

        def measured() -> list[Any]:  # by one worker: another would find other times
            found = measure_alignments(widths, ratio, dense.dtype, device) if self.workers.first else {}
            return self.workers.tell(list(found.items()))

        found = Alignment.of(dict(self.once("alignment", measured)))
        self.progress.note(f"Ranks are rounded to multiples of {found.chosen} channels, which measured fastest")
        return found

    def choose_ranks(
        self,
        config: CompressionConfig,
        *,
        influence: Sequence[tuple[float, float, float]] | None = None,
        profile: Profile | None = None,
    ) -> Choice:
        """Decide how much every layer keeps.

        ``influence`` and ``profile`` spare the pass that :meth:`block_influence` or :meth:`profile` takes.
        """
        return choose_ranks(self, config, influence, profile)

    def profile(self, config: CompressionConfig) -> Profile:
        """What compressing each module alone costs, see :class:`modegpt.profile.Profiler`."""
        known = self.workers.tell(self.kept.profile)
        if known is not None:
            return known
        assert self.probe is not None
        method = METHODS[config.method].from_config(config)
        profile = Profiler(self, method, config.modules, self.probe).run(config.seed)
        if self.workers.first:
            self.kept.finish(profile)
        return profile

    def block_influence(self) -> list[tuple[float, float, float]]:
        """How much every layer changes its input, see :func:`modegpt.scores.block_influence`."""
        rows = self.once("block-influence", lambda: block_influence(self))
        return [(whole, attention, mlp) for whole, attention, mlp in rows]

    def once(self, name: str, compute: Callable[[], list[Any]]) -> list[Any]:
        """The scores of that name, computed unless the journal has them; they must be what JSON can hold."""
        known = self.workers.tell(self._journal.scores(name) if self._journal else None)
        if known is None:
            known = compute()
            if self._journal:
                self._journal.keep_scores(name, known)
        return known

    def compress(self, method: Method, choice: Choice, *, sequential: bool, seed: int = 0) -> Compression:
        """What ``method`` makes of the model, see :meth:`modegpt.methods.Method.compress`."""
        thin, results = method.following(choice).compress(self, choice, sequential=sequential, seed=seed)
        return Compression(thin, results, choice)

    def finished(self) -> dict[int, LayerResult]:
        """The layers that the journal already has."""
        return self.workers.tell(self._journal.finished if self._journal else {})

    def by_layer(
        self, method: Method, choice: Choice, *, sequential: bool, seed: int = 0
    ) -> tuple[LayeredModel, list[LayerResult]]:
        """The layer loop: gather, solve, keep, pass on.

        Layers that the journal already has are only passed through, and only as far as another one needs it. Where
        dense statistics were kept with a profile, nothing runs at all.
        """
        count, geometry = len(self.dense.layers), self.geometry(method)
        thin = self.skeleton(geometry, choice.ranks)
        places = {source: place for place, source in enumerate(thin.sources)}
        solver = LayerSolver(self.dense, geometry, self.workers, self.progress)
        done = self.finished()
        kept = not sequential and self.workers.tell(self.kept.profile is not None)
        open_layers = [index for index in range(count) if index not in done]
        hidden = self.activations("compress", self.batches)
        start = self.restore(hidden, open_layers[0]) if open_layers and not kept else 0

        thin_runner = LayerRunner(thin, self.batches, self.workers)
        results: dict[int, LayerResult] = dict(done)
        with self.progress.phase("compress", count), self.runner.active(), thin_runner.active():
            for index in range(count):
                # The outputs, by a later layer.
                needed = bool(method.statistics and open_layers) and not kept and start <= index < open_layers[-1]
                gone = index not in places
                through_dense = not sequential or choice.ranks[index] == whole(geometry[index])
                if gone and index not in done:
                    results[index] = LayerResult(choice.sparsity[index], {"layer": ModuleResult(0, 1, 1.0, None)})
                    self.keep_layer(index, None, {}, results[index])
                elif index not in done:
                    self.progress.detail("reading the layer")
                    with self.dense.live(index) as layer:
                        statistics = (
                            self.kept_statistics(index)
                            if kept
                            else self.calibrate(index, layer, hidden, method.statistics, keep=needed and through_dense)
                        )
                        if index + 1 not in done:
                            self.dense.prefetch(index + 1)
                        ladders = solver.ladders(index, method, layer, statistics, seed)
                        state, modules = solver.cut(ladders, layer, thin.layers[places[index]], choice.ranks[index])
                        self._say_short_experts(index, modules)
                        del statistics, ladders
                    results[index] = LayerResult(choice.sparsity[index], modules)
                    self.keep_layer(index, thin, state, results[index], used=needed and not through_dense)
                    del state
                    if needed and through_dense:
                        hidden.complete(index + 1)
                elif needed and through_dense:
                    self._pass_on(self.dense, self.runner, index, hidden)
                if needed and not through_dense and not gone:
                    self._pass_on(thin, thin_runner, places[index], hidden)
                self.progress.advance()
        hidden.remove()
        return thin, [results[index] for index in range(count)]

    def perplexity(self, model: LayeredModel, windows: TokenWindows) -> float:
        """Perplexity of the dense or the compressed ``model``, one layer at a time; as :func:`evaluation.perplexity`.

        Advances the current phase once for every layer.
        """
        batches = self.own_batches(windows)
        runner = LayerRunner(model, batches, self.workers)
        hidden = self.activations("evaluate", batches)
        with runner.active():
            for index in range(len(model.layers)):
                model.prefetch(index + 1)
                self._pass_on(model, runner, index, hidden)
                self.progress.advance()
            loss = Loss()
            for number, batch in enumerate(batches):
                for positions, logits in runner.head(number, hidden):
                    loss.add(logits, batch, positions)
        hidden.remove()
        self.workers.sum(loss.totals)
        return loss.perplexity()

    def restore(self, hidden: Activations, layer: int) -> int:
        """Take up the hidden states of an interrupted run; returns the layer that they enter, 0 for the embeddings.

        They enter the first unfinished ``layer`` or, if it was stopped before they were passed on, the one before.
        """
        for index in (layer, layer - 1):
            if index > 0 and self.everywhere(hidden.restore(index)):
                return index
        hidden.remove()
        return 0

    def calibrate(
        self, index: int, layer: nn.Module, hidden: Activations, wanted: Collection[Statistic], *, keep: bool
    ) -> LayerStatistics:
        """Run every batch through dense layer ``index``, gathering statistics; its outputs are kept if ``keep``."""
        if not wanted and not keep:
            return LayerStatistics({})
        self.progress.detail("calibrating")
        collector = StatisticsCollector(layer, self.family.description, self._heads(layer), wanted, self._sampled)
        with collector.attached():
            self.runner.run_layer(index, hidden, keep=keep, before=collector.next_batch)
        statistics = collector.result(self.workers)
        if not statistics.is_finite():
            raise NumericalError(f"layer {index}: NaN or infinite activations inside the layer")
        return statistics

    def kept_statistics(self, index: int) -> LayerStatistics:
        """The statistics of layer ``index`` that the first worker has kept."""
        self.progress.detail("reading the statistics")
        own = self.kept.tensors(index) if self.workers.first else None
        return unpacked(self.workers.tensors(own, 0, self.dense.device))

    def _pass_on(self, model: LayeredModel, runner: LayerRunner, index: int, hidden: Activations) -> None:
        self.progress.detail("passing on")
        with model.live(index):
            runner.run_layer(index, hidden)
        hidden.complete(model.sources[index] + 1)

    def _say_short_experts(self, index: int, modules: Mapping[Module, ModuleResult]) -> None:
        mlp = modules.get("mlp")
        tokens = mlp.expert_tokens if mlp else None
        if mlp and tokens and (few := mlp.experts_short_of_tokens):
            self.progress.note(
                f"Layer {index}: {len(few)} of {len(tokens)} experts saw fewer tokens than they have channels "
                f"({min(tokens)} at least); what they lack is estimated from their weights"
            )

    def _heads(self, layer: nn.Module) -> HeadShape:
        return HeadShape.of(layer, self.dense.model.config, self.family.description)

    def keep_layer(
        self, index: int, thin: LayeredModel | None, state: Tensors, result: LayerResult, *, used: bool = False
    ) -> None:
        """Put a finished layer where it belongs, in ``thin`` unless it is gone; in memory if it is ``used`` next."""
        self.progress.detail("keeping the layer")
        if self._journal:
            self._journal.keep_layer(index, state, result)
        if thin is not None and not self._durable:
            place(thin.layers[thin.sources.index(index)], state)
        elif thin is not None and used:
            thin.bring(thin.sources.index(index), state)

    def skeleton(
        self, geometry: Sequence[LayerGeometry], ranks: Sequence[LayerRanks], *, share: bool = False
    ) -> LayeredModel:
        """The compressed model with everything but its decoder layers, which stay on the meta device.

        What lies outside them is the dense model's own if ``share``, or if the compressed layers go to disk.
        """
        dense = self.dense.model
        config = self.compressed_config(geometry, ranks)
        with init_empty_weights(include_buffers=False):  # some rotary embeddings cannot be computed on meta
            compressed = self.family.causal_lm(config)
        prefix = f"{dense.base_model_prefix}.{self.family.description.layers}."
        copy_rest(compressed, dense, outside=prefix, share=share or self._durable)
        compressed.tie_weights()
        compressed.generation_config = copy.deepcopy(dense.generation_config)
        compressed.set_attn_implementation(self._attention)
        if self.family.description.experts is not None:
            compressed.set_experts_implementation(dense.config._experts_implementation)
        compressed.eval()
        sources = staying(ranks)

        def read(index: int) -> Tensors:
            """A compressed layer's tensors, from the first worker's journal."""
            own = self._journal.tensors(sources[index]) if self._journal else None
            return self.workers.tensors(own, 0, self.dense.device)

        return LayeredModel(compressed, self.family, read if self._durable else None, ahead=False, sources=sources)

    def compressed_config(self, geometry: Sequence[LayerGeometry], ranks: Sequence[LayerRanks]) -> Any:
        """The compressed model's config: the dense one's values, its own model type, and the widths per layer."""
        stay = staying(ranks)
        values = values_of_layers(self.dense.model, stay)
        for key in ("model_type", "architectures", "quantization_config", "per_layer_config", "transformers_version"):
            values.pop(key, None)
        sizes = (geometry[index].sizes(ranks[index]) for index in stay)
        heads = self._heads(self.dense.layers[0])
        per_group = heads.heads // heads.groups
        per_layer = {index: widths.to_config(heads.head, per_group) for index, widths in enumerate(sizes)}
        if self.family.inferred:
            values["compressed_family"] = self.family.description.differences()
        if any("stream_width" in widths for widths in per_layer.values()):
            values["tie_word_embeddings"] = False  # they are in different bases then
        config: Any = self.family.config(**values, per_layer_config=per_layer)  # type: ignore[call-arg]
        config.architectures = [self.family.causal_lm.__name__]
        config.auto_map = self.family.auto_map
        return config

    def own_batches(self, windows: TokenWindows) -> list[TokenWindows]:
        """The batches of ``windows`` that are for this worker."""
        return self.workers.share(list(windows.batches(self._batch_size)))

    def activations(self, purpose: str, batches: Sequence[TokenWindows]) -> Activations:
        """Room for the hidden states of ``batches``, in memory or in a folder of this worker's own."""
        if self._states is None:
            return Activations(len(batches))
        own = f"{purpose}-{self.workers.rank}-of-{self.workers.size}"
        return DiskActivations(len(batches), self._states / own)

    def everywhere(self, true: bool) -> bool:
        """Whether it is ``true`` for all workers."""
        total = torch.tensor(int(true))
        self.workers.sum(total)
        return int(total) == self.workers.size
