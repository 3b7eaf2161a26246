"""How much each block may lose: sparsity allocation. Paper: section 3.3 (eq. 10, 11) and B.11 (eq. 42, 43); OWL."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import InvalidRequest

#: With ``auto``, the temperature is chosen so that the most compressed block loses this share (paper, B.2).
LARGEST_SPARSITY = 0.8


def entropic_allocation(
    scores: Sequence[float], weights: Sequence[float], average: float, temperature: float
) -> list[float]:
    """phi_j = phi_avg (sum_i w_i) exp(-s_j / eps) / sum_i w_i exp(-s_i / eps).

    Maximises sum_j w_j s_j (1 - phi_j) - eps sum_j w_j phi_j log phi_j under the budget
    sum_j w_j phi_j = phi_avg sum_j w_j. With equal weights it is eq. 11; with one score for
    attention and one for the MLP of every layer, weighted by their parameters, it is eq. 43 as derived from
    eq. 42 with the entropy weighted alike, the one reading that has a closed form.

    ``scores`` s are importances (high: compress little), ``weights`` w the parameters each score speaks for,
    ``average`` phi_avg and ``temperature`` eps. An infinite temperature is the uniform allocation.
    """
    lowest = min(scores)
    shares = [math.exp((lowest - score) / temperature) for score in scores]
    scale = average * sum(weights) / sum(w * share for w, share in zip(weights, shares, strict=True))
    return [scale * share for share in shares]


def auto_temperature(
    scores: Sequence[float], weights: Sequence[float], average: float, largest: float = LARGEST_SPARSITY
) -> float:
    """The temperature at which the largest sparsity of :func:`entropic_allocation` is ``largest``.

    Infinite (uniform) where the average alone reaches ``largest`` or all scores are equal. Where too few
    blocks carry the budget for any of them to reach ``largest``, the lowest temperature searched, a
    thousandth of the scores' spread: nearly everything then falls on the least important block.
    """
    spread = max(scores) - min(scores)
    if average >= largest or spread <= 0:
        return math.inf
    low, high = math.log(spread / 1000), math.log(spread * 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        if max(entropic_allocation(scores, weights, average, math.exp(middle))) > largest:
            low = middle
        else:
            high = middle
    return math.exp(high)


def bounded_allocation(scores: Sequence[float], weights: Sequence[float], average: float, reach: float) -> list[float]:
    """S_j = S + lambda (D_mean - D_j) / max_i |D_mean - D_i|, D_mean the weighted mean: OWL's allocation.

    OWL (arXiv 2310.05175) takes sparsities that fall as the outlier ratios D = ``scores`` rise, within S +- lambda, of
    mean S = ``average``; lambda is ``reach``. This is the one that is linear in D, uses the whole interval on the side
    of the block farthest from the mean, and has the mean weighted by the parameters (``weights``). The authors' code
    spreads D evenly over an interval of width 2 lambda and then moves it, which can leave S +- lambda. Where S or 1 - S
    is less than lambda, that is the reach.
    """
    mean = sum(w * score for w, score in zip(weights, scores, strict=True)) / sum(weights)
    farthest = max(abs(mean - score) for score in scores)
    scale = min(reach, average, 1 - average) / farthest if farthest > 0 else 0.0
    return [average + scale * (mean - score) for score in scores]


def allocate(
    scores: Sequence[float], weights: Sequence[float], average: float, temperature: float | None
) -> tuple[list[float], float]:
    """Sparsities for ``scores`` and the temperature they used; ``temperature`` None means automatic.

    Raises :class:`InvalidRequest` when a given temperature asks some block to lose more than everything.
    """
    chosen = auto_temperature(scores, weights, average) if temperature is None else temperature
    sparsities = entropic_allocation(scores, weights, average, chosen)
    if max(sparsities) >= 1:
        usable = auto_temperature(scores, weights, average, largest=max(0.95, (1 + average) / 2))
        raise InvalidRequest(
            f"--temperature {chosen:g} asks one of the blocks for a sparsity of {max(sparsities):.2f}, which must stay "
            f"below 1; use 'auto' or at least {usable:.3g}"
        )
    return sparsities, chosen
