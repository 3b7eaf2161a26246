"""Compression methods by name. A new one is a subclass of :class:`Method` and a line here."""

from .base import Method, Solution
from .modegpt import ModeGPT

METHODS: dict[str, type[ModeGPT]] = {ModeGPT.name: ModeGPT}

__all__ = ["METHODS", "Method", "ModeGPT", "Solution"]
