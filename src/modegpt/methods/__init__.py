"""Compression methods by name. A new one is a subclass of :class:`Method` and a line here."""

from .base import Allocation, Calibrated, Ladder, Method, Solution
from .flap import FLAP
from .greedy import Greedy
from .magnitude import Magnitude
from .modegpt import ModeGPT
from .obc import OBC
from .shortgpt import ShortGPT

METHODS: dict[str, type[Method]] = {method.name: method for method in (Greedy, ModeGPT, Magnitude, OBC, FLAP, ShortGPT)}

__all__ = [
    "FLAP",
    "METHODS",
    "OBC",
    "Allocation",
    "Calibrated",
    "Greedy",
    "Ladder",
    "Magnitude",
    "Method",
    "ModeGPT",
    "ShortGPT",
    "Solution",
]
