"""Measurements as JSON, with what it takes to repeat them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidRequest
from .files import replace_file, storing
from .report import versions


@dataclass(frozen=True)
class ResultsFile:
    """A JSON file with the ``command`` and its ``settings``, the versions, and what was measured.

    Raises :class:`InvalidRequest` where it cannot be one.
    """

    path: Path
    command: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.path.suffix != ".json" or self.path.is_dir():
            raise InvalidRequest(f"--output {str(self.path)!r}: name a .json file")
        if not self.path.resolve().parent.is_dir():
            raise InvalidRequest(f"--output {str(self.path)!r}: its directory does not exist; make it first")
        if self.path.exists():
            raise InvalidRequest(f"--output {str(self.path)!r} is there already; remove it or choose another")

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write it with these ``facts``; raises :class:`StorageError` where that fails."""
        everything = {"command": self.command, "versions": versions(), "settings": self.settings, **facts}
        text = json.dumps(everything, indent=1, default=str) + "\n"
        with storing(f"--output {self.path}", resumes=False):
            replace_file(self.path, lambda file: file.write_text(text, encoding="utf-8"))
