"""The errors modegpt raises on purpose. Each message is one line a user can act on."""

from __future__ import annotations


class ModeGPTError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequest(ModeGPTError, ValueError):
    """The request cannot be carried out as given; nothing was started."""


class CheckpointError(ModeGPTError):
    """A checkpoint is missing, incomplete or inconsistent."""


class NumericalError(ModeGPTError):
    """The model produced NaN or infinite activations."""


class StorageError(ModeGPTError):
    """A file could not be written."""
