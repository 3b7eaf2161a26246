"""What calibration leaves behind for one decoder layer, and how it is gathered from the running stock model.

No attention is re-implemented: Transformers routes every attention through a named function, and an
observing one sees queries and keys after the rotary embedding. Hooks on two linear maps see the rest.

Sums are float64. The products are formed in float64 as well: a decomposition needs the small
eigen-directions of a Gram matrix, and float32 products bury everything below about 1e-7 of the
largest eigenvalue, which activation outliers push up by orders of magnitude.
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

from .modeling import Family


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
        self._sums: dict[str, torch.Tensor] = {}
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

    def next_batch(self, mask: torch.Tensor | None, tokens: int) -> None:
        """Announce the batch about to run: its ``mask`` (B, T), true for real tokens, and their number."""
        self._mask = mask
        self._tokens += tokens

    def result(self) -> LayerStatistics:
        """The statistics of everything seen so far."""
        heads, *head = self._sums["query"].shape
        query = self._sums["query"].view(self._groups, heads // self._groups, *head)
        return LayerStatistics(
            self._sums["mlp"], self._sums["attention_input"], query, self._sums["key"], tokens=self._tokens
        )

    def _observe(self, query: torch.Tensor, key: torch.Tensor) -> None:
        for name, x in (("query", query), ("key", key)):
            self._add(name, x.transpose(1, 2))  # (B, T, heads, h)

    def _add(self, name: str, x: torch.Tensor) -> None:
        """Add x^T x over the real tokens of x (B, T, ..., n): one Gram matrix for each index in between."""
        rows = x.detach().flatten(0, 1) if self._mask is None else x.detach()[self._mask]  # (N, ..., n)
        rows = rows.double().movedim(0, -1)  # (..., n, N)
        gram = rows @ rows.mT
        if name in self._sums:
            self._sums[name] += gram
        else:
            self._sums[name] = gram
