"""Compression methods by name. A new one is a subclass of :class:`Method` and a line here."""

from .base import Method, Solution
from .modegpt import ModeGPT

METHODS: dict[str, type[Method]] = {ModeGPT.name: ModeGPT}

__all__ = ["METHODS", "Method", "ModeGPT", "Solution"]
