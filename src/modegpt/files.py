"""Writing files that survive a crash: whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import StorageError


def sync(path: Path) -> None:
    """Have the operating system put ``path`` on disk (directories cannot be opened everywhere)."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file beside ``path``, then put it in its place in one step.

    After a crash at any moment ``path`` holds what it held before, or all of the new content.
    """
    temporary = path.with_name(f"{path.name}.incomplete")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def storing(what: str, *, resumes: bool = True) -> Iterator[None]:
    """Turn a failure to write ``what`` within this context into a :class:`StorageError` that says how to go on.

    ``resumes`` tells that the same command goes on where it was; else it starts again, and nothing is left behind.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        after = "what is finished so far is kept: once that is mended, repeat the command to go on"
        problem = getattr(error, "strerror", None) or error
        raise StorageError(f"{what}: {problem}; {after if resumes else 'nothing was written'}") from error


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def existing_parent(path: Path) -> Path:
    """The closest directory above ``path`` that exists."""
    return next(parent for parent in path.resolve().parents if parent.exists())
