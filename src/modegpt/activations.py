"""The hidden states that wait between two layers: in memory, or on disk where memory is short."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .files import storing, sync


class Activations:
    """The inputs (B, T, d) of the next layer, one tensor for each batch; None before the first layer.

    While a layer runs, each batch's output takes the place of its input.
    """

    def __init__(self, batches: int) -> None:
        self._states: list[torch.Tensor | None] = [None] * batches

    def get(self, number: int) -> torch.Tensor | None:
        """The next layer's input for batch ``number``."""
        return self._states[number]

    def put(self, number: int, state: torch.Tensor) -> None:
        """Keep the output of the running layer for batch ``number``."""
        if not state.is_cuda:
            self._states[number] = state
            return
        host = self._states[number]
        if host is None:
            host = torch.empty_like(state, device="cpu", pin_memory=True)
        # In stream order, hence after the copy of this batch's input to the device has been made.
        self._states[number] = host.copy_(state, non_blocking=True)

    def copy(self) -> Activations:
        """The same states, to go another way."""
        result = Activations(len(self._states))
        # Clones, since on a GPU's behalf they are overwritten in place.
        result._states = [None if state is None else state.clone() for state in self._states]
        return result

    def complete(self, layer: int) -> None:
        """All batches are there: from now on these are the inputs of ``layer``."""

    def restore(self, layer: int) -> bool:
        """Take up the inputs of ``layer`` that an earlier run left, if it did."""
        return False

    def remove(self) -> None:
        """Forget everything."""
        self._states = [None] * len(self._states)


class DiskActivations(Activations):
    """Hidden states in a folder: for every layer a directory of one file for each batch.

    A directory gets its name when all its files are on disk, and only then the one before it goes. So after an
    interruption there is always a complete one, unless somebody removed it.
    """

    def __init__(self, batches: int, folder: Path) -> None:
        self._batches = batches
        self._folder = folder
        self._current: Path | None = None
        self._next = folder / "incomplete"

    def get(self, number: int) -> torch.Tensor | None:
        return None if self._current is None else load_file(self._current / _name(number))["hidden"]

    def put(self, number: int, state: torch.Tensor) -> None:
        with storing(f"--offload-folder: {self._folder}"):
            self._next.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": state.cpu().contiguous()}, self._next / _name(number))

    def complete(self, layer: int) -> None:
        with storing(f"--offload-folder: {self._folder}"):
            self._next.mkdir(parents=True, exist_ok=True)  # there may be no batches
            for path in self._next.iterdir():
                sync(path)
            previous, self._current = self._current, self._directory(layer)
            shutil.rmtree(self._current, ignore_errors=True)
            os.rename(self._next, self._current)
            sync(self._folder)
            if previous is not None:
                shutil.rmtree(previous)

    def restore(self, layer: int) -> bool:
        shutil.rmtree(self._next, ignore_errors=True)
        directory = self._directory(layer)
        try:
            for number in range(self._batches):
                with safe_open(directory / _name(number), framework="pt"):
                    pass  # a truncated file is refused here
        except (OSError, SafetensorError):
            return False
        self._current = directory
        return True

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._current = None

    def _directory(self, layer: int) -> Path:
        return self._folder / f"inputs-{layer:05d}"


def _name(number: int) -> str:
    return f"batch-{number:05d}.safetensors"
