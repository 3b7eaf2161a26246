"""Compression methods by name. A new one is a subclass of :class:`Method` and a line here."""

from .base import Allocation, Calibrated, Ladder, Method, Solution
from .factorised import ASVD, SVD, SVDLLM, JointRankK
from .greedy import Greedy
from .modegpt import ModeGPT

METHODS: dict[str, type[Method]] = {method.name: method for method in (Greedy, ModeGPT, SVD, ASVD, SVDLLM, JointRankK)}

__all__ = [
    "ASVD",
    "METHODS",
    "SVD",
    "SVDLLM",
    "Allocation",
    "Calibrated",
    "Greedy",
    "JointRankK",
    "Ladder",
    "Method",
    "ModeGPT",
    "Solution",
]
