"""Which multiples of channels this device multiplies matrices fastest by.

A layer's maps are timed at widths around those that a compression gives, odd multiples of every alignment, with one
token and with many at once. What counts is the time for each parameter kept, in units of the least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from .budget import LayerGeometry, Module
from .layout import HeadShape

ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64)
#: The narrowest maps must have so many multiples of an alignment to choose from.
CHOICES = 8
#: Tokens at once: one that follows on a sequence, and a prompt.
TOKENS = (1, 256)
#: What is taken for the ratio where that is chosen only later.
USUAL_RATIO = 0.3
#: A larger alignment has to be faster by this share: it leaves the allocation less choice.
WORTH = 0.05
#: Each alignment is timed so often, in turn with the others.
REPEATS = 9
#: Where one turn of all takes so many seconds there are but two more.
SLOW = 2.0
#: One time is of so many seconds of products at least.
SPAN = 0.005


@dataclass(frozen=True)
class Width:
    """A layer's maps to and from channels that compression removes: of ``heads`` heads alike, or of an MLP (1)."""

    hidden: int
    full: int
    """Channels of a head before."""
    heads: int
    maps: int
    """To them and from them, in all."""

    def channels(self, ratio: float, alignment: int) -> int:
        """Those of a head that are left when about ``ratio`` is removed: an odd multiple of ``alignment``, or all."""
        odd = 2 * round((self.full * (1 - ratio) / alignment - 1) / 2) + 1
        return min(max(odd, 1) * alignment, self.full)

    def parameters(self, channels: int) -> int:
        """Of all maps."""
        return self.maps * self.hidden * self.heads * channels


@dataclass(frozen=True)
class Alignment:
    """The alignment that was ``chosen``, and by what."""

    chosen: int
    seconds: dict[int, list[float]]
    """For each alignment and number of :data:`TOKENS`, of a billion parameters."""

    @classmethod
    def of(cls, seconds: dict[int, list[float]]) -> Alignment:
        """The smallest alignment that is not slower than another by more than :data:`WORTH`, in the mean of all."""
        least = [min(column) for column in zip(*seconds.values(), strict=True)]
        scores = {
            alignment: statistics.fmean(own / best for own, best in zip(row, least, strict=True))
            for alignment, row in seconds.items()
        }
        allowed = min(scores.values()) * (1 + WORTH)
        return cls(min(alignment for alignment, score in scores.items() if score <= allowed), seconds)


def widths_of(geometry: LayerGeometry, shape: HeadShape, hidden: int, modules: Collection[Module]) -> list[Width]:
    """What compressing ``modules`` of a layer like this narrows; of experts, one."""
    widths = []
    if {"qk", "vo"} & set(modules):
        widths += [Width(hidden, shape.head, heads, 2) for heads in (shape.heads, shape.groups)]
    if "mlp" in modules:
        mlp = geometry.modules["mlp"]
        widths.append(Width(hidden, mlp.full * mlp.channels, 1, min(3, round(mlp.unit_parameters / hidden))))
    return widths


def measure_alignments(
    widths: Sequence[Width], ratio: float, dtype: torch.dtype, device: torch.device
) -> dict[int, list[float]]:
    """Seconds for a billion parameters of maps of these ``widths``, by alignment and number of :data:`TOKENS`.

    Alignments are those that leave a choice: heads of 64 channels are not cut down to multiples of 64.
    """
    narrowest = min(width.full for width in widths)
    candidates = [one for one in ALIGNMENTS if one == 1 or CHOICES * one <= narrowest]
    columns = [_seconds(widths, ratio, candidates, tokens, dtype, device) for tokens in TOKENS]
    rows = zip(candidates, *columns, strict=True)
    return {alignment: [1e9 * value for value in row] for alignment, *row in rows}


def _seconds(
    widths: Sequence[Width],
    ratio: float,
    candidates: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[float]:
    """For each parameter, by alignment: the least of some repeats, in each of which every alignment has its turn."""
    full = [(width.maps, width.hidden * width.heads * width.full) for width in widths]
    weights = [torch.ones(size, dtype=dtype, device=device) for size in full]
    works = [_products(widths, weights, ratio, alignment, tokens) for alignment in candidates]
    first = [_timed(work, 1, device) for work, _ in works]
    times, repeats = max(1, round(SPAN / max(1e-9, min(first)))), REPEATS if sum(first) < SLOW else 2
    found: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for (work, parameters), own in zip(works, found, strict=True):
            own.append(_timed(work, times, device) / parameters)
    return [min(own) for own in found]


def _products(
    widths: Sequence[Width], weights: Sequence[torch.Tensor], ratio: float, alignment: int, tokens: int
) -> tuple[Callable[[], None], int]:
    """A call that does the products of all ``widths`` once, with parts of their ``weights``, and the parameters."""
    pairs, parameters = [], 0
    for width, weight in zip(widths, weights, strict=True):
        channels = width.channels(ratio, alignment)
        parameters += width.parameters(channels)
        count = width.heads * channels
        for place, part in enumerate(weight[:, : count * width.hidden]):
            matrix = part.view(width.hidden, count) if place < width.maps // 2 else part.view(count, width.hidden)
            pairs.append((weight.new_ones(tokens, matrix.shape[1]), matrix))

    def work() -> None:
        for x, matrix in pairs:
            torch.nn.functional.linear(x, matrix)

    return work, parameters


@torch.inference_mode()
def _timed(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one of so many calls."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - started) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
