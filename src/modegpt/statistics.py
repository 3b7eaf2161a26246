"""What calibration leaves behind for one decoder layer, and how it is gathered from the running stock model.

No attention is re-implemented: Transformers routes every attention through a named function, and an
observing one sees queries and keys after the rotary embedding. Hooks on two linear maps see the rest.

Sums are float64, of products of at most ``BLOCK_ROWS`` tokens in float32 (float64 for float64 models). A float32
product is off by about 1e-7 of its two channels' sizes, whatever the others are: the same noise that
float32 activations bring along. The decompositions treat what is below it as zero.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .data import TokenWindows
from .modeling import Family
from .parallel import Workers

#: Tokens whose products are summed in float32 before they join the float64 sum.
BLOCK_ROWS = 2048
#: A symmetric product is computed in at most this many column panels, each against itself and those after it.
PANELS, PANEL_WIDTH = 8, 384


def panels(n: int) -> list[slice]:
    """The column panels of a symmetric n x n product."""
    width = max(PANEL_WIDTH, -(-n // PANELS))
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


class GramSum:
    """C = sum over tokens of x^T x, (..., n, n) float64, for x (..., N, n) given piece by piece.

    Only the panels on and above the diagonal are computed: for wide x little more than half of the arithmetic.
    """

    def __init__(self) -> None:
        self.resolution = 0.0
        self._sum: torch.Tensor | None = None
        self._panels: list[slice] = []

    def add(self, x: torch.Tensor) -> None:
        """Add x^T x of x (..., N, n), in any floating-point dtype."""
        x = x if x.dtype == torch.float64 else x.float()
        self.resolution = torch.finfo(x.dtype).eps
        if self._sum is None:
            n = x.shape[-1]
            self._sum = torch.zeros(*x.shape[:-2], n, n, dtype=torch.float64, device=x.device)
            self._panels = panels(n)
        for rows in x.split(BLOCK_ROWS, dim=-2):
            for panel in self._panels:
                self._sum[..., panel, panel.start :] += rows[..., panel].mT @ rows[..., panel.start :]

    def total(self, workers: Workers) -> torch.Tensor:
        """The sum over all workers' tokens; this ends the accumulation."""
        assert self._sum is not None
        workers.sum(self._sum)
        for panel in self._panels:
            self._sum[..., panel.stop :, panel] = self._sum[..., panel, panel.stop :].mT
        return self._sum


@dataclass
class LayerStatistics:
    """Second moments of one layer's activations, summed over ``tokens`` real (unmasked) tokens; all float64.

    Notation: d hidden size, m intermediate size, G key-value heads, g query heads each, h head size.
    """

    mlp: torch.Tensor
    """C = Z^T Z of the input of the MLP's output map: (m, m)."""
    attention_input: torch.Tensor
    """C = X^T X of the attention block's input, after its norm: (d, d)."""
    query: torch.Tensor
    """C_q of every head after the rotary embedding: (G, g, h, h)."""
    key: torch.Tensor
    """C_k of every key head after the rotary embedding: (G, h, h)."""
    tokens: int = 0
    resolution: float = 0.0
    """Relative precision of the products: those of float32, or of float64 for a model in float64."""

    def is_finite(self) -> bool:
        """Whether every sum is free of NaN and infinity."""
        return all(bool(x.isfinite().all()) for x in (self.mlp, self.attention_input, self.query, self.key))


AttentionObserver = Callable[[torch.Tensor, torch.Tensor], None]
_observers: WeakKeyDictionary[nn.Module, AttentionObserver] = WeakKeyDictionary()


def _observing(implementation: str) -> str:
    """Register an attention function that shows queries and keys to an observer, then computes as before."""
    name = f"modegpt_observing_{implementation}"

    def attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (observer := _observers.get(module)) is not None:
            observer(query, key)
        if implementation == "eager":  # not registered by Transformers: every family has its own
            return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, *args, **kwargs)
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


@contextmanager
def observable(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the attention of ``model`` can be observed; its results do not change."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(_observing("eager" if previous == "eager" else "sdpa"))
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


class StatisticsCollector:
    """Accumulates the :class:`LayerStatistics` of one stock decoder layer while it runs."""

    def __init__(self, layer: nn.Module, family: Family, groups: int) -> None:
        self._attention = layer.get_submodule(family.attention)
        self._value = self._attention.get_submodule(family.value)
        self._mlp_output = layer.get_submodule(family.mlp_output)
        self._groups = groups
        self._mask: torch.Tensor | None = None
        self._sums = {name: GramSum() for name in ("attention_input", "query", "key", "mlp")}
        self._tokens = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Collect from every forward of the layer within this context."""
        with ExitStack() as stack:
            for module, name in ((self._value, "attention_input"), (self._mlp_output, "mlp")):
                handle = module.register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
                stack.callback(handle.remove)
            _observers[self._attention] = self._observe
            stack.callback(_observers.pop, self._attention)
            yield

    def next_batch(self, batch: TokenWindows) -> None:
        """Announce the batch about to run."""
        self._mask = batch.mask
        self._tokens += batch.tokens

    def result(self, workers: Workers) -> LayerStatistics:
        """The statistics of everything that all workers have seen."""
        sums = {name: gram.total(workers) for name, gram in self._sums.items()}
        heads, *head = sums["query"].shape
        query = sums["query"].view(self._groups, heads // self._groups, *head)
        tokens = torch.tensor(self._tokens, device=query.device)
        workers.sum(tokens)
        resolution = max(gram.resolution for gram in self._sums.values())
        return LayerStatistics(sums["mlp"], sums["attention_input"], query, sums["key"], int(tokens), resolution)

    def _observe(self, query: torch.Tensor, key: torch.Tensor) -> None:
        for name, x in (("query", query), ("key", key)):
            self._add(name, x.transpose(1, 2))  # (B, T, heads, h)

    def _add(self, name: str, x: torch.Tensor) -> None:
        """Add the real tokens of x (B, T, ..., n): one Gram matrix for each index in between."""
        rows = x.detach().flatten(0, 1) if self._mask is None else x.detach()[self._mask]  # (N, ..., n)
        self._sums[name].add(rows.movedim(0, -2))  # (..., N, n)
