"""One layer's modules solved and put together again, each part by the worker that has the least to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .budget import LayerGeometry, LayerRanks, Module
from .costs import Sizes, spread
from .decompositions import Elimination, with_pseudo_tokens
from .errors import NumericalError
from .layered import LayeredModel
from .layout import HeadShape, expert_count, map_paths
from .methods import Ladder, Method, Solution
from .modeling import Family
from .parallel import Workers
from .progress import Progress
from .results import ModuleResult, spectrum_of, thinned
from .statistics import LayerStatistics, through_mlp
from .weights import (
    HeadWeights,
    MLPWeights,
    cast_like,
    complete,
    head_tensors,
    mlp_tensors,
    query_key_tensors,
    read_mlp,
    read_query_key,
    read_value_output,
    stack_experts,
    value_output_tensors,
    with_factors,
)

Tensors = dict[str, torch.Tensor]
#: A module of a layer, or one expert of its MLP.
Part = tuple[Module, int | None]
#: What draws random numbers; their number decides which, so that a new module must not change it.
_SEEDED: tuple[Module, ...] = ("mlp", "qk", "vo", "heads", "layer")
_EXPERT_SEED = 1_000_003
#: What is taken to be kept when the parts of a layer are shared out before ranks are looked at.
_KEPT = 0.7


@dataclass(frozen=True)
class Outcome:
    """What solving one part gave, but for the weights; see :class:`modegpt.methods.Solution`."""

    error: float
    norm: float
    kept: list[Any] | None
    errors: list[float] | None
    """The objective at the ranks :func:`thinned` (full), where the method knows it for all."""
    spectrum: list[float] | None
    """See :attr:`ModuleResult.spectrum`."""

    @classmethod
    def of(cls, solution: Solution[Any], ladder: Ladder[Any]) -> Outcome:
        """That of ``solution``, one of the ``ladder``."""
        kept = None if solution.kept is None else solution.kept.tolist()
        known = isinstance(ladder.errors, torch.Tensor) or solution.factors  # what is factorised is decomposed by now
        errors = ladder.curve()[thinned(ladder.full)].tolist() if known else None
        spectrum = None if solution.spectrum is None else spectrum_of(solution.spectrum)
        return cls(solution.error, solution.norm, kept, errors, spectrum)


@dataclass(frozen=True)
class LayerLadders:
    """The solutions of one layer's parts at every rank: of those parts that fell to this worker."""

    index: int
    owners: dict[Part, int]
    own: dict[Part, Ladder[Any]]
    seeded: Callable[[Part], None]
    tokens: tuple[int, ...] | None


class LayerSolver:
    """Solves the layers of ``dense`` with its ``workers``."""

    def __init__(
        self, dense: LayeredModel, geometry: Sequence[LayerGeometry], workers: Workers, progress: Progress
    ) -> None:
        self._dense = dense
        self._family = dense.family.description
        self._geometry = geometry
        self._workers = workers
        self._progress = progress
        self._sizes = Sizes.of(dense.model)

    def ladders(
        self, index: int, method: Method, layer: nn.Module, statistics: LayerStatistics, seed: int
    ) -> LayerLadders:
        """What ``method`` finds for layer ``index``; ``statistics`` is not needed afterwards but by the ladders."""
        parts = _parts(layer, self._family, method.modules)
        costs = {part: method.solve_flops(part[0], self._sizes, _KEPT) for part in parts}
        owners = spread(costs, self._workers.size)

        def seeded(part: Part) -> None:
            # What a method draws depends on the place alone, not on how far this process has come.
            number = len(_SEEDED) * index + _SEEDED.index(part[0]) + _EXPERT_SEED * (part[1] or 0)
            torch.manual_seed((seed + number) % 2**63)

        own = {}
        with self._own_randomness():
            for part in (part for part in parts if owners[part] == self._workers.rank):
                self._progress.detail(f"solving {_name_of(part)}")
                seeded(part)
                own[part] = self.ladder(part, method, layer, statistics)
        return LayerLadders(index, owners, own, seeded, statistics.expert_tokens)

    def cut(
        self, ladders: LayerLadders, layer: nn.Module, thin: nn.Module, rank: LayerRanks, *, final: bool = True
    ) -> tuple[Tensors, dict[Module, ModuleResult]]:
        """The state of the compressed layer at ``rank`` and the results, on every worker; finished if ``final``."""
        solved: dict[Part, tuple[Tensors, Outcome]] = {}
        with self._own_randomness():
            for part, ladder in ladders.own.items():
                if final:
                    self._progress.detail(f"fitting {_name_of(part)}")
                ladders.seeded(part)
                solution = ladder.final(rank[part[0]]) if final else ladder.at(rank[part[0]])
                solved[part] = self._tensors(part, solution), Outcome.of(solution, ladder)
        state = self._untouched(layer, {part[0] for part in ladders.owners})
        geometry, tokens = self._geometry[ladders.index].modules, ladders.tokens
        outcomes: dict[Module, list[Outcome]] = {module: [] for module in geometry}
        for part, owner in ladders.owners.items():
            mine = solved.pop(part, None)
            own = None if mine is None else cast_like(mine[0], layer)
            state |= self._workers.tensors(own, owner, self._dense.device)
            outcome = self._workers.tell(None if mine is None else mine[1], owner)
            assert outcome is not None
            outcomes[part[0]].append(outcome)
        results = {module: _result(outcomes[module], rank[module], shape.full) for module, shape in geometry.items()}
        if tokens is not None:
            results["mlp"] = replace(results["mlp"], expert_tokens=list(tokens))
        return complete(thin, stack_experts(state), like=layer), results

    def curves(self, ladders: LayerLadders) -> dict[Module, torch.Tensor]:
        """The objective of every module at ranks 0, 1, ..., full; of experts their sum."""
        curves: dict[Module, torch.Tensor] = {}
        for part, owner in ladders.owners.items():
            mine = ladders.own[part].curve().tolist() if part in ladders.own else None
            found = self._workers.tell(mine, owner)
            assert found is not None
            curve = torch.tensor(found, dtype=torch.float64)
            if not bool(curve.isfinite().all()):
                raise NumericalError(f"layer {ladders.index}, {part[0]}: NaN or infinite errors; try a larger --ridge")
            curves[part[0]] = curves[part[0]] + curve if part[0] in curves else curve
        return curves

    def eliminations(self, ladders: LayerLadders) -> tuple[Elimination, ...]:
        """That of the MLP's channels, or of every expert's, on every worker; none where the method has none."""
        found = []
        for part, owner in ladders.owners.items():
            if part[0] == "mlp":
                own = ladders.own[part].elimination if part in ladders.own else None
                found.append(self._workers.tensors(None if own is None else vars(own), owner, self._dense.device))
        return tuple(Elimination(**one) for one in found if one)

    def _own_randomness(self) -> Any:
        device = self._dense.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def ladder(self, part: Part, method: Method, layer: nn.Module, statistics: LayerStatistics) -> Ladder[Any]:
        """What ``method`` finds for one part of a layer."""
        module, expert = part
        weights = self._read(part, layer)
        if expert is not None:
            statistics = _for_expert(statistics, expert, weights)
        elif module == "mlp" and statistics.rows is not None:
            statistics = replace(statistics, passed=partial(through_mlp, layer, self._family, statistics.rows))
        return method.solvers()[module](weights, statistics)

    def _read(self, part: Part, layer: nn.Module) -> Any:
        """The dense weights of a part."""
        family, heads, (module, expert) = self._family, self._heads(layer), part
        if module == "mlp":
            return read_mlp(layer, family, expert)
        if module == "qk":
            return read_query_key(layer, family, heads)
        if module == "vo":
            return read_value_output(layer, family, heads)
        return HeadWeights(read_query_key(layer, family, heads), read_value_output(layer, family, heads))

    def _untouched(self, layer: nn.Module, modules: Collection[Module]) -> Tensors:
        """What the ``modules`` do not speak for, as it is, in the compressed layer's state dict."""
        tensors: Tensors = {}
        for part in _parts(layer, self._family, ("mlp", "heads")):
            if part[0] not in modules and not (part[0] == "heads" and {"qk", "vo"} & set(modules)):
                tensors |= self._tensors(part, Solution(self._read(part, layer), 0.0, 0.0))
        return cast_like(tensors, layer)

    def _tensors(self, part: Part, solution: Solution[Any]) -> Tensors:
        """A part's compressed weights as in the compressed layer's state dict."""
        (module, expert), weights, family = part, solution.weights, self._family
        if module == "heads":
            return head_tensors(weights, family)
        if module == "mlp":
            tensors = mlp_tensors(weights, family, expert)
        elif module == "qk":
            tensors = query_key_tensors(weights, solution.pairs, family)
        else:
            tensors = value_output_tensors(weights, family)
        return with_factors(tensors, solution.factors, map_paths(family, module)) if solution.factors else tensors

    def _heads(self, layer: nn.Module) -> HeadShape:
        return HeadShape.of(layer, self._dense.model.config, self._family)


def _name_of(part: Part) -> str:
    """For those who wait."""
    return part[0] if part[1] is None else f"expert {part[1]}"


def _parts(layer: nn.Module, family: Family, modules: Sequence[Module]) -> list[Part]:
    """What is solved by itself in a layer: its ``modules`` but itself, and in place of the MLP each expert."""
    experts = expert_count(layer, family)
    mlp: list[Part] = [("mlp", expert) for expert in range(experts)] if experts else [("mlp", None)]
    inside = [module for module in modules if module != "layer"]
    return [part for module in inside for part in (mlp if module == "mlp" else [(module, None)])]


def _for_expert(statistics: LayerStatistics, expert: int, weights: MLPWeights) -> LayerStatistics:
    """The statistics of one expert, made up for where it saw fewer tokens than it has channels."""
    if "mlp" not in statistics.sums:
        return statistics
    assert statistics.expert_tokens is not None
    own = statistics.of_expert(expert)
    gram = own["mlp"]
    if own.tokens >= gram.shape[-1]:
        return own
    energy = statistics["mlp"].diagonal(dim1=-2, dim2=-1).mean(-1).sum()
    level = float(energy) / max(1, sum(statistics.expert_tokens))
    return own.with_mlp(with_pseudo_tokens(gram, own.tokens, weights.inputs, level))


def _result(outcomes: Sequence[Outcome], rank: int, full: int) -> ModuleResult:
    error, norm = sum(outcome.error for outcome in outcomes), sum(outcome.norm for outcome in outcomes)
    kept = [outcome.kept for outcome in outcomes if outcome.kept is not None]
    merged = kept if len(kept) > 1 else kept[0] if kept else None
    errors, spectrum = _added([one.errors for one in outcomes]), _added([one.spectrum for one in outcomes])
    return ModuleResult(
        rank,
        full,
        (error / norm) ** 0.5 if norm > 0 else 0.0,
        merged,
        curve=[round((one / norm) ** 0.5, 6) for one in errors] if errors and norm > 0 else None,
        spectrum=[value / len(outcomes) for value in spectrum] if spectrum else None,
    )


def _added(curves: Sequence[list[float] | None]) -> list[float] | None:
    """The sum of the parts' curves, where all parts have one."""
    known = [curve for curve in curves if curve is not None]
    return [sum(values) for values in zip(*known, strict=True)] if len(known) == len(curves) else None
