"""Two thin maps in place of each linear map: the baselines that truncate singular value decompositions.

See :mod:`modegpt.decompositions.low_rank`. A module's rank r is of ``full``, the break-even rank of its largest map;
every map gets the same share of its own. At ``full`` the module is as it was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from typing_extensions import Self

from ..budget import LayerGeometry, LayerRanks, Module, ModuleGeometry, layer_geometry
from ..costs import Sizes, truncation_bytes, truncation_flops
from ..decompositions import LowRank, activation_scales, break_even, low_rank, whitening
from ..errors import InvalidRequest
from ..layout import MapShape, expert_count, map_paths, map_shapes
from ..modeling import Family, LayerSizes, stack_name
from ..statistics import LayerStatistics, Statistic
from ..weights import Factors, MLPWeights, QueryKeyWeights, ValueOutputWeights
from .base import ChannelMethod, Ladder, Solution

if TYPE_CHECKING:
    from ..config import CompressionConfig

Weights = TypeVar("Weights", MLPWeights, QueryKeyWeights, ValueOutputWeights)

#: What enters the maps of a module: all but the last, and the last.
_INPUTS: Mapping[Module, tuple[Statistic, Statistic]] = {
    "mlp": ("mlp_input", "mlp"),
    "qk": ("attention_input", "attention_input"),
    "vo": ("attention_input", "head_outputs"),
}
#: The sums of squares alone of the same.
_MOMENTS: Mapping[Statistic, Statistic] = {
    "mlp_input": "mlp_input_moments",
    "mlp": "mlp_moments",
    "attention_input": "attention_input_moments",
    "head_outputs": "head_outputs_moments",
}


@dataclass(frozen=True)
class Stack:
    """Maps of a module, by their places in it, that have one input and, where it is not one map, one first factor."""

    maps: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def limit(self) -> int:
        """The largest rank at which the factors are not larger than the maps."""
        return break_even(self.inputs, self.outputs)


@dataclass(frozen=True)
class FactorGeometry(ModuleGeometry):
    """A module of stacks: at ``full`` they are whole, below that factors with their share of the break-even rank."""

    stacks: tuple[Stack, ...] = ()
    align: int = 1

    @classmethod
    def of(cls, stacks: Sequence[Stack], align: int) -> FactorGeometry:
        """That of ``stacks``, whose ranks are rounded to multiples of ``align`` where they are not smaller."""
        full = max([1, *(stack.limit for stack in stacks)])
        parameters = sum(stack.inputs * stack.outputs for stack in stacks)
        return cls(full, max(1, round(parameters / full)), stacks=tuple(stacks), align=align)

    def ranks(self, rank: int) -> list[int | None]:
        """The rank of every stack at ``rank`` of the module; None for those that stay whole."""
        return [None if rank == self.full or not stack.limit else self._rank(stack, rank) for stack in self.stacks]

    def _rank(self, stack: Stack, rank: int) -> int:
        align = min(self.align, stack.limit)
        wanted = round(rank * stack.limit / (self.full * align)) * align
        return min(max(wanted, align), stack.limit // align * align)

    def parameters_at(self, rank: int) -> int:
        """Parameters at ``rank``."""
        return sum(
            stack.inputs * stack.outputs if own is None else own * (stack.inputs + stack.outputs)
            for stack, own in zip(self.stacks, self.ranks(rank), strict=True)
        )

    def largest_step(self, align: int) -> int:
        """What the next allowed rank has more at most: its maps' ranks are rounded."""
        step = self.step(align)
        counts = [self.parameters_at(rank) for rank in [*range(step, self.full, step), self.full]]
        return max((after - before for before, after in pairwise(counts)), default=0)


@dataclass(frozen=True)
class FactorisedLayer(LayerGeometry):
    """A layer of stacks; its widths stay the dense ones."""

    family: Family = field(kw_only=True)

    def sizes(self, rank: LayerRanks) -> LayerSizes:
        """The dense widths, and the ranks of what is factorised at these ranks."""
        ranks = {}
        for module, shape in self.modules.items():
            assert isinstance(shape, FactorGeometry)
            for stack, own in zip(shape.stacks, shape.ranks(rank[module]), strict=True):
                if own is not None:
                    paths = map_paths(self.family, module)
                    ranks[stack_name([paths[place] for place in stack.maps])] = own
        assert self.dense is not None
        return replace(self.dense, factor_ranks=ranks)


class Factorised(ChannelMethod):
    """Truncated decompositions of the maps weighted by a root of some matrix, which is what subclasses differ in."""

    narrows = False
    whitened: ClassVar[bool] = False
    """Whether the root is a whole matrix."""

    def __init__(self, ridge: float = 1e-4, align: int = 1) -> None:
        self.ridge = ridge
        self.align = align

    @classmethod
    def from_config(cls, config: CompressionConfig) -> Self:
        """With the ridge and alignment that ``config`` gives."""
        return cls(config.ridge, config.alignment)

    @abstractmethod
    def root(self, statistics: LayerStatistics, name: Statistic) -> torch.Tensor | None:
        """R of the maps whose inputs the Gram matrix ``name`` would be of, as :func:`low_rank` takes it."""

    def stacks(self, module: Module, shapes: Sequence[MapShape]) -> list[Stack]:
        """What of ``module``, whose maps have these ``shapes``, is factorised, and what of it together."""
        return [Stack((place,), shape.inputs, shape.outputs) for place, shape in enumerate(shapes)]

    def geometry(self, layer: nn.Module, config: PreTrainedConfig, family: Family) -> LayerGeometry:
        """Modules of factors; raises :class:`InvalidRequest` for layers with experts."""
        if expert_count(layer, family):
            raise InvalidRequest(
                f"--method {self.name} does not factorise experts, which MODEL has; use greedy or modegpt"
            )
        dense = layer_geometry(layer, config, family)
        modules: dict[Module, ModuleGeometry] = {
            module: FactorGeometry.of(self.stacks(module, shapes), self.align)
            for module, shapes in map_shapes(layer, config, family).items()
        }
        return FactorisedLayer(modules, dense.parameters, dense.extra, dense.dense, family=family)

    def mlp(self, weights: MLPWeights, statistics: LayerStatistics) -> Ladder[MLPWeights]:
        """Gate, up and down."""
        return self._ladder("mlp", weights, statistics, parts=weights.parts)

    def query_key(self, weights: QueryKeyWeights, statistics: LayerStatistics) -> Ladder[QueryKeyWeights]:
        """Queries and keys, each of all heads."""
        ordered, pairs = weights.compact()
        return self._ladder("qk", ordered, statistics, pairs=pairs)

    def value_output(self, weights: ValueOutputWeights, statistics: LayerStatistics) -> Ladder[ValueOutputWeights]:
        """Values and attention output, each of all heads."""
        return self._ladder("vo", weights, statistics)

    def _ladder(
        self,
        module: Module,
        weights: Weights,
        statistics: LayerStatistics,
        *,
        parts: int = 1,
        pairs: torch.Tensor | None = None,
    ) -> Ladder[Weights]:
        """The objective is the mean over the stacks of J / J(0), so that none counts more for its outputs' scale."""
        maps: tuple[torch.Tensor, ...] = weights.maps()
        held = [*[parts] * (len(maps) - 1), 1]
        shapes = [MapShape(len(weight), weight.shape[1], count) for weight, count in zip(maps, held, strict=True)]
        geometry: FactorGeometry = FactorGeometry.of(self.stacks(module, shapes), self.align)

        @cache  # not before it is needed: a module that stays whole is not decomposed
        def found() -> list[LowRank]:
            names = [_INPUTS[module][stack.maps[0] == len(maps) - 1] for stack in geometry.stacks]
            roots = {name: self.root(statistics, name) for name in dict.fromkeys(names)}
            return [
                low_rank([maps[place] for place in stack.maps], stack.limit, roots[name])
                for stack, name in zip(geometry.stacks, names, strict=True)
            ]

        def error(rank: int) -> float:
            ranks = geometry.ranks(rank)
            if not any(ranks):
                return 0.0
            shares = (one.share(own) for one, own in zip(found(), ranks, strict=True) if own is not None)
            return sum(shares) / len(ranks)

        def at(rank: int) -> Solution[Weights]:
            ranks = geometry.ranks(rank)
            factors = [] if not any(ranks) else list(zip(geometry.stacks, found(), ranks, strict=True))
            thin = tuple(Factors(stack.maps, *one.at(own)) for stack, one, own in factors if own is not None)
            return Solution(weights, error(rank), 1.0, pairs=pairs, factors=thin)

        def errors() -> torch.Tensor:
            return torch.tensor([1.0, *map(error, range(1, geometry.full + 1))], dtype=torch.float64)

        return Ladder(geometry.full, at, errors)

    def solve_flops(self, module: Module, sizes: Sizes, kept: float) -> float:
        """Decompositions of all maps of ``module``, whatever is kept."""
        return truncation_flops(module, sizes, whitened=self.whitened)

    def solve_bytes(self, sizes: Sizes, tokens: int, kept: float) -> int:
        """One decomposition, and the factors of all maps."""
        return truncation_bytes(sizes, whitened=self.whitened)


class SVD(Factorised):
    """The weights' own singular value decompositions; no data."""

    name = "svd"
    summary = "every linear map as two thin ones, by truncating its singular value decomposition, without data"
    statistics = frozenset[Statistic]()

    def root(self, statistics: LayerStatistics, name: Statistic) -> None:
        """The identity."""


class ASVD(Factorised):
    """ASVD (arXiv 2312.05821): weights scaled by how large the activations are that they meet."""

    name = "asvd"
    summary = "the same of weights scaled by the size of their inputs (ASVD)"
    statistics = frozenset(_MOMENTS.values())

    def root(self, statistics: LayerStatistics, name: Statistic) -> torch.Tensor:
        """:func:`activation_scales`."""
        return activation_scales(statistics[_MOMENTS[name]][1], self.ridge)


class SVDLLM(Factorised):
    """SVD-LLM (arXiv 2403.07378): the best factors for the inputs that really occur."""

    name = "svd-llm"
    summary = "the same of whitened weights, which changes outputs least (SVD-LLM)"
    statistics = frozenset(_MOMENTS)
    whitened = True

    def root(self, statistics: LayerStatistics, name: Statistic) -> torch.Tensor:
        """:func:`whitening`."""
        return whitening(statistics[name], self.ridge)


class JointRankK(SVD):
    """Data-free joint rank-k (arXiv 2402.16319): queries with keys and gate with up share their first factor.

    What of the paper is known, and what is our reading, is in docs/mathematics.md. ``joint_only`` leaves the maps that
    have no partner whole.
    """

    name = "joint-rank-k"
    summary = "as 'svd', but queries with keys and gate with up share their first factor (data-free joint rank-k)"

    def __init__(self, ridge: float = 1e-4, align: int = 1, *, joint_only: bool = False) -> None:
        super().__init__(ridge, align)
        self.joint_only = joint_only

    @classmethod
    def from_config(cls, config: CompressionConfig) -> Self:
        """With the alignment, and whether only what has a partner is factorised."""
        return cls(config.ridge, config.alignment, joint_only=config.joint_only)

    def stacks(self, module: Module, shapes: Sequence[MapShape]) -> list[Stack]:
        """All input maps of the MLP are one stack, as are queries and keys."""
        count = {"mlp": len(shapes) - 1, "qk": 2}.get(module, 0)
        together, rest = shapes[:count], shapes[count:]
        stacks = []
        if together and (not self.joint_only or sum(shape.parts for shape in together) > 1):
            stacks.append(Stack(tuple(range(count)), together[0].inputs, sum(shape.outputs for shape in together)))
        if not self.joint_only:
            stacks += [Stack((count + place,), shape.inputs, shape.outputs) for place, shape in enumerate(rest)]
        return stacks
