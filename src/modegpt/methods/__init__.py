"""Compression methods by name. A new one is a subclass of :class:`Method` and a line here."""

from .base import Allocation, Calibrated, Ladder, Method, Solution
from .greedy import Greedy
from .modegpt import ModeGPT

METHODS: dict[str, type[Method]] = {method.name: method for method in (Greedy, ModeGPT)}

__all__ = ["METHODS", "Allocation", "Calibrated", "Greedy", "Ladder", "Method", "ModeGPT", "Solution"]
