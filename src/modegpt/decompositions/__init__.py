"""The paper's three decompositions, and what goes with them, as pure functions: tensors in, tensors out, in float64.

Orientation follows the paper: rows are tokens and a linear map is ``y = x W``.
"""

from .cr import CRDecomposition, channel_scores, couples, cr_decomposition
from .experts import with_pseudo_tokens
from .norm import norm_energy
from .nystrom import NystromDecomposition, nystrom_decomposition, ridge_leverage_scores
from .svd import SVDDecomposition, svd_decomposition

__all__ = [
    "CRDecomposition",
    "NystromDecomposition",
    "SVDDecomposition",
    "channel_scores",
    "couples",
    "cr_decomposition",
    "norm_energy",
    "nystrom_decomposition",
    "ridge_leverage_scores",
    "svd_decomposition",
    "with_pseudo_tokens",
]
