"""Calibration on several texts at once: which, how many windows of each, and in what order.

A model loses least on text like that it was calibrated on, and it is used on more than one kind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .data import (
    HUB_DATASETS,
    SELF,
    TokenWindows,
    check_source,
    first_windows,
    other_windows,
    random_windows,
    read_text,
    split_held_out,
    tokenize,
)
from .errors import InvalidRequest

#: Mixtures with a name. This one holds no text that compressed models are commonly judged by, and none that the model
#: has to write, for which all of it would have to be in memory.
MIXTURES: Mapping[str, str] = {"mix": "fineweb-edu:0.35,c4:0.25,ultrachat:0.3,codeparrot:0.1"}

#: What is calibrated on where nothing is said.
DEFAULT = "mix"


@dataclass(frozen=True)
class Mixture:
    """The sources of calibration text and the share of the windows that each gives; the shares add up to 1."""

    shares: Mapping[str, float]
    option: str = "--calibration"

    @classmethod
    def parse(cls, text: str, *, option: str = "--calibration") -> Mixture:
        """Read ``SOURCE[:SHARE],...``; a share is a positive weight, 1 where not given.

        ``text`` that is a file's name as a whole is that file. Refuses a share that is not positive and a source that
        is named twice.
        """
        weights: dict[str, float] = {}
        for name, weight in _parts(text, option):
            known = [other for other in weights if other == name or _same_file(other, name)]
            if known:
                raise InvalidRequest(f"{option} {text!r}: {name} is named twice; give each source once, with a share")
            weights[name] = weight
        total = math.fsum(weights.values())
        return cls({name: weight / total for name, weight in weights.items()}, option)

    def check(self, samples: int) -> None:
        """Refuse unknown sources, and fewer ``samples`` than sources."""
        for source in self.shares:
            check_source(source, option=self.option, allow_self=True, also=MIXTURES)
        if samples < len(self.shares):
            raise InvalidRequest(
                f"--samples {samples}: {self.option} names {len(self.shares)} sources, and each gives a window at "
                f"least; use {len(self.shares)} or more"
            )

    @property
    def files(self) -> list[str]:
        """The sources that are files."""
        return [source for source in self.shares if os.path.isfile(source)]

    @property
    def written(self) -> bool:
        """Whether some of the text is written by the model itself."""
        return SELF in self.shares

    def counts(self, windows: int) -> dict[str, int]:
        """``windows`` >= number of sources, shared by largest remainder; a source gets one at least."""
        exact = {source: share * windows for source, share in self.shares.items()}
        counts = {source: math.floor(number) for source, number in exact.items()}
        missing = windows - sum(counts.values())
        for source in sorted(exact, key=lambda source: counts[source] - exact[source])[:missing]:
            counts[source] += 1
        for source in self.shares:
            if counts[source] == 0:
                counts[max(counts, key=counts.__getitem__)] -= 1
                counts[source] = 1
        return counts


@dataclass(frozen=True)
class Cut:
    """How texts are cut into windows of ``length`` tokens: so many to calibrate on, and perhaps others."""

    samples: int
    length: int
    seed: int
    held_out: int = 0
    """Windows at most, from the start of each source's held-out part."""
    probe: tuple[int, int] | None = None
    """Further windows, and how many of their first tokens, to measure sensitivities on; None for none."""


@dataclass(frozen=True)
class Texts:
    """The windows of a run, by source. Those that the model is still to write are added by :meth:`complete`."""

    seed: int
    parts: Mapping[str, TokenWindows] = field(default_factory=dict)
    """What calibrates."""
    evaluation: Mapping[str, TokenWindows] = field(default_factory=dict)
    probe: Mapping[str, TokenWindows] = field(default_factory=dict)
    """What sensitivities are measured on."""
    written: Mapping[str, int] = field(default_factory=dict)
    """How many windows the model is to write for ``parts``, ``evaluation`` and ``probe``, in this order."""
    probe_length: int = 0

    @property
    def calibration(self) -> TokenWindows | None:
        """The calibration windows, in their order; None where none are there."""
        return interleave(list(self.parts.values()), self.seed) if self.parts else None

    @property
    def probe_windows(self) -> TokenWindows | None:
        """The windows that sensitivities are measured on; None where that is some of the calibration windows."""
        return interleave(list(self.probe.values()), self.seed) if self.probe else None

    def complete(self, windows: TokenWindows) -> Texts:
        """Add ``windows`` that the model wrote, as many as are ``written`` and in that order."""
        kinds, start = {"parts": self.parts, "evaluation": self.evaluation, "probe": self.probe}, 0
        for kind, count in self.written.items():
            ids = windows.ids[start : start + count]
            if count:
                ids = ids[:, : self.probe_length] if kind == "probe" else ids
                kinds[kind] = {**kinds[kind], SELF: TokenWindows(ids.contiguous())}
            start += count
        return Texts(self.seed, kinds["parts"], kinds["evaluation"], kinds["probe"])

    def hashes(self) -> dict[str, str | None]:
        """What tells these windows from others, as far as they are there."""
        kinds = {"calibration": self.parts, "evaluation": self.evaluation, "probe": self.probe}
        return {
            kind: interleave(list(parts.values()), self.seed).sha256() if parts else None
            for kind, parts in kinds.items()
        }


def read_mixture(mixture: Mixture, tokenizer: PreTrainedTokenizerBase, cut: Cut) -> Texts:
    """Read every source's text and cut it. Held-out, calibration and probe windows never overlap.

    Of text that the model writes, the numbers of windows are given; it is held out where there is no other text.
    """
    counts, length = mixture.counts(cut.samples), cut.length
    probed = mixture.counts(cut.probe[0]) if cut.probe else dict.fromkeys(counts, 0)
    parts: dict[str, TokenWindows] = {}
    evaluation: dict[str, TokenWindows] = {}
    probe: dict[str, TokenWindows] = {}
    written: dict[str, int] = {}
    probe_length = cut.probe[1] if cut.probe else 0
    for source, count in counts.items():
        if source == SELF:
            held_out = cut.held_out if len(counts) == 1 else 0
            written = {"parts": count, "evaluation": held_out, "probe": probed[source]}
            continue
        what = f"{mixture.option} {source}"
        ids, reserved, kept = tokenize(tokenizer, read_text(source)), 0, None
        if cut.held_out and source in HUB_DATASETS:
            kept = tokenize(tokenizer, read_text(source, evaluation=True))
        elif cut.held_out:
            ids, kept = split_held_out(ids, length)
            reserved = len(kept)
        parts[source] = random_windows(ids, count, length, cut.seed, what=what, reserved=reserved)
        if kept is not None:
            evaluation[source] = leading_windows(kept, cut.held_out, length, what=f"{what}, held out")
        others = other_windows(ids, probed[source], length, cut.seed, but=count) if probed[source] else None
        if others is not None:
            probe[source] = TokenWindows(others.ids[:, :probe_length].contiguous())
    return Texts(cut.seed, parts, evaluation, probe, written, probe_length)


def leading_windows(ids: torch.Tensor, count: int, length: int, *, what: str) -> TokenWindows:
    """The first windows, ``count`` of them or as many as there are; refuses a text without a whole one."""
    return first_windows(ids, max(1, min(count, len(ids) // length)), length, what=what)


def interleave(parts: Sequence[TokenWindows], seed: int) -> TokenWindows:
    """All windows of ``parts`` in one order that mixes them: the windows of a part keep theirs.

    Window j of a part of n gets the place (j + u) / n, u uniform in [0, 1) and drawn with ``seed``. So the first k of
    all N windows of P parts hold k n / N of the part, give or take 1 + P n / N, and workers that take every other
    window do not get one part each.
    """
    if len(parts) == 1:
        return parts[0]
    generator = torch.Generator().manual_seed(seed)
    places = [
        (torch.arange(len(part), dtype=torch.float64) + torch.rand(len(part), generator=generator, dtype=torch.float64))
        / len(part)
        for part in parts
    ]
    return TokenWindows(torch.cat([part.ids for part in parts])[torch.cat(places).argsort(stable=True)])


def _parts(text: str, option: str) -> list[tuple[str, float]]:
    """The names and weights in ``text``, with named mixtures spelt out."""
    parts: list[tuple[str, float]] = []
    for part in [text] if os.path.isfile(text) else text.split(","):
        name, weight = _weighted(part.strip(), option)
        if name in MIXTURES and not os.path.isfile(name):
            inner = Mixture.parse(MIXTURES[name], option=option).shares
            parts += [(source, share * weight) for source, share in inner.items()]
        else:
            parts.append((name, weight))
    return parts


def _weighted(part: str, option: str) -> tuple[str, float]:
    name, colon, number = part.rpartition(":")
    if not colon or os.path.isfile(part):
        return part, 1.0
    try:
        weight = float(number)
    except ValueError:
        if name in (SELF, *MIXTURES, *HUB_DATASETS) or os.path.isfile(name):
            weight = math.nan
        else:  # C:\text.txt
            return part, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise InvalidRequest(f"{option} {part!r}: a share must be a positive number, such as {name}:0.5")
    return name, weight


def _same_file(one: str, other: str) -> bool:
    return os.path.isfile(one) and os.path.isfile(other) and Path(one).samefile(other)
