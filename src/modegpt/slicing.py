"""The residual stream of a stock model in its principal directions, of which only the leading ones stay.

An orthogonal change of basis of the stream changes nothing that an RMS norm without weight or a linear map behind it
does, if the maps follow (Ashkboos et al., arXiv 2401.15024). So at every point of the stream, the inputs of every
attention and of every MLP, the maps that read it become Q_w^T diag(g) W, g the weight of the norm before them, those
that write it W Q'_w, and what goes past a part Q_w^T Q'_w: an adapter. Q_w are the w leading eigenvectors of the sum of
x^T x over the calibration tokens.

The sliced model computes what the dense one would with its stream projected at every point, x Q_w Q_w^T. That is how it
is calibrated here: hidden states stay in the dense basis and the stock layers run, so that a point's directions are
not needed before all tokens have come there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from .activations import Activations, DiskActivations
from .budget import LayerGeometry
from .decompositions import PrincipalDirections, principal_directions
from .errors import NumericalError
from .layered import LayeredModel
from .layout import HeadShape
from .likeness import forward_code
from .modeling import NORMS, Family
from .results import Choice, LayerResult, ModuleResult, spectrum_of
from .runner import Finite, ending_at, real_rows
from .statistics import GramSum
from .weights import (
    cast_like,
    complete,
    mlp_tensors,
    query_key_tensors,
    read_mlp,
    read_query_key,
    read_value_output,
    value_output_tensors,
)

if TYPE_CHECKING:
    from .engine import Engine

Tensors = dict[str, torch.Tensor]
#: Embeddings that are turned at once.
_ROWS = 8192
#: Layers whose forward :class:`modegpt.modeling.modeling_slices.SlicedLayer` has.
_LAYERS = (LlamaDecoderLayer, Phi3DecoderLayer)
#: RMS norms, and how much more their weight is than the stored one.
_NORMS = ((LlamaRMSNorm, 0.0), (HeliumRMSNorm, 0.0), (GemmaRMSNorm, 1.0))


def sliceable(layer: nn.Module) -> bool:
    """Whether a stock layer is x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms."""
    known = {forward_code(cls) for cls in _LAYERS}
    return forward_code(type(layer)) in known and all(_offset(getattr(layer, name)) is not None for name in NORMS)


def _offset(norm: Any) -> float | None:
    """How much more a stock RMS norm's weight is than the stored one; None for other norms."""
    code = forward_code(type(norm))
    plain = getattr(norm, "bias", None) is None
    return next((offset for cls, offset in _NORMS if plain and code == forward_code(cls)), None)


def sliced_tensors(
    layer: nn.Module, family: Family, shape: HeadShape, bases: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> Tensors:
    """A stock layer's tensors under the names of the compressed layer, in float64.

    ``bases`` are Q_w (d, w) of what its attention reads, of what its MLP reads and of what the next layer does; the
    identity leaves a point in the dense basis.
    """
    entering, middle, leaving = bases
    gains = [_gain(getattr(layer, name)) for name in NORMS]
    into_attention, into_mlp = entering.T * gains[0], middle.T * gains[1]
    query_key, value_output = read_query_key(layer, family, shape), read_value_output(layer, family, shape)
    query_key = replace(query_key, query=into_attention @ query_key.query, key=into_attention @ query_key.key)
    value_output = replace(
        value_output,
        value=into_attention @ value_output.value,
        output=value_output.output @ middle,
        output_bias=None if value_output.output_bias is None else value_output.output_bias @ middle,
    )
    mlp = read_mlp(layer, family)
    mlp = replace(
        mlp,
        inputs=tuple(into_mlp @ weight.double() for weight in mlp.inputs),
        output=mlp.output @ leaving,
        output_bias=None if mlp.output_bias is None else mlp.output_bias @ leaving,
    )
    return {
        **query_key_tensors(*query_key.compact(), family),
        **value_output_tensors(value_output, family),
        **mlp_tensors(mlp, family),
        "attention_adapter.weight": middle.T @ entering,
        "mlp_adapter.weight": leaving.T @ middle,
    }


def _gain(norm: Any) -> torch.Tensor:
    """The g of a stock RMS norm x / rms(x) g, (d,) float64."""
    offset = _offset(norm)
    assert offset is not None
    weight: torch.Tensor = norm.weight.detach().double()
    return weight + offset


class _Projected(Activations):
    """The states of another, each projected on its way out; what is put goes to ``target``."""

    def __init__(self, source: Activations, projection: torch.Tensor | None, target: Activations) -> None:
        self._source, self._projection, self._target = source, projection, target

    def get(self, number: int) -> torch.Tensor | None:
        state = self._source.get(number)
        assert state is not None
        if self._projection is None:
            return state
        return (state.to(self._projection) @ self._projection).to(state.dtype)

    def put(self, number: int, state: torch.Tensor) -> None:
        self._target.put(number, state)


class Slicer:
    """One pass over the layers: from each point to the next, and a layer is written when the point behind it is known.

    The points are the inputs of the layers and of the norms before their MLPs. What the last layer puts out stays in
    the dense basis, for the final norm and the head. An interrupted run takes the same way through finished layers, or
    from the hidden states that it left on disk, and finds the same directions.
    """

    def __init__(self, engine: Engine, geometry: Sequence[LayerGeometry], choice: Choice, *, sequential: bool) -> None:
        """To the one width that ``choice`` has for all layers; without ``sequential`` nothing is projected."""
        (self._width,) = {rank["stream"] for rank in choice.ranks}
        self._engine, self._choice, self._sequential = engine, choice, sequential
        self._layers, self._family = engine.dense.layers, engine.family.description
        self._thin = engine.skeleton(geometry, choice.ranks)
        self._results = dict(engine.finished())
        self._missing = [index for index in range(len(self._layers)) if index not in self._results]
        self._hidden = engine.activations("compress", engine.batches)
        # On disk the inputs of a layer stay until it is written, for a run that goes on.
        on_disk = isinstance(self._hidden, DiskActivations)
        self._middle = engine.activations("middle", engine.batches) if on_disk else self._hidden

    def run(self) -> tuple[LayeredModel, list[LayerResult]]:
        """The sliced model, and what happened to every layer."""
        engine, count = self._engine, len(self._layers)
        start = engine.restore(self._hidden, self._missing[0]) if self._missing else 0
        with engine.progress.phase("compress", count), engine.runner.active():
            here = self._embed(keep=bool(self._missing) and not start)
            if start:
                here = self._measured()
            for index in range(count):
                if self._missing and start <= index <= self._missing[-1]:
                    here = self._through(index, here)
                engine.progress.advance()
        self._hidden.remove()
        return self._thin, [self._results[index] for index in range(count)]

    def _embed(self, *, keep: bool) -> PrincipalDirections:
        """The directions of what enters the first layer, and the embeddings in them; the states stay if ``keep``."""
        engine, gram = self._engine, self._gram()
        engine.progress.detail("embeddings")
        hidden = self._hidden if keep else Activations(len(engine.batches))
        with ending_at(self._layers[0].get_submodule(NORMS[0])):
            engine.runner.run_layer(0, hidden, keep=keep, after=lambda batch, _, x: gram.add(real_rows(x, batch)))
        if keep:
            hidden.complete(0)
        found = self._directions(gram)
        dense: Any = engine.dense.model
        thin: Any = self._thin.model
        weight, leading = dense.get_input_embeddings().weight.detach(), self._leading(found)
        narrow = [(rows.double() @ leading).to(weight.dtype) for rows in weight.split(_ROWS)]
        thin.get_input_embeddings().weight = nn.Parameter(torch.cat(narrow))
        head = dense.get_output_embeddings().weight.detach()
        if head.data_ptr() == weight.data_ptr():  # tied no longer
            thin.get_output_embeddings().weight = nn.Parameter(head if self._thin.streamed else head.clone())
        return found

    def _through(self, index: int, here: PrincipalDirections) -> PrincipalDirections:
        """From ``here``, the directions of the states, past layer ``index``, which is written if it is missing."""
        engine, more = self._engine, index < self._missing[-1]
        with engine.dense.live(index) as layer:
            engine.dense.prefetch(index + 1)
            engine.progress.detail("calibrating")
            middle = self._past_attention(index, layer, here)
            leaving = self._past_mlp(index, layer, middle, keep=more) if index + 1 < len(self._layers) else None
            if index not in self._results:
                self._write(index, layer, (here, middle, leaving))
        if more:
            self._hidden.complete(index + 1)
        if self._middle is not self._hidden:
            self._middle.remove()
        return middle if leaving is None else leaving

    def _past_attention(self, index: int, layer: nn.Module, here: PrincipalDirections) -> PrincipalDirections:
        """Take the states to the input of the norm before the MLP; its directions."""
        gram, states = self._gram(), _Projected(self._hidden, self._projection(here), self._middle)
        with ending_at(layer.get_submodule(NORMS[1])):
            self._engine.runner.run_layer(index, states, after=lambda batch, _, x: gram.add(real_rows(x, batch)))
        self._middle.complete(index)
        return self._directions(gram)

    @torch.no_grad()
    def _past_mlp(self, index: int, layer: nn.Module, here: PrincipalDirections, *, keep: bool) -> PrincipalDirections:
        """Take the states to what the layer puts out; its directions."""
        engine, gram = self._engine, self._gram()
        states = _Projected(self._middle, self._projection(here), self._hidden)
        parts: Any = layer
        check = Finite(engine.dense.device)
        for number, batch in enumerate(engine.batches):
            state = states.get(number)
            assert state is not None
            state = state.to(engine.dense.device)
            leaving = state + parts.mlp(getattr(layer, NORMS[1])(state))
            check.see(leaving)
            gram.add(real_rows(leaving, batch))
            if keep:
                states.put(number, leaving)
        check.agree(engine.workers, f"layer {index}: NaN or infinite activations in the layer's output")
        return self._directions(gram)

    def _write(
        self,
        index: int,
        layer: nn.Module,
        points: tuple[PrincipalDirections, PrincipalDirections, PrincipalDirections | None],
    ) -> None:
        """Slice a layer between three ``points`` and keep it; without the last one it writes the dense basis."""
        engine, own, (entering, middle, leaving) = self._engine, None, points
        engine.progress.detail("slicing")
        if engine.workers.first:
            last = torch.eye(len(middle.basis), dtype=torch.float64, device=middle.basis.device)
            bases = self._leading(entering), self._leading(middle), last if leaving is None else self._leading(leaving)
            shape = HeadShape.of(layer, engine.dense.model.config, self._family)
            own = cast_like(sliced_tensors(layer, self._family, shape, bases), layer)
            own = complete(self._thin.layers[index], own, like=layer)
        state = engine.workers.tensors(own, 0, engine.dense.device)
        lost = (entering.lost(self._width) + middle.lost(self._width)) / 2
        spectrum = spectrum_of(entering.energies.sqrt())
        stream = ModuleResult(self._width, len(middle.basis), lost**0.5, None, spectrum=spectrum)
        self._results[index] = LayerResult(self._choice.sparsity[index], {"stream": stream})
        engine.keep_layer(index, self._thin, state, self._results[index])

    def _gram(self) -> GramSum:
        channels = self._layers[0].get_parameter(f"{NORMS[0]}.weight").numel()
        return GramSum(torch.zeros(channels, channels, dtype=torch.float64, device=self._engine.dense.device))

    def _measured(self) -> PrincipalDirections:
        """The directions of the states as they are."""
        gram = self._gram()
        for number, batch in enumerate(self._engine.batches):
            state = self._hidden.get(number)
            assert state is not None
            gram.add(real_rows(state.to(self._engine.dense.device), batch))
        return self._directions(gram)

    def _directions(self, gram: GramSum) -> PrincipalDirections:
        """Those of all workers' tokens, the same on every worker."""
        workers, total = self._engine.workers, gram.total(self._engine.workers)
        if not bool(total.isfinite().all()):
            raise NumericalError("NaN or infinite activations in the residual stream")
        if not workers.first:
            return PrincipalDirections(**workers.tensors(None, 0, total.device))
        own = {name: tensor.contiguous() for name, tensor in vars(principal_directions(total)).items()}
        return PrincipalDirections(**workers.tensors(own, 0, total.device))

    def _leading(self, directions: PrincipalDirections) -> torch.Tensor:
        return directions.basis[:, : self._width]

    def _projection(self, directions: PrincipalDirections) -> torch.Tensor | None:
        """Q_w Q_w^T, which gives the states as the sliced model has them, in the dense basis; None to leave them."""
        if not self._sequential:
            return None
        leading, double = self._leading(directions), self._engine.dense.model.dtype == torch.float64
        return (leading @ leading.T).to(torch.float64 if double else torch.float32)
