"""Compression methods by name. A new one is a subclass of one of :mod:`modegpt.methods.base` and a line here."""

from .base import Allocation, Calibrated, Ladder, Method, OwnAllocation, Solution
from .factorised import ASVD, SVD, SVDLLM, JointRankK
from .flap import FLAP
from .greedy import Greedy
from .magnitude import Magnitude
from .modegpt import ModeGPT
from .obc import OBC
from .shortgpt import ShortGPT
from .sleb import SLEB
from .slicegpt import SliceGPT

_METHODS: tuple[type[Method], ...] = (
    *(Greedy, ModeGPT, Magnitude, OBC, FLAP, ShortGPT, SLEB, SliceGPT),
    *(SVD, ASVD, SVDLLM, JointRankK),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _METHODS}

__all__ = [
    "ASVD",
    "FLAP",
    "METHODS",
    "OBC",
    "SLEB",
    "SVD",
    "SVDLLM",
    "Allocation",
    "Calibrated",
    "Greedy",
    "JointRankK",
    "Ladder",
    "Magnitude",
    "Method",
    "ModeGPT",
    "OwnAllocation",
    "ShortGPT",
    "SliceGPT",
    "Solution",
]
