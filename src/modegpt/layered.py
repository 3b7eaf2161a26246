"""A causal language model whose decoder layers' weights are there always, or only while they are used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import base_model, decoder_layers, family_of
from .modeling import CompressedFamily

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

LayerReader = Callable[[int], Mapping[str, torch.Tensor]]


class LayeredModel:
    """A dense or compressed model, and access to one decoder layer at a time.

    Without ``read`` the layers are those of ``model``, as in any model. With it they are on the meta device, and
    ``read(k)`` brings the tensors of layer k by their names in that layer, on the device where it is to run;
    ``ahead`` allows it to be called in a thread of its own. ``sources`` are the numbers of the dense model's layers
    that the layers were made of; all of them by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: CompressedFamily,
        read: LayerReader | None = None,
        *,
        ahead: bool = True,
        sources: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.family = family
        self.base = base_model(model)
        self.layers = decoder_layers(model, family)
        self.sources = list(range(len(self.layers)) if sources is None else sources)
        self._read = read
        self._background = ThreadPoolExecutor(max_workers=1) if read is not None and ahead else None
        self._coming: dict[int, Future[Mapping[str, torch.Tensor]]] = {}

    @property
    def streamed(self) -> bool:
        """Whether layers are read when needed."""
        return self._read is not None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    @contextmanager
    def live(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index`` with its weights, which are gone afterwards if they had to be read."""
        layer = self.layers[index]
        if self._read is None:
            yield layer
            return
        coming = self._coming.pop(index, None)
        tensors = self._read(index) if coming is None else coming.result()
        try:
            place(layer, tensors)
            del tensors
            yield layer
        finally:
            evict(layer)
            _give_back_memory()

    def prefetch(self, index: int) -> None:
        """Begin to read layer ``index`` in the background, to be used by the next :meth:`live` of it."""
        if self._background is not None and index < len(self.layers) and index not in self._coming:
            assert self._read is not None
            self._coming[index] = self._background.submit(self._read, index)

    def bring(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have the next :meth:`live` of layer ``index`` use ``tensors``, which need not be read then."""
        self._coming = {index: Future()}
        self._coming[index].set_result(tensors)


def _give_back_memory() -> None:
    """Have the C library (glibc) return freed memory to the system: by itself it keeps some for each thread."""
    if _TRIM is not None:
        _TRIM(0)


def place(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a layer on the meta device its ``tensors``."""
    layer.load_state_dict(dict(tensors), assign=True)


def evict(layer: nn.Module) -> None:
    """Put a layer's weights (and persistent buffers) back on the meta device."""
    for name, tensor in layer.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        empty = tensor.detach().to("meta")
        setattr(
            layer.get_submodule(owner),
            leaf,
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty,
        )


def resident(model: PreTrainedModel) -> LayeredModel:
    """A stock model that is in memory as a whole."""
    return LayeredModel(model, family_of(model))
