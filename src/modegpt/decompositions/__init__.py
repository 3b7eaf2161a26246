"""The paper's three decompositions, those that improve on them, and what goes with them.

Pure functions: tensors in, tensors out, in float64 (but :func:`gated_fit`, in the precision of its rows).

Orientation follows the paper: rows are tokens and a linear map is ``y = x W``.
"""

from .cr import CRDecomposition, channel_scores, couples, cr_decomposition
from .elimination import Elimination, eliminated, greedy_elimination, refit, regularised, unit_channels
from .experts import weight_energies, with_pseudo_tokens
from .fluctuation import fluctuation, mean_contribution, standardised
from .gated import GatedFit, GatedRows, gated_fit
from .linalg import top_indices
from .logits import LogitLadder, kept_coefficients, logit_ladder, rotate, selection_ladder
from .low_rank import LowRank, activation_scales, break_even, low_rank, whitening
from .norm import norm_energy
from .nystrom import NystromDecomposition, nystrom_decomposition, ridge_leverage_scores
from .outliers import outlier_share
from .principal import PrincipalDirections, principal_directions
from .selection import selection_losses
from .svd import SVDDecomposition, balance, svd_decomposition
from .values import alternating_fit, energy_bases, group_bases, mean_blocks, output_fit, value_errors

__all__ = [
    "CRDecomposition",
    "Elimination",
    "GatedFit",
    "GatedRows",
    "LogitLadder",
    "LowRank",
    "NystromDecomposition",
    "PrincipalDirections",
    "SVDDecomposition",
    "activation_scales",
    "alternating_fit",
    "balance",
    "break_even",
    "channel_scores",
    "couples",
    "cr_decomposition",
    "eliminated",
    "energy_bases",
    "fluctuation",
    "gated_fit",
    "greedy_elimination",
    "group_bases",
    "kept_coefficients",
    "logit_ladder",
    "low_rank",
    "mean_blocks",
    "mean_contribution",
    "norm_energy",
    "nystrom_decomposition",
    "outlier_share",
    "output_fit",
    "principal_directions",
    "refit",
    "regularised",
    "ridge_leverage_scores",
    "rotate",
    "selection_ladder",
    "selection_losses",
    "standardised",
    "svd_decomposition",
    "top_indices",
    "unit_channels",
    "value_errors",
    "weight_energies",
    "whitening",
    "with_pseudo_tokens",
]
