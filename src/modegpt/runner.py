"""Running single decoder layers of a model on batches of tokens, and seeing what passes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .activations import Activations
from .data import TokenWindows
from .errors import NumericalError
from .layered import LayeredModel
from .parallel import Workers

#: Positions whose logits are computed at once.
HEAD_POSITIONS = 512


class _Stop(BaseException):
    """Carries a layer's output out of the model's forward."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output


class LayerRunner:
    """Runs single decoder layers inside the model's own forward.

    Every layer but the live one passes its input through, the live one gets the cached hidden states
    in place of its input, and the forward ends with it. So each layer sees exactly the mask, positions
    and other arguments its family's code gives it, and no family's forward is written again here.
    """

    def __init__(self, model: LayeredModel, batches: Sequence[TokenWindows], workers: Workers) -> None:
        self._model = model
        self._batches = batches
        self._workers = workers
        self._live: int | None = None
        self._hidden: torch.Tensor | None = None

    @contextmanager
    def active(self) -> Iterator[LayerRunner]:
        """Take over the layers' forward within this context."""
        layers = self._model.layers
        own = [vars(layer).get("forward") for layer in layers]  # other libraries patch forwards as well
        for index, layer in enumerate(layers):
            layer.forward = self._replacement(index, layer.forward)
        try:
            yield self
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def run_layer(
        self,
        index: int,
        hidden: Activations,
        *,
        keep: bool = True,
        before: Callable[[TokenWindows], None] | None = None,
        after: Callable[[TokenWindows, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        """Run all batches through layer ``index``, which must be live, putting its outputs into ``hidden`` if ``keep``.

        ``before`` is called with each batch, ``after`` with the batch and the layer's input and output (B, T, d).
        Raises :class:`NumericalError` for every worker where any of them saw NaN or infinity.
        """
        check = Finite(self._model.device)
        for number, batch in enumerate(self._batches):
            if before is not None:
                before(batch)
            entering, leaving = self._run(index, batch, hidden.get(number))
            check.see(leaving)
            if after is not None:
                after(batch, entering, leaving)
            if keep:
                hidden.put(number, leaving)
        check.agree(self._workers, f"layer {index}: NaN or infinite activations in the layer's output")

    def head(self, number: int, hidden: Activations, step: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """The logits (B, n, vocabulary) of batch ``number`` whose last layer gave ``hidden``, and their positions.

        Of every ``step``-th position, a few at a time: the logits of a whole window can take more memory than a layer.
        """
        state = hidden.get(number)
        assert state is not None
        for start in range(0, state.shape[1], step * HEAD_POSITIONS):
            positions = slice(start, start + step * HEAD_POSITIONS, step)
            yield positions, self.logits(number, hidden, positions)

    @torch.no_grad()
    def logits(self, number: int, hidden: Activations, positions: slice) -> torch.Tensor:
        """The logits (B, n, vocabulary) of these ``positions``."""
        state = hidden.get(number)
        assert state is not None
        self._live, self._hidden = None, state.to(self._model.device)
        try:
            kept = torch.arange(state.shape[1], device=self._model.device)[positions]
            logits: torch.Tensor = self._forward(self._model.model, self._batches[number], logits_to_keep=kept).logits
            return logits
        finally:
            self._hidden = None

    @torch.no_grad()
    def _run(self, index: int, batch: TokenWindows, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The input and output of layer ``index``; ``hidden`` None means the embeddings of ``batch``."""
        self._live = index
        self._hidden = None if hidden is None else hidden.to(self._model.device, non_blocking=True)
        try:
            self._forward(self._model.base, batch)
        except _Stop as stop:
            assert self._hidden is not None
            return self._hidden, stop.output
        finally:
            self._live, self._hidden = None, None
        raise AssertionError("the live layer was never called")

    def _forward(self, module: nn.Module, batch: TokenWindows, **options: Any) -> Any:
        device = self._model.device
        mask = None if batch.mask is None else batch.mask.to(device, non_blocking=True)
        ids = batch.ids.to(device, non_blocking=True)
        return module(input_ids=ids, attention_mask=mask, use_cache=False, **options)

    def _replacement(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index != self._live:
                return hidden_states if self._hidden is None else self._hidden
            if self._hidden is None:
                self._hidden = hidden_states
            output = original(self._hidden, *args, **kwargs)
            raise _Stop(output[0] if isinstance(output, tuple) else output)

        return forward


@contextmanager
def ending_at(module: nn.Module) -> Iterator[None]:
    """Within this context a layer that runs ends where ``module``, a part of it, begins: its output is what enters."""

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Finite:
    """Whether all that was seen is finite, asked once at the end: asking would make a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def see(self, x: torch.Tensor) -> None:
        """Look at ``x``."""
        self._finite = self._finite & x.isfinite().all()

    def agree(self, workers: Workers, problem: str) -> None:
        """Raise :class:`NumericalError` with ``problem`` on every worker where any of them saw NaN or infinity."""
        failures = (~self._finite).long()
        workers.sum(failures)
        if failures:
            raise NumericalError(problem)


class Capture:
    """Keeps the latest input of a module, or the latest of its ``outputs``."""

    def __init__(self, module: nn.Module, *, outputs: bool = False) -> None:
        self._module = module
        self._outputs = outputs
        self._value: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor:
        """What was kept; something has to have run."""
        assert self._value is not None
        return self._value

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep what passes within this context."""

        def capture(_: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            found = output if self._outputs else args
            self._value = found[0] if isinstance(found, tuple) else found

        handle = self._module.register_forward_hook(capture)
        try:
            yield
        finally:
            handle.remove()


def real_rows(hidden: torch.Tensor, batch: TokenWindows) -> torch.Tensor:
    """The rows (N, d) of real tokens in (B, T, d)."""
    return hidden.flatten(0, 1) if batch.mask is None else hidden[batch.mask.to(hidden.device)]
