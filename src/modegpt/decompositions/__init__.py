"""The paper's three decompositions as pure functions: tensors in, tensors out, in float64.

Orientation follows the paper: rows are tokens and a linear map is ``y = x W``.
"""

from .cr import CRDecomposition, channel_scores, cr_decomposition, pair_scores
from .nystrom import NystromDecomposition, nystrom_decomposition, ridge_leverage_scores
from .svd import SVDDecomposition, svd_decomposition

__all__ = [
    "CRDecomposition",
    "NystromDecomposition",
    "SVDDecomposition",
    "channel_scores",
    "cr_decomposition",
    "nystrom_decomposition",
    "pair_scores",
    "ridge_leverage_scores",
    "svd_decomposition",
]
