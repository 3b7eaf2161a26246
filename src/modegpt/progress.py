"""How a run says where it is. The engine reports to a :class:`Progress`; how it looks is decided elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Does nothing but measure: the quiet progress, and the base of the visible ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, steps: int | None = None) -> Iterator[None]:
        """Enter a phase; its wall-clock time is kept in ``seconds``.

        It has ``steps`` steps, each ended by :meth:`advance`; without, one that ends with the phase.
        """
        started = time.perf_counter()
        self._start(name, steps or 1)
        try:
            yield
            if steps is None:
                self.advance()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self._stop()

    def detail(self, text: str) -> None:
        """Say what is being done within the current step."""

    def note(self, text: str) -> None:
        """Say something that is worth a line."""

    def advance(self) -> None:
        """One step of the current phase is done."""

    def _start(self, name: str, steps: int) -> None: ...

    def _stop(self) -> None: ...
