"""The residual stream loses its smallest principal directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import costs
from ..budget import LayerGeometry, Module, ModuleGeometry, kept_parameters, layer_geometry, ranks_of
from ..errors import InvalidRequest
from ..layout import expert_count, linear, map_shapes
from ..modeling import Family
from ..results import Choice
from ..slicing import Slicer, sliceable
from .base import Method, OwnAllocation, Solver

if TYPE_CHECKING:
    from ..config import CompressionConfig
    from ..engine import Engine
    from ..layered import LayeredModel
    from ..results import LayerResult


@dataclass(frozen=True)
class StreamGeometry(ModuleGeometry):
    """What of a layer is as wide as the stream: of ``full`` channels, and of w directions at rank w.

    Every direction has a row in each map that reads it and a column, with the bias, in each that writes it; and two
    adapters of w x w take the stream past attention and past the MLP. What the ``last`` layer's MLP writes, and with
    it the second adapter, keeps all channels.
    """

    read: int = 0
    """Outputs of the maps that read the stream."""
    between: int = 0
    """Inputs of attention's output map, and its bias."""
    leaving: int = 0
    """The same of the MLP's."""
    last: bool = False

    def parameters_at(self, rank: int) -> int:
        """Parameters at width ``rank``, adapters included: at ``full`` more than the dense layer has."""
        out = self.full if self.last else rank
        return rank * (self.read + self.between + rank) + out * (self.leaving + rank)


class SliceGPT(Method, OwnAllocation):
    """x -> x Q_w: between any two parts the stream keeps the w directions of largest energy.

    Ashkboos et al., arXiv 2401.15024; see :mod:`modegpt.slicing`. One width for all layers, that which brings the
    decoder blocks nearest to the ratio with the adapters counted, so there is nothing to allocate.
    """

    name = "slicegpt"
    summary = "the residual stream keeps its principal directions, in a basis of its own at every layer, with adapters"
    modules = ("stream",)
    allocation = "own"
    calibrated = "sequential"
    allocations = ("own",)
    statistics = frozenset({"attention_input", "mlp_input"})
    one_pass = True

    def solvers(self) -> Mapping[Module, Solver]:
        """Nothing in a layer is solved by itself."""
        return {}

    def geometry(self, layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
        """The width of the stream; raises :class:`InvalidRequest` for layers that cannot be sliced."""
        if expert_count(layer, family) or not sliceable(layer):
            raise InvalidRequest(
                f"--method {self.name} needs layers x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms and "
                "no experts, as Llama, Mistral, Ministral, Qwen2, Qwen3, Phi-3 and Gemma 1 have; "
                f"a {type(layer).__name__} is not one: use greedy or modegpt"
            )
        dense, maps = layer_geometry(layer, config, family), map_shapes(layer, config, family)
        value_bias = linear(layer, f"{family.attention}.{family.input_maps[-1]}")[1] is not None
        output_bias = value_bias or linear(layer, f"{family.attention}.{family.output}")[1] is not None
        channels = linear(layer, family.mlp_output)[0].shape[1]
        module = StreamGeometry(
            full=channels,
            unit_parameters=1,
            read=sum(one.outputs for one in (*maps["qk"], maps["vo"][0], *maps["mlp"][:-1])),
            between=maps["vo"][1].inputs + output_bias,
            leaving=maps["mlp"][-1].inputs + (linear(layer, family.mlp_output)[1] is not None),
            last=layer.get_submodule(family.attention).layer_idx == config.num_hidden_layers - 1,
        )
        module = replace(module, unit_parameters=module.parameters // channels)
        extra = dense.extra + 2 * channels**2 - 2 * channels  # adapters, and norms whose weights the maps take up
        return LayerGeometry({"stream": module}, dense.parameters, extra, dense.dense)

    def check(
        self, model: PreTrainedModel, geometry: Sequence[LayerGeometry], config: CompressionConfig, ratio: float
    ) -> None:
        """Refuse a ratio that no width comes near, and models whose stream enters elsewhere than in the layers."""
        fitting_width(geometry, ratio, config.alignment)
        known = {"embed_tokens.weight", "norm.weight"}
        base = model.base_model
        outside = {name for name, _ in base.named_parameters() if not name.startswith("layers.")}
        if outside - known:
            raise InvalidRequest(
                f"--method {self.name}: {min(outside - known)} of MODEL is none of embeddings, layers and a last norm, "
                "which is all that it knows; use greedy or modegpt"
            )

    def choose(self, engine: Engine, config: CompressionConfig, ratio: float) -> Choice:
        """The same width everywhere."""
        geometry = engine.geometry(self)
        width = fitting_width(geometry, ratio, config.alignment)
        ranks = [ranks_of({"stream": width}) for _ in geometry]
        return Choice(ranks, [{"stream": 1 - width / layer.modules["stream"].full} for layer in geometry])

    def compress(
        self, engine: Engine, choice: Choice, *, sequential: bool, seed: int
    ) -> tuple[LayeredModel, list[LayerResult]]:
        """See :class:`modegpt.slicing.Slicer`."""
        return Slicer(engine, engine.geometry(self), choice, sequential=sequential).run()

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """Two eigendecompositions, and every map in its new bases."""
        return 2 * costs.eigen_flops(sizes.hidden) + 2.0 * kept * sizes.hidden * costs.layer_parameters(sizes)

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """An eigendecomposition, the bases of three points and their projections, or the layer in float64, twice."""
        return 8 * max(9 * sizes.hidden**2, 3 * sizes.hidden**2 + 2 * costs.layer_parameters(sizes))


def fitting_width(geometry: Sequence[LayerGeometry], ratio: float, align: int) -> int:
    """The multiple of ``align`` at which what the layers lose is nearest to ``ratio``.

    Raises :class:`InvalidRequest` where it is out of reach.
    """
    dense, full = sum(layer.parameters for layer in geometry), geometry[0].modules["stream"].full

    def removed(width: int) -> float:
        return 1 - kept_parameters(geometry, [ranks_of({"stream": width})] * len(geometry)) / dense

    widths = range(align, full, align)
    losses = {width: loss for width in widths if (loss := removed(width)) > 0}
    if not losses or ratio > max(losses.values()):
        most = max(losses.values(), default=0.0)
        raise InvalidRequest(
            f"--ratio {ratio:g} is out of reach with --method slicegpt and --align {align}: at most {most:.3g} of the "
            "decoder blocks' parameters can go, adapters counted; use less, or a finer alignment"
        )
    return min(losses, key=lambda width: (abs(losses[width] - ratio), -width))
