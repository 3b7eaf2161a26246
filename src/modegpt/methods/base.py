"""What a compression method is: for each module type a ladder of solutions, one for every rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from .. import costs
from ..budget import MODULES, LayerGeometry, Module, average_sparsity, head_geometry, layer_geometry
from ..decompositions import Elimination
from ..modeling import Family
from ..statistics import LayerStatistics, Statistic
from ..weights import Factors, HeadWeights, MLPWeights, QueryKeyWeights, ValueOutputWeights

if TYPE_CHECKING:
    from ..config import CompressionConfig
    from ..engine import Engine
    from ..layered import LayeredModel
    from ..results import Choice, LayerResult

Weights = TypeVar("Weights", MLPWeights, QueryKeyWeights, ValueOutputWeights, HeadWeights)

#: How the layers share the loss, and on which activations a layer is calibrated.
Allocation = Literal["uniform", "block-influence", "block-influence-split", "owl", "sensitivity", "own"]
#: Those that go by the layers alone, whatever the method.
SHARED_ALLOCATIONS: tuple[Allocation, ...] = (
    "uniform",
    "block-influence",
    "block-influence-split",
    "owl",
    "sensitivity",
)
Calibrated = Literal["sequential", "dense"]

#: Ranks at which the error is computed, evenly spread, where a method does not know all of them.
_PROBED = 8


@dataclass(frozen=True)
class Solution(Generic[Weights]):
    """One compressed module with the error of its compression on the calibration tokens."""

    weights: Weights
    error: float
    """The method's own objective: where not said otherwise, the squared Frobenius norm of the change of the module's
    output."""
    norm: float
    """The same of losing the module altogether, without a ridge."""
    kept: torch.Tensor | None = None
    """Kept channels, (m',) or of every group (G, d_qk), where the method selects; None where it mixes."""
    pairs: torch.Tensor | None = None
    """Their rotary pairs (G, r), see :func:`modegpt.decompositions.couples`; None without rotary embedding."""
    factors: tuple[Factors, ...] = ()
    """What takes the place of some of the maps in ``weights``."""
    spectrum: torch.Tensor | None = None
    """The scores or singular values of all units that the choice went by: (..., full), of every head that has its own.
    None where there was no choice, or it did not go by any."""

    @property
    def relative_error(self) -> float:
        """||Y - Y'||_F / ||Y||_F, zero for a module whose output is zero."""
        return (self.error / self.norm) ** 0.5 if self.norm > 0 else 0.0


@dataclass(frozen=True)
class Ladder(Generic[Weights]):
    """The solutions of one module at every rank from 1 to ``full``."""

    full: int
    at: Callable[[int], Solution[Weights]]
    errors: torch.Tensor | Callable[[], torch.Tensor] | None = None
    """The objective at ranks 0, 1, ..., ``full``, where a method knows it for all of them: (full + 1,) float64. At
    rank 0 it is :attr:`Solution.norm`."""
    finish: Callable[[Solution[Weights]], Solution[Weights]] | None = None
    """What is worth its time once the rank is chosen; changes the weights of a solution of ``at``, not their shapes."""
    elimination: Elimination | None = None
    """What all ranks follow from, where it is worth being kept, see :attr:`LayerStatistics.eliminations`."""

    def final(self, rank: int) -> Solution[Weights]:
        """The solution at ``rank``, finished."""
        return self.at(rank) if self.finish is None else self.finish(self.at(rank))

    def curve(self) -> torch.Tensor:
        """The objective at ranks 0, 1, ..., ``full``, never increasing; interpolated between some where not known."""
        known = self._probed if self.errors is None else self.errors
        errors = known if isinstance(known, torch.Tensor) else known()
        return errors.clamp_min(0).flip(0).cummax(0).values.flip(0)

    def _probed(self) -> torch.Tensor:
        ranks: list[int] = sorted({max(1, round(self.full * step / _PROBED)) for step in range(_PROBED)})
        known: list[Solution[Weights]] = [self.at(rank) for rank in ranks]
        points = [(0, known[0].norm), *((rank, one.error) for rank, one in zip(ranks, known, strict=True))]
        points.append((self.full, 0.0))
        curve = torch.zeros(self.full + 1, dtype=torch.float64)
        for (low, above), (high, below) in pairwise(points):
            share = torch.linspace(0, 1, high - low + 1, dtype=torch.float64)
            curve[low : high + 1] = above + (below - above) * share
        return curve


#: From a module's weights and the layer's statistics to its solutions.
Solver = Callable[[Any, LayerStatistics], Ladder[Any]]


class Method(ABC):
    """A compression method: a solver for each type of module it compresses. Subclasses are registered by name.

    They are :class:`ChannelMethod`, :class:`HeadMethod`, what removes whole layers, or have a :meth:`compress` of their
    own.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    modules: ClassVar[tuple[Module, ...]]
    """What of a layer it compresses."""
    allocation: ClassVar[Allocation] = "uniform"
    calibrated: ClassVar[Calibrated] = "dense"
    """What it is used with where nothing else is asked for."""
    default_ridge: ClassVar[float] = 1e-4
    """Where no ridge is given, of those methods that have one."""
    allocations: ClassVar[tuple[Allocation, ...]] = SHARED_ALLOCATIONS
    """What it can be used with; ``own`` is for an :class:`OwnAllocation`."""
    statistics: ClassVar[frozenset[Statistic]]
    """What the solvers read."""
    tied: ClassVar[bool] = False
    """Whether all heads can be made to keep the same rotary pairs, see :mod:`modegpt.tied`."""
    narrows: ClassVar[bool] = True
    """Whether its ranks are widths of the layer's own maps."""
    one_pass: ClassVar[bool] = False
    """Whether one pass over the dense layers is all that choosing and compressing take together."""

    @classmethod
    def from_config(cls, config: CompressionConfig) -> Self:
        """The method with those of the run's options that concern it: none where not said otherwise."""
        return cls()

    def following(self, choice: Choice) -> Self:
        """The method with what ``choice`` decides besides ranks: nothing where not said otherwise."""
        return self

    @abstractmethod
    def solvers(self) -> Mapping[Module, Solver]:
        """What solves each of :attr:`modules`, but whole layers, of which there is nothing to solve.

        Nothing where :meth:`compress` is the method's own.
        """

    def geometry(self, layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
        """The parameters of a stock decoder ``layer`` (which may be on the meta device) by the method's modules."""
        return layer_geometry(layer, config, family)

    def solve_flops(self, module: Module, sizes: costs.Sizes, kept: float) -> float:
        """Operations to solve one ``module`` (or one expert) of a layer, keeping the share ``kept``."""
        return costs.solve_flops(module, sizes, kept)

    def kept_flops(self, module: Module, sizes: costs.Sizes) -> float:
        """Those of :meth:`solve_flops` whose result is kept with the statistics, see :attr:`Ladder.elimination`."""
        return 0.0

    def finish_flops(self, sizes: costs.Sizes, tokens: int, kept: float) -> float:
        """Operations on the rows of a layer that was calibrated on so many ``tokens``, see :meth:`Ladder.final`."""
        return 0.0

    def solve_bytes(self, sizes: costs.Sizes, tokens: int, kept: float) -> int:
        """What solving a layer calibrated on so many ``tokens`` holds at once besides the statistics and the layer."""
        return costs.solve_bytes(sizes, tokens, kept)

    def check(
        self, model: PreTrainedModel, geometry: Sequence[LayerGeometry], config: CompressionConfig, ratio: float
    ) -> None:
        """Refuse, before any work, what cannot be done with ``model``, whose weights may be on the meta device."""
        chosen = [geometry[index] for index in config.chosen_layers(len(geometry))]
        average_sparsity(chosen, config.modules, ratio, config.alignment, config.base(geometry))

    def removal_passes(self, layers: int, ratio: float) -> tuple[float, float] | None:
        """What the own allocation runs of the probe windows: layers, and heads; None for one pass of all windows."""
        return None

    def compress(
        self, engine: Engine, choice: Choice, *, sequential: bool, seed: int
    ) -> tuple[LayeredModel, list[LayerResult]]:
        """The compressed model and what happened to every layer; in :meth:`Engine.active`.

        Where the modules of one layer are solved after those of the other, :meth:`solvers` are all that this takes.
        """
        return engine.by_layer(self, choice, sequential=sequential, seed=seed)


def rising(errors: torch.Tensor, norm: float) -> torch.Tensor:
    """J at ranks 0, 1, ..., full, of ``errors`` after 0, 1, ..., full - 1 units went; all of them cost ``norm``."""
    return torch.cat((errors, errors.new_tensor([norm]))).flip(0)


class ChannelMethod(Method):
    """A method that makes the MLP, queries with keys, and values with outputs narrower."""

    modules = MODULES

    def solvers(self) -> Mapping[Module, Solver]:
        """One for each."""
        return {"mlp": self.mlp, "qk": self.query_key, "vo": self.value_output}

    @abstractmethod
    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """A rank is a number of intermediate channels."""

    @abstractmethod
    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics) -> Ladder[QueryKeyWeights]:
        """A rank is a number of rotary pairs per key-value head, or of channels where none rotate."""

    @abstractmethod
    def value_output(self, weights: ValueOutputWeights, statistics: LayerStatistics) -> Ladder[ValueOutputWeights]:
        """A rank is the width of the values of every head."""


class HeadMethod(Method):
    """A method that makes the MLP narrower and removes whole key-value heads."""

    modules = ("mlp", "heads")

    def geometry(self, layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
        """Channels and heads."""
        return head_geometry(layer, config, family)

    def solvers(self) -> Mapping[Module, Solver]:
        """One for each."""
        return {"mlp": self.mlp, "heads": self.heads}

    @abstractmethod
    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """A rank is a number of intermediate channels."""

    @abstractmethod
    def heads(self, weights: HeadWeights, statistics: LayerStatistics) -> Ladder[HeadWeights]:
        """A rank is a number of key-value heads, each with its query heads."""


class Ridged(Method):
    """A method of which the ridge is the only option: lambda in units of the mean activation energy."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    @classmethod
    def from_config(cls, config: CompressionConfig) -> Self:
        """With the ridge that ``config`` gives."""
        return cls(config.ridge)


class OwnAllocation(ABC):
    """What a method has besides that decides by itself how much every layer keeps."""

    @abstractmethod
    def choose(self, engine: Engine, config: CompressionConfig, ratio: float) -> Choice:
        """What every layer keeps when ``ratio`` goes; in :meth:`Engine.active`."""
