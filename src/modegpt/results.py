"""What a compression decided and found, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from .budget import LayerGeometry, LayerRanks, Module
from .errors import CheckpointError
from .least_loss import Part, by_part, losses_at

#: Points of an error curve that are kept, but for the first; in between it is a straight line.
_POINTS = 128
#: Of J(0), and in nats: what rounding and the ridge make of an error and a divergence that are none.
_FAINT_ERROR, _FAINT_DIVERGENCE = 1e-2, 1e-5


def thinned(last: int, points: int = _POINTS) -> list[int]:
    """The places of 0, 1, ..., ``last`` that are kept of a curve over them: evenly spread, at most ``points`` steps."""
    steps = max(1, min(points, last))
    return sorted({round(last * step / steps) for step in range(steps + 1)})


def spectrum_of(values: torch.Tensor) -> list[float]:
    """:attr:`ModuleResult.spectrum` of ``values`` (..., n): of several rows the mean of what is i-th in each."""
    ordered = values.sort(dim=-1, descending=True).values.reshape(-1, values.shape[-1]).mean(0)
    found: list[float] = ordered[thinned(len(ordered) - 1)].tolist()
    return [float(f"{value:.6g}") for value in found]


@dataclass(frozen=True)
class ModuleResult:
    """What happened to one module: ``rank`` of ``full`` units, and its relative output error."""

    rank: int
    full: int
    relative_error: float
    kept: list[int] | list[list[int]] | None
    """Kept channels: of the MLP, of each expert, or of the queries and keys of each key-value head; None if mixed."""
    expert_tokens: list[int] | None = None
    """Tokens that calibrated each expert, where there are experts."""
    curve: list[float] | None = None
    """The relative error at the ranks :func:`thinned` (full), where the method knows all; without any second fit."""
    spectrum: list[float] | None = None
    """Of what the rank cuts, scores or singular values, the largest first, those at :func:`thinned` (full - 1)."""

    @property
    def experts_short_of_tokens(self) -> list[int]:
        """The experts that saw fewer tokens than they have channels, so that statistics alone could not decide."""
        return [expert for expert, tokens in enumerate(self.expert_tokens or ()) if tokens < self.full]


@dataclass(frozen=True)
class LayerResult:
    """What happened to one decoder layer."""

    sparsity: Mapping[Module, float]
    modules: Mapping[Module, ModuleResult]


@dataclass(frozen=True)
class Choice:
    """How much every layer keeps, and why."""

    ranks: list[LayerRanks]
    sparsity: list[dict[Module, float]]
    scores: list[list[float]] | None = None
    """Block-influence scores per layer (one, or attention and MLP), where the allocation used them."""
    temperature: float | None = None
    divergence: list[dict[Module, float]] | None = None
    """What every module is predicted to cost in nats per token, where the allocation knew."""
    loss: float | None = None
    """And all of them together: the predicted ln(perplexity / dense perplexity)."""
    ratio: float | None = None
    """The share of the decoder blocks' parameters that was to be removed, where it was not given but chosen."""
    pairs: list[int] | None = None
    """The rotary pairs that every head keeps, where all have to keep the same."""


@dataclass(frozen=True)
class ModuleProfile:
    """How the divergence from the dense model grows as one module loses rank.

    D(r) = D(p) J(r) / J(p): the method's objective J in the form it has over the ranks, scaled by D at the one rank p
    where the divergence was measured with this module alone compressed. For small errors the divergence is
    quadratic in them, as J is.
    """

    full: int
    errors: list[float]
    """J at the ranks :func:`thinned` (full)."""
    probed: int
    divergence: float
    """E over tokens of KL(dense || with this module at rank ``probed``), in nats."""

    def __post_init__(self) -> None:
        if len(self.errors) != len(thinned(self.full)) or not 0 <= self.probed <= self.full:
            raise ValueError(f"not the profile of a module of {self.full} units")

    @classmethod
    def of(cls, curve: torch.Tensor, probed: int, divergence: float) -> ModuleProfile:
        """That of a module with J = ``curve`` at ranks 0, 1, ..., full."""
        full = len(curve) - 1
        return cls(full, curve[thinned(full)].tolist(), probed, divergence)

    def curve(self) -> torch.Tensor:
        """J at ranks 0, 1, ..., full: (full + 1,) float64."""
        ranks = thinned(self.full)
        curve = torch.zeros(self.full + 1, dtype=torch.float64)
        for low, high, above, below in zip(ranks, ranks[1:], self.errors, self.errors[1:], strict=False):
            curve[low : high + 1] = torch.linspace(above, below, high - low + 1, dtype=torch.float64)
        return curve

    def losses(self, all_lost: float = 0.0) -> torch.Tensor:
        """D at ranks 0, 1, ..., full: (full + 1,) float64; from p it rises with J to at least ``all_lost`` at 0."""
        curve, p = self.curve(), self.probed
        found = curve * (max(0.0, self.divergence) / float(curve[p])) if curve[p] > 0 else torch.zeros_like(curve)
        if all_lost > found[0] and curve[0] > curve[p]:
            found[:p] = found[p] + (all_lost - found[p]) * (curve[:p] - curve[p]) / (curve[0] - curve[p])
        return found

    @property
    def faint(self) -> bool:
        """Whether rank p costs so little that D(p) / J(p) says nothing of ranks below."""
        error = float(self.curve()[self.probed])
        little = self.divergence < _FAINT_DIVERGENCE and error < _FAINT_ERROR * self.errors[0]
        return little or error <= 0 < self.errors[0]  # D(p) is noise then


@dataclass(frozen=True)
class Profile:
    """That of every layer's modules, measured on a few windows."""

    layers: list[dict[Module, ModuleProfile]]
    perplexity: float
    """Of the dense model on the same windows."""
    together: dict[Part, float] = field(default_factory=dict)
    """The divergence with the modules of a part at their probed ranks in all layers at once."""

    def check(self, layers: Sequence[LayerGeometry], modules: Collection[Module]) -> None:
        """Raise :class:`CheckpointError` where it is not of ``modules`` of these ``layers``."""
        fits = len(self.layers) == len(layers) and all(
            set(modules) <= own.keys() <= layer.modules.keys()
            and all(one.full == layer.modules[module].full for module, one in own.items())
            for own, layer in zip(self.layers, layers, strict=True)
        )
        if not fits:
            raise CheckpointError("the profile is not of a model of this shape: it is damaged; make it again")

    def losses(self) -> list[dict[Module, torch.Tensor]]:
        """D of every module at ranks 0, 1, ..., full.

        Where half of the rank is next to nothing, as with many dead channels, the module is taken to lose at rank 0
        no less than the median of its type in the layers where it is not, or of the other types where there is none.
        """
        lost: dict[Module, list[float]] = {}
        for layer in self.layers:
            for module, one in layer.items():
                if not one.faint:
                    lost.setdefault(module, []).append(float(one.losses()[0]))
        usual = {module: median(values) for module, values in lost.items()}
        of_any = median(usual.values()) if usual else 0.0
        return [
            {module: one.losses(usual.get(module, of_any) if one.faint else 0.0) for module, one in layer.items()}
            for layer in self.layers
        ]

    def divergence(self, ranks: Sequence[LayerRanks]) -> list[dict[Module, float]]:
        """What every module is predicted to cost by itself at these ``ranks``, in nats per token."""
        return losses_at(self.losses(), ranks)

    def interplay(self) -> dict[Part, float]:
        """What makes S + c S^2 the divergence :attr:`together` of every part, S the sum of its modules' own: c.

        0 where they add up to less than their sum, as they do when so much is lost that no more can be.
        """
        alone = by_part([{module: one.divergence for module, one in layer.items()} for layer in self.layers])
        return {
            part: max(0.0, (self.together.get(part, own) - own) / own**2) if own > 0 else 0.0
            for part, own in alone.items()
        }
