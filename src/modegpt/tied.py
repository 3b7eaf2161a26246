"""Ranks for engines whose layers are all alike: one size of head everywhere, and one list of rotary pairs.

``gguf``: MLPs of any multiple of 32 channels, where llama.cpp has layers of several widths; ``stock``: of one width.
For every number of pairs r that heads could keep, with values as wide, the rest of the budget is spent on the MLPs; of
these the r of least predicted loss is taken. Which r pairs is one choice for all heads of all layers, made by Type II's
elimination on the sum of what it minimises,

    sum over layers of w_l J_l(c'),  w_l = D_l(p) / J_l(p),

the divergence that :class:`modegpt.results.ModuleProfile` predicts from J. Where queries and keys have norms, these are
of all channels of a head, and heads stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from .budget import LayerGeometry, LayerRanks, Module, ranks_of
from .config import CompressionConfig
from .decompositions import LogitLadder, kept_coefficients, logit_ladder
from .errors import InvalidRequest
from .exports.plain import alike_in_gguf, check_plain, has_norms
from .layout import rotary_pairs
from .least_loss import Losses, losses_at, ranks_from_losses, total_loss
from .methods.greedy import LOGIT_RIDGE
from .results import Choice, Profile

if TYPE_CHECKING:
    from .engine import Engine

#: Channels of a head are a multiple of this, which kernels like.
HEAD_MULTIPLE = 8
#: Channels of an MLP in a GGUF file are.
_MLP_MULTIPLE = 32


@dataclass(frozen=True)
class _Heads:
    """What all heads keep together."""

    ladder: LogitLadder
    """One group of all heads of all layers."""
    weights: list[float]
    """w_l."""

    def losses(self) -> list[float]:
        """The predicted loss of all queries and keys at 0, 1, ..., n pairs; more than any other without any."""
        return [math.inf, *reversed(self.ladder.errors.tolist())]


def check_tied(config: PreTrainedConfig) -> None:
    """Refuse the models of a ``config`` that cannot become a plain decoder of equal layers."""
    check_plain(config)
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidRequest("--profile: MODEL's rotary embedding turns a part of every head only; use --profile full")


def tied_choice(
    engine: Engine, geometry: Sequence[LayerGeometry], config: CompressionConfig, profile: Profile
) -> Choice:
    """The ranks of least predicted loss that ``config.profile`` allows; raises :class:`InvalidRequest` for no such."""
    losses, interplay = profile.losses(), profile.interplay()
    model = engine.dense.model.config
    heads = None if has_norms(model) else _heads(engine, profile)
    whole = geometry[0].modules["qk"].full
    by_pairs = {whole: 0.0} if heads is None else dict(enumerate(heads.losses()))
    best: tuple[float, int, list[LayerRanks]] | None = None
    for pairs in [whole] if heads is None else _numbers(whole, config.alignment):
        ranks = _ranks(geometry, losses, config, pairs, _alike(config, model))
        if ranks is None:
            continue
        lost = losses_at([{name: one[name] for name in one if name != "qk"} for one in losses], ranks)
        lost[0]["qk"] = by_pairs[pairs]
        total = total_loss(lost, interplay)
        if best is None or total < best[0]:
            best = total, pairs, ranks
    if best is None:
        raise InvalidRequest(f"--ratio {config.ratio}: out of reach with --profile {config.profile}; use a smaller one")
    loss, pairs, ranks = best
    kept = None if heads is None else heads.ladder.kept(pairs)[0].tolist()
    removed: list[dict[Module, float]] = [
        {name: 1 - rank[name] / shape.full for name, shape in layer.modules.items()}
        for rank, layer in zip(ranks, geometry, strict=True)
    ]
    return Choice(
        ranks,
        removed,
        divergence=_divergence(engine, profile, heads, ranks, kept) if heads and kept else profile.divergence(ranks),
        loss=loss,
        ratio=config.ratio,
        pairs=kept,
    )


def tied_step(geometry: Sequence[LayerGeometry], config: CompressionConfig, model: PreTrainedConfig) -> int:
    """The parameters between two sizes of ``model``: of a step of one MLP, or of all where these are of one width."""
    steps = [layer.modules["mlp"].largest_step(_mlp_step(config)) for layer in geometry]
    return sum(steps) if _alike(config, model) else max(steps)


def _alike(config: CompressionConfig, model: PreTrainedConfig) -> bool:
    """Whether all MLPs have to be of one width."""
    return config.profile == "stock" or alike_in_gguf(has_norms(model), model.tie_word_embeddings)


def _mlp_step(config: CompressionConfig) -> int:
    return config.alignment if config.profile == "stock" else math.lcm(config.alignment, _MLP_MULTIPLE)


def _numbers(full: int, align: int) -> list[int]:
    """Pairs that heads can keep: all, or what makes a multiple of ``align`` and of :data:`HEAD_MULTIPLE` channels."""
    step = math.lcm(2, align, HEAD_MULTIPLE) // 2
    return [full, *range((full - 1) // step * step, 0, -step)]


def _ranks(
    geometry: Sequence[LayerGeometry], losses: Losses, config: CompressionConfig, pairs: int, alike: bool
) -> list[LayerRanks] | None:
    """Those that meet the ratio with so many ``pairs`` and values as wide; None where MLPs cannot."""
    assert config.ratio is not None
    heads: dict[Module, int] = {"qk": pairs, "vo": 2 * pairs}
    base = config.base(geometry)
    gone = sum(
        layer.modules[name].parameters - layer.modules[name].parameters_at(rank)
        for layer in geometry
        for name, rank in heads.items()
    )
    wanted = config.ratio * base.parameters + base.extra - gone
    if wanted < 0:
        return None
    try:
        if alike:
            mlps = _equal(geometry, wanted, _mlp_step(config))
        else:
            only: Losses = [{"mlp": one["mlp"]} for one in losses]
            left = replace(base, extra=base.extra - gone)
            free = ranks_from_losses(geometry, only, config.ratio, _mlp_step(config), left)
            mlps = [rank["mlp"] for rank in free]
    except InvalidRequest:  # out of reach with so many pairs
        return None
    return [ranks_of({**heads, "mlp": mlp}) for mlp in mlps]


def _equal(geometry: Sequence[LayerGeometry], wanted: float, align: int) -> list[int]:
    """MLPs of one width that lose ``wanted`` parameters in all."""
    shapes = [layer.modules["mlp"] for layer in geometry]
    width = shapes[0].full - wanted / sum(shape.unit_parameters for shape in shapes)
    if width < shapes[0].step(align):
        raise InvalidRequest("out of reach")
    return [shapes[0].nearest(width, align)] * len(geometry)


def _heads(engine: Engine, profile: Profile) -> _Heads:
    """Type II's elimination with all heads of all layers in one group, each with its layer's weight."""
    weights, features = [], []
    for index, layer in enumerate(profile.layers):
        one = layer["qk"]
        error = float(one.curve()[one.probed])
        weights.append(max(0.0, one.divergence) / error if error > 0 else 0.0)
        features.append(weights[-1] * engine.kept_statistics(index)["logits"].flatten(0, 1))
    stacked = torch.cat(features).unsqueeze(0)
    units, target = _pairs_of_heads(stacked)
    return _Heads(logit_ladder(stacked, units, target, LOGIT_RIDGE), weights)


def _pairs_of_heads(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels of every pair (1, n, 2), and the coefficients c (h,) of the dense model."""
    h = features.shape[-1]
    first, second = rotary_pairs(h, False, features.device)
    target = torch.ones(h, dtype=features.dtype, device=features.device)
    target[second] = 0.0
    return torch.stack((first, second), dim=-1).unsqueeze(0), target


def _divergence(
    engine: Engine, profile: Profile, heads: _Heads, ranks: Sequence[LayerRanks], kept: list[int]
) -> list[dict[Module, float]]:
    """What every module is predicted to cost by itself, queries and keys with the pairs ``kept``."""
    found = profile.divergence(ranks)
    for index, own in enumerate(found):
        features = engine.kept_statistics(index)["logits"].flatten(0, 1).unsqueeze(0)
        units, target = _pairs_of_heads(features)
        rows = torch.tensor([kept], device=features.device)
        _, error = kept_coefficients(features, units, rows, target, LOGIT_RIDGE)
        own["qk"] = heads.weights[index] * error
    return found
