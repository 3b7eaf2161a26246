"""What a compression has finished, on disk, so that an interrupted run can go on.

A directory beside the output holds one safetensors file for every finished layer and a manifest that is
replaced in one step. The inputs of the next layer need not be in it: running the finished layers gives them again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file, save_file
from typing_extensions import Self

from .data import TokenWindows
from .errors import InvalidRequest, NumericalError
from .files import replace_file, sha256_of, storing
from .kept import KeptOnDisk
from .parallel import restarts
from .results import LayerResult

#: Where an older checkpoint waits while the new one is put in its place.
REPLACED = "replaced"
_MANIFEST, _LOCK, _WINDOWS = "manifest.json", "lock", "windows.safetensors"


class _LayerRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str
    result: LayerResult


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    format: Literal[1] = 1
    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    starts: int = 0
    fingerprint: dict[str, Any]
    scores: dict[str, list[Any]] = {}
    layers: dict[int, _LayerRecord] = {}
    perplexity: dict[str, float] = {}
    published: str | None = None
    states: Path | None = None
    windows: str | None = None

    @model_validator(mode="after")
    def _own_states(self) -> Self:
        """What is removed with the run must be the run's."""
        if self.states is not None and self.states.name != f"modegpt-{self.run}":
            raise ValueError("not the folder of this run")
        return self


class Journal:
    """The progress of one compression, durable after every call that changes it. Made by :func:`open_journal`."""

    def __init__(self, directory: Path, manifest: _Manifest) -> None:
        self.directory = directory
        self._manifest = manifest
        self.profile = directory / "profile"
        self.kept = KeptOnDisk(self.profile)
        self._broken = [index for index, record in manifest.layers.items() if not self._intact(index, record)]
        for index in self._broken:
            del manifest.layers[index]

    def begin(self, offload: Path | None) -> None:
        """Note that the run is started, again perhaps, with its hidden states in the folder ``offload``."""
        manifest = self._manifest
        states = None if offload is None else offload / f"modegpt-{manifest.run}"
        if manifest.states not in (None, states):
            shutil.rmtree(manifest.states, ignore_errors=True)  # an interrupted run had them elsewhere
        manifest.states = states
        manifest.starts += 1
        self._write()

    @property
    def worth_keeping(self) -> bool:
        """Whether anything was finished."""
        return bool(self._manifest.layers or self._manifest.scores or self.kept.profile or self.windows())

    @property
    def run(self) -> str:
        """A name of this run that no other has."""
        return self._manifest.run

    @property
    def states(self) -> Path | None:
        """The folder for hidden states, this run's own; None where they stay in memory."""
        return self._manifest.states

    @property
    def starts(self) -> int:
        """How often this run was started, this time included."""
        return self._manifest.starts

    @property
    def finished(self) -> dict[int, LayerResult]:
        """The finished layers."""
        return {index: record.result for index, record in sorted(self._manifest.layers.items())}

    @property
    def broken(self) -> list[int]:
        """Layers that were finished once and whose files were found damaged or missing: to be done again."""
        return self._broken

    def scores(self, name: str) -> list[Any] | None:
        """The scores of that name for every layer, once they are known."""
        return self._manifest.scores.get(name)

    def keep_scores(self, name: str, scores: list[Any]) -> None:
        """Note scores of every layer, in what JSON can hold."""
        self._manifest.scores[name] = scores
        self._write()

    def perplexity(self, model: str) -> float | None:
        """The perplexity of the ``dense`` or the ``compressed`` model, once it is known."""
        return self._manifest.perplexity.get(model)

    def keep_perplexity(self, model: str, value: float) -> None:
        """Note a perplexity."""
        self._manifest.perplexity[model] = value
        self._write()

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of finished layer ``index``, by their names in the layer."""
        tensors: dict[str, torch.Tensor] = load_file(self.file(index))
        return tensors

    def keep_layer(self, index: int, tensors: Mapping[str, torch.Tensor], result: LayerResult) -> None:
        """Put a finished layer on disk; raises :class:`StorageError`, and loses nothing, when that fails."""
        file = self.file(index)
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with storing(str(self.directory)):
            file.parent.mkdir(exist_ok=True)
            replace_file(file, lambda path: save_file(on_host, path, metadata={"format": "pt"}))
            record = _LayerRecord(bytes=file.stat().st_size, sha256=sha256_of(file), result=result)
        self._manifest.layers[index] = record
        self._write()

    def windows(self) -> TokenWindows | None:
        """The calibration windows that were sampled from the model, once they are."""
        file, known = self.directory / _WINDOWS, self._manifest.windows
        if known is None or not file.is_file() or sha256_of(file) != known:
            return None
        return TokenWindows(load_file(file)["ids"])

    def keep_windows(self, windows: TokenWindows) -> None:
        """Keep sampled windows, which take long to make."""
        with storing(str(self.directory)):
            replace_file(self.directory / _WINDOWS, lambda path: save_file({"ids": windows.ids}, path))
        self._manifest.windows = sha256_of(self.directory / _WINDOWS)
        self._write()

    def file(self, index: int) -> Path:
        """Where layer ``index`` is kept."""
        return self.directory / "layers" / f"{index:05d}.safetensors"

    @property
    def published(self) -> str | None:
        """The hash of the report of the checkpoint that this run was about to put in place, if it came so far."""
        return self._manifest.published

    def announce(self, report_hash: str | None) -> None:
        """Note that the checkpoint with this report is complete and is now being put in place (None: not any more)."""
        self._manifest.published = report_hash
        self._write()

    def remove(self) -> None:
        """The run is over: nothing of it is needed any more."""
        if self.states is not None:
            shutil.rmtree(self.states, ignore_errors=True)
        # The manifest last, so that a directory without one is never work that could go on.
        for path in self.directory.iterdir():
            if path.name not in (_MANIFEST, _LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.directory)

    def _intact(self, index: int, record: _LayerRecord) -> bool:
        file = self.file(index)
        return file.is_file() and file.stat().st_size == record.bytes and sha256_of(file) == record.sha256

    def _write(self) -> None:
        content = self._manifest.model_dump_json(indent=1).encode()
        with storing(str(self.directory)):
            replace_file(self.directory / _MANIFEST, lambda path: path.write_bytes(content))


def work_directory(output: Path) -> Path:
    """Where an unfinished compression into ``output`` is kept: beside it, so that a rename can finish it."""
    target = output.resolve()
    return target.with_name(f".{target.name}.unfinished")


@dataclass(frozen=True)
class LeftBehind:
    """What an interrupted run left: its work directory, the report's hash it announced, its hidden states' folder."""

    directory: Path
    announced: str | None
    states: Path | None


def left_behind(output: Path) -> LeftBehind:
    """What an interrupted run into ``output`` left, as far as its manifest can be read."""
    directory = work_directory(output)
    try:
        manifest = _Manifest.model_validate_json((directory / _MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return LeftBehind(directory, None, None)
    return LeftBehind(directory, manifest.published, manifest.states)


@contextmanager
def open_journal(
    output: Path, fingerprint: Mapping[str, Any], *, restart: bool, offload: Path | None = None
) -> Iterator[Journal]:
    """The journal of the compression into ``output``: a new one, or that of an interrupted run to go on with.

    ``fingerprint`` is everything the result depends on, ``offload`` a folder for hidden states. Raises
    :class:`InvalidRequest` when another process is at it, and when the interrupted run's fingerprint is another one,
    unless ``restart`` throws that run away.
    """
    directory = work_directory(output)
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=60 if restarts() else 0)  # the process before may still be ending
    except Timeout:
        raise InvalidRequest(f"--output {str(output)!r}: another compression into it is running") from None
    except OSError as error:
        raise InvalidRequest(f"--output {str(output)!r}: {directory} is not writable: {error.strerror}") from error
    try:
        put_back(directory, output.resolve())
        manifest = _manifest(output, dict(fingerprint), restart)
        journal = Journal(directory, manifest)
        try:
            journal.begin(offload)
            yield journal
        except (InvalidRequest, NumericalError):
            if not journal.finished:
                journal.remove()  # the same command would fail in the same way
            raise
        finally:
            if directory.exists() and not journal.worth_keeping:
                journal.remove()
    finally:
        lock.release()


def put_back(directory: Path, target: Path) -> None:
    """Give an older checkpoint its place again, if a run was interrupted while exchanging it for the new one."""
    replaced = directory / REPLACED
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)


def _manifest(output: Path, fingerprint: dict[str, Any], restart: bool) -> _Manifest:
    directory = work_directory(output)
    path = directory / _MANIFEST
    fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read back
    new = _Manifest(run=uuid4().hex, fingerprint=fingerprint)
    if restart or not path.is_file():
        if (states := left_behind(output).states) is not None:
            shutil.rmtree(states, ignore_errors=True)
        for entry in directory.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else os.unlink(entry)
        return new
    try:
        found = _Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidRequest(
            f"{path} is not the manifest of an interrupted run; --restart throws that directory's content away"
        ) from error
    _compare(fingerprint, found, directory)
    return found


def check_unfinished(output: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
    """Refuse to go on with unfinished work that :func:`open_journal` would refuse to go on with."""
    if (work_directory(output) / _MANIFEST).is_file() and not restart:
        _manifest(output, dict(fingerprint), restart)


def _compare(fingerprint: dict[str, Any], found: _Manifest, directory: Path) -> None:
    names = sorted(fingerprint.keys() | found.fingerprint.keys())
    differing = [
        f"{name} (then {_short(found.fingerprint.get(name))}, now {_short(fingerprint.get(name))})"
        for name in names
        if found.fingerprint.get(name) != fingerprint.get(name)
    ]
    if differing:
        raise InvalidRequest(
            f"an interrupted run in {directory} differs in {'; '.join(differing)}: repeat its command to go on, or "
            "give --restart to throw its work away"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
