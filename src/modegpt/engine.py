"""The layer-by-layer engine: token windows in, a compressed model out.

For every decoder layer in turn: run the calibration windows through the dense layer and gather its
statistics, solve its modules, write the compressed layer, and pass on the layer's outputs. One layer
is live at a time; everything else of the model's forward (masks, positions, embeddings) is the stock
model's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .allocation import allocate
from .budget import MODULES, LayerRanks, Module, average_sparsity, ranks_from_sparsity
from .config import CompressionConfig
from .data import TokenWindows
from .errors import NumericalError
from .families import base_model, decoder_layers, family_of, model_geometry
from .methods import METHODS, Method, Solution
from .progress import Progress
from .runner import InputCapture, LayerRunner
from .statistics import LayerStatistics, StatisticsCollector, observable
from .weights import LayerWeights, assign, copy_rest, layer_tensors, read_layer


@dataclass(frozen=True)
class ModuleResult:
    """What happened to one module: ``rank`` of ``full`` units, relative output error, kept indices (None if mixed)."""

    rank: int
    full: int
    relative_error: float
    kept: list[int] | list[list[int]] | None


@dataclass(frozen=True)
class LayerResult:
    """What happened to one decoder layer."""

    sparsity: Mapping[Module, float]
    modules: Mapping[Module, ModuleResult]


@dataclass(frozen=True)
class Choice:
    """How much every layer keeps, and why."""

    ranks: list[LayerRanks]
    sparsity: list[dict[Module, float]]
    scores: list[list[float]] | None = None
    """Block-influence scores per layer (one, or attention and MLP), where the allocation used them."""
    temperature: float | None = None


@dataclass(frozen=True)
class Compression:
    """A compressed model and how it came about."""

    model: PreTrainedModel
    layers: list[LayerResult]
    choice: Choice
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time by phase."""


def compress_model(
    model: PreTrainedModel, windows: TokenWindows, config: CompressionConfig, progress: Progress | None = None
) -> Compression:
    """Compress a stock causal language model with calibration ``windows``; the model itself is not changed."""
    engine = Engine(model, windows, config.batch_size, progress or Progress())
    with engine.active():
        choice = engine.choose_ranks(config)
        return engine.compress(
            METHODS[config.method].from_config(config), choice, sequential=config.statistics == "sequential"
        )


class Engine:
    """One run over a stock model: scores, ranks, then the layer loop. Use within :meth:`active`."""

    def __init__(
        self, model: PreTrainedModel, windows: TokenWindows, batch_size: int, progress: Progress | None = None
    ) -> None:
        self.model = model
        self.progress = progress or Progress()
        self.family = family_of(model)
        self.layers = decoder_layers(model, self.family)
        self._attention = model.config._attn_implementation
        self._batches = list(windows.batches(batch_size))
        self._runner = LayerRunner(base_model(model), self.layers)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Prepare the model for single-layer runs; it is as before afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            with observable(self.model), self._runner.active():
                yield
        finally:
            self.model.train(training)

    def choose_ranks(
        self, config: CompressionConfig, influence: Sequence[tuple[float, float, float]] | None = None
    ) -> Choice:
        """Decide how much every layer keeps. ``influence`` spares the pass that :meth:`block_influence` takes."""
        geometry = model_geometry(self.model)
        average = average_sparsity(geometry, config.modules, config.ratio, config.align)
        if config.allocation == "uniform":
            uniform = [dict.fromkeys(config.modules, average) for _ in geometry]
            return Choice(ranks_from_sparsity(geometry, uniform, config.align), uniform)

        influence = influence or self.block_influence()
        # Which of a layer's three scores speaks for which modules.
        parts: list[tuple[int, tuple[Module, ...]]] = [(0, MODULES)]
        if config.allocation == "block-influence-split":
            parts = [(1, ("qk", "vo")), (2, ("mlp",))]
        chosen = [(slot, [module for module in part if module in config.modules]) for slot, part in parts]
        chosen = [(slot, part) for slot, part in chosen if part]
        scores = [[row[slot] for slot, _ in chosen] for row in influence]
        weights = [sum(layer.modules[module].parameters for module in part) for layer in geometry for _, part in chosen]

        temperature = None if config.temperature == "auto" else config.temperature
        shares, temperature = allocate([score for row in scores for score in row], weights, average, temperature)
        remaining = iter(shares)
        sparsity = [
            {module: share for (_, part), share in zip(chosen, remaining, strict=False) for module in part}
            for _ in geometry
        ]
        return Choice(ranks_from_sparsity(geometry, sparsity, config.align), sparsity, scores, temperature)

    def block_influence(self) -> list[tuple[float, float, float]]:
        """1 - E[cos(input, output)] of every dense layer: of the whole, of its attention and of its MLP.

        ShortGPT's block influence over all real calibration tokens (paper, section 3.3 and B.11).
        """
        scores = []
        with self.progress.phase("scores", len(self.layers)):
            hidden: list[torch.Tensor | None] = [None] * len(self._batches)
            for index, layer in enumerate(self.layers):
                self.progress.detail("block influence")
                totals, tokens = torch.zeros(3, dtype=torch.float64), 0
                middle = InputCapture(layer.get_submodule(self.family.description.middle))
                with middle.attached():
                    for number, batch in enumerate(self._batches):
                        entering, leaving = self._runner.run(index, batch, hidden[number])
                        hidden[number] = _checked(leaving, index).cpu()
                        stages = [_real(x, batch) for x in (entering, middle.value, leaving)]
                        for slot, (start, end) in enumerate(((0, 2), (0, 1), (1, 2))):
                            similarity = nn.functional.cosine_similarity(stages[start], stages[end], dim=-1)
                            totals[slot] += (1 - similarity.double()).sum().cpu()
                        tokens += len(stages[0])
                whole, attention, mlp = (totals / tokens).tolist()
                scores.append((whole, attention, mlp))
                self.progress.advance()
        return scores

    def compress(self, method: Method, choice: Choice, *, sequential: bool) -> Compression:
        """The layer loop: gather, solve, write, pass on."""
        compressed = self._skeleton(choice.ranks)
        thin_layers = decoder_layers(compressed, self.family)
        thin_runner = LayerRunner(base_model(compressed), thin_layers)
        results = []
        hidden: list[torch.Tensor | None] = [None] * len(self._batches)
        with self.progress.phase("compress", len(self.layers)), thin_runner.active():
            for index, (layer, thin, rank) in enumerate(zip(self.layers, thin_layers, choice.ranks, strict=True)):
                self.progress.detail("calibrating")
                collector = StatisticsCollector(layer, self.family.description, self.model.config.num_key_value_heads)
                outputs = self._calibrate(index, collector, hidden, keep=not sequential)
                statistics = collector.result()
                if not statistics.is_finite():
                    raise NumericalError(f"layer {index}: NaN or infinite activations inside the layer")
                weights, modules = self._solve(method, layer, statistics, rank)
                assign(thin, weights, like=layer)
                results.append(LayerResult(choice.sparsity[index], modules))
                if not sequential:
                    hidden = outputs
                elif index + 1 < len(self.layers):
                    self.progress.detail("passing on")
                    for number, batch in enumerate(self._batches):
                        output = thin_runner.run(index, batch, hidden[number])[1]
                        hidden[number] = _checked(output, index).cpu()
                self.progress.advance()
        return Compression(compressed, results, choice, self.progress.seconds)

    def _calibrate(
        self, index: int, collector: StatisticsCollector, hidden: Sequence[torch.Tensor | None], *, keep: bool
    ) -> list[torch.Tensor | None]:
        """Run every batch through dense layer ``index``, gathering statistics; returns the outputs to ``keep``."""
        outputs: list[torch.Tensor | None] = []
        with collector.attached():
            for batch, state in zip(self._batches, hidden, strict=True):
                collector.next_batch(batch.mask, batch.tokens)
                output = _checked(self._runner.run(index, batch, state)[1], index)
                if keep:
                    outputs.append(output.cpu())
        return outputs

    def _solve(
        self, method: Method, layer: nn.Module, statistics: LayerStatistics, rank: LayerRanks
    ) -> tuple[dict[str, torch.Tensor], dict[Module, ModuleResult]]:
        """Compress one layer's modules; returns the compressed layer's tensors and the results."""
        config = self.model.config
        description = self.family.description
        weights = read_layer(layer, description, config.num_key_value_heads, config.num_attention_heads)
        self.progress.detail("solving mlp")
        mlp = method.mlp(weights.mlp, statistics, rank.mlp)
        self.progress.detail("solving query-key")
        query_key = method.query_key(weights.query_key, statistics, rank.qk)
        self.progress.detail("solving value-output")
        value_output = method.value_output(weights.value_output, statistics, rank.vo)

        assert query_key.kept is not None
        tensors = layer_tensors(
            LayerWeights(mlp.weights, query_key.weights, value_output.weights), query_key.kept, description
        )
        head_dim = weights.query_key.key.shape[-1]
        return tensors, {
            "mlp": _result(mlp, rank.mlp, len(weights.mlp.output)),
            "qk": _result(query_key, rank.qk, head_dim // 2),
            "vo": _result(value_output, rank.vo, weights.value_output.value.shape[-1]),
        }

    def _skeleton(self, ranks: Sequence[LayerRanks]) -> PreTrainedModel:
        """The compressed model with everything but its decoder layers, which stay on the meta device."""
        config = self.compressed_config(ranks)
        with torch.device("meta"):
            compressed = self.family.causal_lm(config)
        prefix = f"{self.model.base_model_prefix}.{self.family.description.layers}."
        copy_rest(compressed, self.model, outside=prefix)
        compressed.tie_weights()
        compressed.generation_config = copy.deepcopy(self.model.generation_config)
        compressed.set_attn_implementation(self._attention)
        compressed.eval()
        return compressed

    def compressed_config(self, ranks: Sequence[LayerRanks]) -> Any:
        """The compressed model's config: the dense one's values, its own model type, and the widths per layer."""
        values = self.model.config.to_dict()
        for key in ("model_type", "architectures", "quantization_config", "per_layer_config", "transformers_version"):
            values.pop(key, None)
        per_layer = {index: rank.sizes().to_config() for index, rank in enumerate(ranks)}
        config: Any = self.family.config(**values, per_layer_config=per_layer)  # type: ignore[call-arg]
        config.architectures = [self.family.causal_lm.__name__]
        config.auto_map = self.family.auto_map
        return config


def _checked(hidden: torch.Tensor, index: int) -> torch.Tensor:
    if not hidden.isfinite().all():
        raise NumericalError(f"layer {index}: NaN or infinite activations in the layer's output")
    return hidden


def _real(hidden: torch.Tensor, batch: TokenWindows) -> torch.Tensor:
    """The rows (N, d) of real tokens in (B, T, d), in float32."""
    rows = hidden.flatten(0, 1) if batch.mask is None else hidden[batch.mask.to(hidden.device)]
    return rows.float()


def _result(solution: Solution[Any], rank: int, full: int) -> ModuleResult:
    kept = None if solution.kept is None else solution.kept.tolist()
    return ModuleResult(rank, full, solution.relative_error, kept)
