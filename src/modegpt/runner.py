"""Running single decoder layers of a stock model, and seeing what passes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .data import TokenWindows


class _Stop(BaseException):
    """Carries a layer's output out of the model's forward."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output


class LayerRunner:
    """Runs single decoder layers inside the stock model's own forward.

    Every layer but the live one passes its input through, the live one gets the cached hidden states
    in place of its input, and the forward ends with it. So each layer sees exactly the mask, positions
    and other arguments its family's code gives it, and no family's forward is written again here.
    """

    def __init__(self, base: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        self._base = base
        self._layers = layers
        self._live = -1
        self._hidden: torch.Tensor | None = None

    @contextmanager
    def active(self) -> Iterator[LayerRunner]:
        """Take over the layers' forward within this context."""
        own = [vars(layer).get("forward") for layer in self._layers]  # other libraries patch forwards as well
        for index, layer in enumerate(self._layers):
            layer.forward = self._replacement(index, layer.forward)
        try:
            yield self
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    @torch.no_grad()
    def run(self, index: int, batch: TokenWindows, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The input and output (B, T, d) of layer ``index``; ``hidden`` None means the embeddings of ``batch``."""
        device = next(self._layers[index].parameters()).device
        self._live, self._hidden = index, None if hidden is None else hidden.to(device)
        mask = None if batch.mask is None else batch.mask.to(device)
        try:
            self._base(input_ids=batch.ids.to(device), attention_mask=mask, use_cache=False)
        except _Stop as stop:
            assert self._hidden is not None
            return self._hidden, stop.output
        finally:
            self._live, self._hidden = -1, None
        raise AssertionError("the live layer was never called")

    def _replacement(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index != self._live:
                return hidden_states
            if self._hidden is None:
                self._hidden = hidden_states
            output = original(self._hidden, *args, **kwargs)
            raise _Stop(output[0] if isinstance(output, tuple) else output)

        return forward


class InputCapture:
    """Keeps the latest input of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._value: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor:
        assert self._value is not None
        return self._value

    @contextmanager
    def attached(self) -> Iterator[None]:
        def capture(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._value = args[0]

        handle = self._module.register_forward_pre_hook(capture)
        try:
            yield
        finally:
            handle.remove()
