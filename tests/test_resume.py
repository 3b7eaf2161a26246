"""An interrupted compression loses nothing that was finished, and takes nothing broken for finished."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import Outcome, compress_arguments, process_command, random_text, run_cli, snapshot, tiny_llama
from modegpt import cli, pipeline
from modegpt.activations import DiskActivations
from modegpt.data import TokenWindows
from modegpt.engine import Engine
from modegpt.errors import NumericalError, StorageError
from modegpt.files import replace_file
from modegpt.journal import Journal, open_journal, work_directory
from modegpt.methods import ModeGPT
from modegpt.results import LayerResult, ModuleResult
from modegpt.runner import LayerRunner
from modegpt.shards import write_shards

RUN_LAYER, SERIALIZE = LayerRunner.run_layer, safetensors.torch.serialize_file
LAYERS = 3
KILLED = -9
WORK = ".small.unfinished"


# Processes that die at a chosen step


@dataclass(frozen=True)
class Attempt:
    """A ``modegpt`` command in ``where``, and when it ends early.

    It does at the first step that matches the last of ``moments``, patterns that have to be met one after the
    other, or ``delay`` seconds after its start. A step is a file opened, written, renamed or removed, or a layer run.
    """

    where: Path
    arguments: Sequence[object]
    moments: Sequence[str] = ()
    full: bool = False
    """Whether the disk is full from then on, instead of the process being killed."""
    delay: float | None = None


class Steps:
    """Counts a process's steps, names them on its standard output, and ends it at the chosen one."""

    def __init__(self, attempt: Attempt) -> None:
        self._moments = list(attempt.moments)
        self._full = attempt.full
        self._root = os.path.realpath(attempt.where)
        self._over = False

    def take(self, name: str) -> None:
        if self.last(name):
            self.end()

    def last(self, name: str) -> bool:
        os.write(1, f"{name}\n".encode())
        if self._moments and re.search(self._moments[0], name):
            self._over = len(self._moments) == 1
            del self._moments[0]
            return self._over
        return False

    def end(self) -> None:
        if not self._full:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
            return
        paths = [os.fspath(name) for name in arguments[: 2 if event == "os.rename" else 1] if not isinstance(name, int)]
        inside = [os.path.relpath(path, self._root) for path in paths if isinstance(path, str)]
        if not inside or any(path.startswith("..") for path in inside):
            return
        writes = event in ("os.mkdir", "open") and (event == "os.mkdir" or bool(arguments[2] & os.O_CREAT))
        if self._full and self._over and writes:
            self.end()
        self.take(" ".join([event.removeprefix("os."), *inside]))

    def torn(self, write: Callable[..., Any], position: int) -> Callable[..., Any]:
        """``write``, of whose file only the first half gets to the disk where the process ends."""

        def wrapper(*arguments: Any, **options: Any) -> Any:
            path = arguments[position]
            last = self.last(f"write {os.path.relpath(path, self._root)}") or (self._full and self._over)
            result = write(*arguments, **options)
            if last:
                os.truncate(path, os.path.getsize(path) // 2)
                self.end()
            return result

        return wrapper

    def run_layer(self, runner: LayerRunner, index: int, *arguments: Any, **options: Any) -> None:
        self.take(f"run {index}")
        RUN_LAYER(runner, index, *arguments, **options)


def carry_out(attempt: Attempt, out: int, err: int) -> int:
    os.chdir(attempt.where)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv = ["modegpt", *map(str, attempt.arguments)]
    steps = Steps(attempt)
    sys.addaudithook(steps.audit)
    try:
        with (
            patch("safetensors.torch.serialize_file", steps.torn(SERIALIZE, 1)),
            patch.object(Path, "write_bytes", steps.torn(Path.write_bytes, 0)),
            patch.object(Path, "write_text", steps.torn(Path.write_text, 0)),
            patch.object(LayerRunner, "run_layer", lambda *given, **options: steps.run_layer(*given, **options)),
            patch("os.fsync"),  # what a killed process wrote is there without it
        ):
            cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve(connection: Connection, warm_up: list[object]) -> None:
    """Carry out attempts, each in a fork of this process, which has imported and compiled everything by then."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert run_cli(*warm_up).code == 0
    while attempt := connection.recv():
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os._exit(carry_out(attempt, out.fileno(), err.fileno()))
            if attempt.delay is not None:
                time.sleep(attempt.delay)
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            connection.send(Outcome(code, out.read().decode(), err.read().decode()))


Fork = Callable[[Attempt], Outcome]


@pytest.fixture(scope="module")
def fork(tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """Carries out one attempt in a process of its own, without the seconds that a start takes."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    warm_up = compress_arguments(tiny_checkpoint, tmp_path_factory.mktemp("warm") / "small", text_file, "--quiet")
    server = context.Process(target=serve, args=(there, warm_up), daemon=True)
    server.start()
    there.close()

    def carry_out_there(attempt: Attempt) -> Outcome:
        here.send(attempt)
        outcome: Outcome = here.recv()
        return outcome

    yield carry_out_there
    here.send(None)
    server.join()


# What a run is to give, and what is left of it


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a checkpoint but the one that is different every time."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def without_option(files: dict[str, bytes], option: str) -> dict[str, bytes]:
    return {name: content.replace(f" {option}".encode(), b"") for name, content in files.items()}


@dataclass
class Runs:
    """Compressions of the tiny model into ``small`` in some directory, with relative paths in the command."""

    fork: Fork
    model: Path
    text: Path
    scratch: Path
    _known: dict[tuple[object, ...], tuple[dict[str, bytes], list[str]]] = field(default_factory=dict)
    _left: dict[tuple[object, ...], Path] = field(default_factory=dict)

    def command(self, *options: object) -> list[object]:
        return compress_arguments(self.model, "small", self.text, "--quiet", *options)

    def attempt(
        self,
        where: Path,
        options: Sequence[object],
        moments: Sequence[str] = (),
        *,
        full: bool = False,
        delay: float | None = None,
    ) -> Outcome:
        return self.fork(Attempt(where, self.command(*options), moments, full, delay))

    def empty(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def uninterrupted(self, options: Sequence[object]) -> tuple[dict[str, bytes], list[str]]:
        """The files that these options give, and the steps on the way."""
        if tuple(options) not in self._known:
            where = self.empty()
            outcome = self.attempt(where, options)
            assert outcome.code == 0, outcome.err
            self._known[tuple(options)] = contents(where / "small"), outcome.out.splitlines()
        return self._known[tuple(options)]

    def interrupt(self, where: Path, options: Sequence[object], *moments: str) -> Path:
        """Leave in ``where`` what a run that is killed leaves; returns the work directory."""
        key = (*options, *moments)
        if key not in self._left:
            self._left[key] = self.empty()
            outcome = self.attempt(self._left[key], options, moments)
            assert outcome.code == KILLED, outcome.err
        shutil.copytree(self._left[key], where, dirs_exist_ok=True)
        return where / WORK

    def check(self, where: Path, options: Sequence[object]) -> None:
        """The checkpoint is there as if nothing had happened, and nothing else is."""
        assert contents(where / "small") == self.uninterrupted(options)[0]
        assert [path for path in where.rglob("*") if path.is_file() and where / "small" not in path.parents] == []
        assert not (where / WORK).exists()


@pytest.fixture(scope="module")
def runs(fork: Fork, tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(fork, tiny_checkpoint, text_file, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here survives a crash of the machine anyhow
    return directory


SEQUENTIAL: list[object] = ["--statistics", "sequential"]
DENSE: list[object] = ["--statistics", "dense"]
OFFLOADED: list[object] = [*SEQUENTIAL, "--offload-folder", "states"]
OFFLOADED_DENSE: list[object] = [*DENSE, "--offload-folder", "states"]
NOTED = r"rename .*manifest.json$"
LAYER_1 = r"rename .*layers/00001"
IN_PLACE = r"rename \S+/checkpoint small$"
SCORED = ["run 2", NOTED]
TWO_LAYERS = [LAYER_1, NOTED, "."]
ALL_LAYERS = [r"rename .*layers/00002", NOTED, "."]


# Killing


@pytest.mark.parametrize(
    "options",
    [SEQUENTIAL, DENSE, OFFLOADED, OFFLOADED_DENSE],
    ids=["sequential", "dense", "offloaded", "offloaded-dense"],
)
def test_a_run_killed_again_and_again_loses_nothing(runs: Runs, tmp_path: Path, options: list[object]) -> None:
    steps = runs.uninterrupted(options)[1]
    last = next(number for number, step in enumerate(steps) if re.search(IN_PLACE, step))
    draw = random.Random(0)
    for _ in range(6):
        outcome = runs.attempt(tmp_path, options, ["."] * draw.randint(1, last))
        assert outcome.code in (0, KILLED), outcome.err
        if outcome.code == 0:
            break
    else:
        outcome = runs.attempt(tmp_path, options)
    assert (outcome.code, outcome.err) == (0, "")
    runs.check(tmp_path, options)


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["open .*lock"], id="at the very beginning"),
        pytest.param([NOTED], id="before the first manifest"),
        pytest.param(["run 1"], id="while scoring"),
        pytest.param(["run 2", "write .*manifest"], id="while the scores are noted"),
        pytest.param([*SCORED, "run 0"], id="before the first layer"),
        pytest.param(["write .*layers/00001"], id="in the middle of a layer's file"),
        pytest.param([LAYER_1], id="before a layer's file gets its name"),
        pytest.param([LAYER_1, "open .*manifest"], id="between a layer's file and the manifest"),
        pytest.param([LAYER_1, "write .*manifest"], id="in the middle of the manifest"),
        pytest.param([LAYER_1, NOTED], id="before the manifest gets its name"),
        pytest.param(TWO_LAYERS, id="between two layers"),
        pytest.param(ALL_LAYERS, id="after the last layer"),
        pytest.param([*ALL_LAYERS, "run 2", NOTED], id="while a perplexity is noted"),
        pytest.param([*ALL_LAYERS, "run 2", "run 1"], id="while the compressed model is measured"),
        pytest.param(["open .*checkpoint/model.safetensors", "open .*layers/00001"], id="while the layers are joined"),
        pytest.param(["write .*compression.json"], id="in the middle of the report"),
        pytest.param(["write .*run.json", NOTED], id="before the checkpoint is announced"),
        pytest.param(["write .*run.json", NOTED, "."], id="after the checkpoint was announced"),
        pytest.param([IN_PLACE], id="before the checkpoint gets its name"),
        pytest.param([IN_PLACE, "."], id="after the checkpoint got its name"),
        pytest.param([IN_PLACE, "rmdir .*layers"], id="while tidying up"),
        pytest.param([IN_PLACE, "remove .*manifest"], id="at the end of tidying up"),
    ],
)
def test_a_run_killed_at_any_moment_goes_on(runs: Runs, tmp_path: Path, moments: list[str]) -> None:
    assert runs.attempt(tmp_path, SEQUENTIAL, moments).code == KILLED
    outcome = runs.attempt(tmp_path, SEQUENTIAL)
    assert (outcome.code, outcome.err) == (0, "")
    runs.check(tmp_path, SEQUENTIAL)


@pytest.mark.parametrize("options", [OFFLOADED, OFFLOADED_DENSE], ids=["sequential", "dense"])
@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["write .*scores-.*batch-00003"], id="while a score's input is written"),
        pytest.param([*SCORED, "write .*compress-.*batch-00003"], id="while a layer's input is written"),
        pytest.param(["rename .*compress-.*inputs-00002"], id="before all inputs are there"),
        pytest.param(["rename .*compress-.*inputs-00002", "remove"], id="before the inputs before go"),
        pytest.param(["rename .*compress-.*inputs-00002", "remove", "."], id="while the inputs before go"),
        pytest.param(["rename .*evaluate-.*inputs-00002", "."], id="while measuring"),
    ],
)
def test_a_run_killed_at_its_hidden_states_goes_on(
    runs: Runs, tmp_path: Path, options: list[object], moments: list[str]
) -> None:
    assert runs.attempt(tmp_path, options, moments).code == KILLED
    outcome = runs.attempt(tmp_path, options)
    assert (outcome.code, outcome.err) == (0, "")
    runs.check(tmp_path, options)


@pytest.fixture
def old_checkpoint(runs: Runs, tmp_path: Path) -> dict[str, bytes]:
    """The files of a checkpoint of another ratio in ``tmp_path``."""
    assert runs.attempt(tmp_path, ["--ratio", 0.2]).code == 0
    return contents(tmp_path / "small")


EXCHANGE = r"rename small \S+/replaced$"
OVERWRITE: list[object] = [*SEQUENTIAL, "--overwrite"]


@pytest.mark.parametrize(
    ("moments", "there"),
    [
        pytest.param(["write .*run.json", NOTED, "."], True, id="after the checkpoint was announced"),
        pytest.param([EXCHANGE], True, id="before the exchange"),
        pytest.param([EXCHANGE, "rename"], False, id="between the two renames"),
    ],
)
def test_a_run_killed_while_replacing_a_checkpoint_keeps_the_old_one_until_the_new_one_is_there(
    runs: Runs, tmp_path: Path, old_checkpoint: dict[str, bytes], moments: list[str], there: bool
) -> None:
    assert runs.attempt(tmp_path, OVERWRITE, moments).code == KILLED
    assert contents(tmp_path / "small" if there else tmp_path / WORK / "replaced") == old_checkpoint
    assert runs.attempt(tmp_path, OVERWRITE).code == 0
    runs.check(tmp_path, OVERWRITE)


@pytest.mark.parametrize("moments", [[], ["remove"], ["rmdir .*replaced"]], ids=["first", "during", "last"])
def test_a_run_killed_after_replacing_a_checkpoint_only_tidies_up(
    runs: Runs, tmp_path: Path, old_checkpoint: dict[str, bytes], moments: list[str]
) -> None:
    assert runs.attempt(tmp_path, OVERWRITE, [EXCHANGE, IN_PLACE, *(moments or ["."])]).code == KILLED
    outcome = runs.attempt(tmp_path, OVERWRITE)
    assert (outcome.code, "run 0" in outcome.out) == (0, False)
    runs.check(tmp_path, OVERWRITE)


def test_restart_keeps_the_old_checkpoint_of_an_interrupted_exchange(
    runs: Runs, tmp_path: Path, old_checkpoint: dict[str, bytes]
) -> None:
    assert runs.attempt(tmp_path, OVERWRITE, [EXCHANGE, "rename"]).code == KILLED
    assert runs.attempt(tmp_path, [*OVERWRITE, "--restart"], ["run 0"]).code == KILLED
    kept = [path for path in (tmp_path / "small", tmp_path / WORK / "replaced") if path.exists()]
    assert [contents(path) for path in kept] == [old_checkpoint]


def test_an_old_checkpoint_is_not_taken_for_the_announced_one(runs: Runs, tmp_path: Path) -> None:
    assert runs.attempt(tmp_path, OVERWRITE).code == 0
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert runs.attempt(tmp_path, OVERWRITE, ["write .*run.json", NOTED, "."]).code == KILLED
    assert runs.attempt(tmp_path, OVERWRITE, [r"mkdir \S+/checkpoint$"]).code == KILLED
    assert runs.attempt(tmp_path, OVERWRITE).code == 0
    runs.check(tmp_path, OVERWRITE)


@pytest.mark.parametrize("options", [SEQUENTIAL, OFFLOADED_DENSE], ids=["sequential", "offloaded-dense"])
def test_a_run_killed_by_the_clock_loses_nothing(runs: Runs, tmp_path: Path, options: list[object]) -> None:
    started = time.monotonic()
    runs.attempt(runs.empty(), options)
    longest, draw = time.monotonic() - started, random.Random(0)
    for _ in range(8):
        outcome = runs.attempt(tmp_path, options, delay=draw.uniform(0, longest))
        assert outcome.code in (0, KILLED), outcome.err
        if (tmp_path / "small").exists():
            break
    if not (tmp_path / "small").exists() or (tmp_path / WORK / "manifest.json").exists():
        outcome = runs.attempt(tmp_path, options)
        assert (outcome.code, outcome.err) == (0, "")
        runs.check(tmp_path, options)
    assert contents(tmp_path / "small") == runs.uninterrupted(options)[0]


def test_a_process_killed_by_the_clock_loses_nothing(runs: Runs, tmp_path: Path) -> None:
    options, draw = [*SEQUENTIAL, "--samples", 64], random.Random(0)
    command = process_command(*(argument for argument in runs.command(*options) if argument != "--quiet"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for phase in ("Scoring layers", "Compressing layers"):
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any(phase in line for line in process.stderr)
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
        if (tmp_path / "small").exists():
            break
    if not (tmp_path / "small").exists() or (tmp_path / WORK / "manifest.json").exists():
        assert runs.attempt(tmp_path, options).code == 0
    files = without_option(contents(tmp_path / "small"), "--quiet")
    assert files == without_option(runs.uninterrupted(options)[0], "--quiet")


# What is not done again


@dataclass
class Work:
    """What a run in this process did."""

    outcome: Outcome
    kept: list[int]
    """Layers that were put on disk."""
    solved: int
    """How many layers were solved."""
    scored: bool


def go_on(runs: Runs, options: Sequence[object]) -> Work:
    with (
        patch.object(Journal, "keep_layer", autospec=True, side_effect=Journal.keep_layer) as keep,
        patch.object(Journal, "keep_scores", autospec=True, side_effect=Journal.keep_scores) as score,
        patch.object(ModeGPT, "mlp", autospec=True, side_effect=ModeGPT.mlp) as solve,
    ):
        outcome = run_cli(*runs.command(*options))
    return Work(outcome, [call.args[1] for call in keep.call_args_list], solve.call_count, score.called)


@pytest.mark.parametrize(
    ("moments", "open_layers"),
    [
        ([*SCORED, "run 0"], [0, 1, 2]),
        ([LAYER_1, "open .*manifest"], [1, 2]),
        (TWO_LAYERS, [2]),
        (ALL_LAYERS, []),
        ([IN_PLACE], []),
    ],
    ids=["scored", "file", "two", "all", "complete"],
)
@pytest.mark.parametrize("options", [SEQUENTIAL, OFFLOADED_DENSE], ids=["sequential", "offloaded-dense"])
def test_what_is_finished_is_not_done_again(
    runs: Runs, here: Path, options: list[object], moments: list[str], open_layers: list[int]
) -> None:
    runs.interrupt(here, options, *moments)
    work = go_on(runs, options)
    assert (work.outcome, work.kept) == (Outcome(0, "", ""), open_layers)
    assert (work.solved, work.scored) == (len(open_layers), False)
    runs.check(here, options)


def test_a_measured_perplexity_is_not_measured_again(runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.interrupt(here, SEQUENTIAL, "write .*run.json")
    monkeypatch.setattr(Engine, "perplexity", Mock(side_effect=AssertionError("measured again")))
    assert run_cli(*runs.command(*SEQUENTIAL)).code == 0
    runs.check(here, SEQUENTIAL)


def test_the_record_counts_the_starts(runs: Runs, here: Path) -> None:
    runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    assert run_cli(*runs.command(*SEQUENTIAL)).code == 0
    assert json.loads((here / "small" / "run.json").read_text())["starts"] == 2


def states(directory: Path) -> list[Path]:
    return sorted((directory / "states").rglob("*.safetensors"))


def remove_all(files: list[Path]) -> None:
    shutil.rmtree(files[0].parents[3])


def truncate_one(files: list[Path]) -> None:
    os.truncate(files[3], files[3].stat().st_size // 2)


def empty_one(files: list[Path]) -> None:
    os.truncate(files[-1], 0)


@pytest.mark.parametrize("damage", [remove_all, truncate_one, empty_one, lambda files: files[0].unlink()])
@pytest.mark.parametrize("options", [OFFLOADED, OFFLOADED_DENSE], ids=["sequential", "dense"])
def test_damaged_hidden_states_are_computed_again(
    runs: Runs, here: Path, options: list[object], damage: Callable[[list[Path]], None]
) -> None:
    runs.interrupt(here, options, *TWO_LAYERS, "run 2")
    damage(states(here))
    assert go_on(runs, options).kept == [2]
    runs.check(here, options)


@pytest.mark.parametrize(
    ("options", "moments", "layer"),
    [
        pytest.param(OFFLOADED, [*TWO_LAYERS, "run 2"], 2, id="sequential"),
        pytest.param(OFFLOADED_DENSE, [*TWO_LAYERS, "run 2"], 2, id="dense"),
        pytest.param(OFFLOADED, ["write .*layers/00001"], 1, id="sequential, solved"),
        pytest.param(OFFLOADED_DENSE, ["write .*layers/00001"], 1, id="dense, solved"),
    ],
)
def test_hidden_states_on_disk_spare_the_layers_before(
    runs: Runs, tmp_path: Path, options: list[object], moments: list[str], layer: int
) -> None:
    runs.interrupt(tmp_path, options, *moments)
    steps = runs.attempt(tmp_path, options).out.splitlines()
    first = next(step for step in steps if step.startswith("run "))
    assert first == f"run {layer}"


def test_the_offload_folder_is_empty_at_the_end(runs: Runs, here: Path) -> None:
    assert run_cli(*runs.command(*OFFLOADED)).code == 0
    assert not (here / "states").exists() or list((here / "states").iterdir()) == []


@pytest.mark.parametrize("options", [[*OFFLOADED, "--restart"], SEQUENTIAL], ids=["restart", "in memory"])
def test_hidden_states_of_an_interrupted_run_go_with_it(runs: Runs, here: Path, options: list[object]) -> None:
    runs.interrupt(here, OFFLOADED, *TWO_LAYERS, "run 2")
    assert run_cli(*runs.command(*options)).code == 0
    assert states(here) == []


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (NumericalError("NaN"), 1)], ids=["interrupted", "NaN"]
)
def test_a_run_that_leaves_no_work_leaves_no_hidden_states(
    runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail_at_the_second(runner: LayerRunner, index: int, *arguments: Any, **options: Any) -> None:
        if index == 1:
            raise error
        RUN_LAYER(runner, index, *arguments, **options)

    monkeypatch.setattr(LayerRunner, "run_layer", fail_at_the_second)
    assert run_cli(*runs.command(*OFFLOADED)).code == code
    assert not (here / WORK).exists()
    assert states(here) == []


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "missing": Path.unlink,
    "flipped": flip_byte,
}


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_layer_and_no_other_is_done_again(
    runs: Runs, here: Path, damage: Callable[[Path], object], layer: int
) -> None:
    work = runs.interrupt(here, SEQUENTIAL, *ALL_LAYERS)
    damage(work / "layers" / f"{layer:05d}.safetensors")
    again = go_on(runs, SEQUENTIAL)
    assert (again.outcome.code, again.kept, again.solved, again.scored) == (0, [layer], 1, False)
    runs.check(here, SEQUENTIAL)


@pytest.mark.parametrize("options", [DENSE, OFFLOADED, OFFLOADED_DENSE], ids=["dense", "offloaded", "offloaded-dense"])
def test_a_damaged_layer_between_others_is_done_again(runs: Runs, here: Path, options: list[object]) -> None:
    work = runs.interrupt(here, options, *TWO_LAYERS)
    flip_byte(work / "layers" / "00000.safetensors")
    assert go_on(runs, options).kept == [0, 2]
    runs.check(here, options)


# The manifest


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"not JSON",
        lambda content: b"\xff\xfe",
        lambda content: b"[]",
        lambda content: b"{}",
        lambda content: content.replace(b'"format": 1', b'"format": "?"'),
    ],
    ids=["cut off", "empty", "text", "bytes", "list", "no keys", "another format"],
)
def test_a_damaged_manifest_is_refused_until_restart(runs: Runs, here: Path, damage: Callable[[bytes], bytes]) -> None:
    manifest = runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS) / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    before = snapshot(here)
    refused = run_cli(*runs.command(*SEQUENTIAL))
    assert (refused.code, refused.out) == (2, "")
    assert re.fullmatch(r"modegpt: [^\n]*manifest\.json [^\n]*--restart[^\n]*\n", refused.err)
    assert snapshot(here) == before
    assert run_cli(*runs.command(*SEQUENTIAL, "--restart")).code == 0
    assert without_option(contents(here / "small"), "--restart") == runs.uninterrupted(SEQUENTIAL)[0]
    assert [path.name for path in here.iterdir()] == ["small"]


def test_restart_does_all_again(runs: Runs, here: Path) -> None:
    runs.interrupt(here, SEQUENTIAL, *ALL_LAYERS)
    again = go_on(runs, [*SEQUENTIAL, "--restart"])
    assert (again.outcome, again.kept, again.scored) == (Outcome(0, "", ""), [0, 1, 2], True)
    assert without_option(contents(here / "small"), "--restart") == runs.uninterrupted(SEQUENTIAL)[0]
    assert json.loads((here / "small" / "run.json").read_text())["starts"] == 1


# Other commands


def refused_as_another(runs: Runs, here: Path, *options: object) -> str:
    before = snapshot(here)
    outcome = run_cli(*runs.command(*SEQUENTIAL, *options))
    assert (outcome.code, outcome.out) == (2, "")
    found = re.fullmatch(r"modegpt: an interrupted run in [^\n]+ differs in ([^\n]+): repeat [^\n]+\n", outcome.err)
    assert found is not None, outcome.err
    assert "--restart" in outcome.err
    assert snapshot(here) == before
    return found[1]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--ratio", 0.4], "--ratio (then 0.3, now 0.4)"),
        (["--statistics", "dense"], '--statistics (then "sequential", now "dense")'),
        (["--modules", "mlp,vo"], '--modules (then ["mlp", "qk", "vo"], now ["mlp", "vo"])'),
        (["--ridge", 1e-3], "--ridge (then 0.0001, now 0.001)"),
        (["--dtype", "float32"], '--dtype (then "auto", now "float32")'),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value[0]),
)
def test_another_option_is_refused_with_both_values(
    runs: Runs, here: Path, options: list[object], difference: str
) -> None:
    runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    assert refused_as_another(runs, here, *options) == difference


def test_every_difference_is_named(runs: Runs, here: Path) -> None:
    runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    found = refused_as_another(runs, here, "--seed", 1, "--ratio", 0.4, "--batch-size", 2)
    names = [part.split(" (")[0] for part in found.split("; ")]
    assert names == ["--batch-size", "--ratio", "--seed", "the calibration tokens"]


def test_another_text_is_refused(runs: Runs, here: Path, other_text_file: Path) -> None:
    runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    found = refused_as_another(runs, here, "--calibration", other_text_file)
    assert all(name in found for name in ("--calibration (", "the calibration tokens", "the evaluation tokens"))


def test_other_content_of_the_same_text_file_is_refused(runs: Runs, here: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(random_text(60, seed=2))
    options = [*SEQUENTIAL, "--calibration", text, "--evaluate", "none"]
    assert runs.attempt(here, options, TWO_LAYERS).code == KILLED
    text.write_text(random_text(60, seed=3))
    found = refused_as_another(runs, here, "--calibration", text, "--evaluate", "none")
    assert found.startswith("the calibration tokens (then ")
    assert ";" not in found


def test_other_weights_at_the_same_path_are_refused(
    fork: Fork, runs: Runs, here: Path, checkpoint_copy: Path, text_file: Path, tmp_path: Path
) -> None:
    own = Runs(fork, checkpoint_copy, text_file, tmp_path)
    assert own.attempt(here, SEQUENTIAL, TWO_LAYERS).code == KILLED
    flip_byte(checkpoint_copy / "model.safetensors")
    found = refused_as_another(own, here)
    assert found.startswith("the model's weights (then ")
    assert found.count("then") == 1


@pytest.mark.parametrize("package", ["modegpt", "torch"])
def test_another_version_is_refused(runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    versions = pipeline.versions()
    monkeypatch.setattr(pipeline, "versions", lambda: versions | {package: "99"})
    expected = f'the version of {package} (then "{versions[package]}", now "99")'
    assert refused_as_another(runs, here) == expected


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (SEQUENTIAL, OFFLOADED),
        (OFFLOADED, [*SEQUENTIAL, "--offload-folder", "elsewhere"]),
        (SEQUENTIAL, [*SEQUENTIAL, "--devices", "1"]),
        (SEQUENTIAL, OVERWRITE),
    ],
    ids=["offload", "elsewhere", "devices", "overwrite"],
)
def test_options_that_change_nothing_go_on(runs: Runs, here: Path, then: list[object], now: list[object]) -> None:
    runs.interrupt(here, then, *TWO_LAYERS)
    assert go_on(runs, now).kept == [2]
    expected = runs.uninterrupted(SEQUENTIAL)[0]
    files = contents(here / "small")
    assert files["model.safetensors"] == expected["model.safetensors"]
    options = [*now, "--quiet"][2:]
    for option in [" ".join(map(str, options[:-1])), "--quiet"]:
        files, expected = without_option(files, option), without_option(expected, option)
    assert files == expected


def test_a_loud_run_goes_on_after_a_quiet_one(runs: Runs, here: Path) -> None:
    runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    outcome = run_cli(*(argument for argument in runs.command(*SEQUENTIAL) if argument != "--quiet"))
    assert (outcome.code, outcome.out.splitlines()[-1]) == (0, "Checkpoint: small")


def test_more_processes_than_batches_lose_nothing(runs: Runs, here: Path) -> None:
    work = runs.interrupt(here, SEQUENTIAL, *TWO_LAYERS)
    refused = run_cli(*runs.command(*SEQUENTIAL), "--devices", 9)
    assert (refused.code, "use fewer processes" in refused.err) == (2, True)
    assert work.exists()
    assert go_on(runs, SEQUENTIAL).kept == [2]


def test_a_second_process_at_the_same_output_is_refused(
    runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[Outcome] = []
    run = Engine.run

    def run_while_another_starts(engine: Engine, *arguments: Any) -> Any:
        seconds.extend(runs.attempt(here, [*SEQUENTIAL, *options]) for options in ([], ["--restart"]))
        return run(engine, *arguments)

    monkeypatch.setattr(Engine, "run", run_while_another_starts)
    first = run_cli(*runs.command(*SEQUENTIAL))
    line = "modegpt: --output 'small': another compression into it is running\n"
    assert [(second.code, second.err) for second in seconds] == [(2, line)] * 2
    assert first == Outcome(0, "", "")
    runs.check(here, SEQUENTIAL)


def test_the_published_checkpoint_is_refused_to_another_command(runs: Runs, here: Path) -> None:
    runs.interrupt(here, SEQUENTIAL, IN_PLACE, ".")
    assert refused_as_another(runs, here, "--ratio", 0.4) == "--ratio (then 0.3, now 0.4)"
    refused = run_cli(*runs.command(*SEQUENTIAL, "--ratio", 0.4, "--restart"))
    assert (refused.code, "is not empty" in refused.err) == (2, True)
    assert contents(here / "small") == runs.uninterrupted(SEQUENTIAL)[0]


# Text sampled from the model


SELF: list[object] = [
    *("--calibration", "self", "--samples", 3, "--sequence-length", 8, "--batch-size", 3, "--evaluation-samples", 1)
]
SAMPLED = ["rename .*windows.safetensors$", NOTED, "."]


@pytest.fixture
def mixed(text_file: Path, other_text_file: Path) -> list[object]:
    """A run on two files and on text of the model's own."""
    return [
        *("--calibration", f"{text_file}:2,self,{other_text_file}", "--samples", 5, "--sequence-length", 8),
        *("--allocation", "sensitivity", "--evaluation-samples", 1),
    ]


def test_sampled_windows_are_not_sampled_again(runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.interrupt(here, SELF, *SAMPLED)
    monkeypatch.setattr(pipeline, "sample_from_model", Mock(side_effect=AssertionError("sampled again")))
    assert go_on(runs, SELF).kept == [0, 1, 2]
    runs.check(here, SELF)


def test_sampled_windows_of_a_mixture_are_not_sampled_again(
    runs: Runs, here: Path, mixed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.interrupt(here, mixed, *SAMPLED)
    monkeypatch.setattr(pipeline, "sample_from_model", Mock(side_effect=AssertionError("sampled again")))
    assert go_on(runs, mixed).kept == [0, 1, 2]
    runs.check(here, mixed)


def test_perplexities_of_a_mixture_are_not_measured_again(runs: Runs, here: Path, mixed: list[object]) -> None:
    """Interrupted once the dense and the compressed model were measured on the first text."""
    work = runs.interrupt(here, mixed, *ALL_LAYERS, NOTED, NOTED, NOTED, ".")
    known = json.loads((work / "manifest.json").read_text())["perplexity"]
    with patch.object(Engine, "perplexity", autospec=True, side_effect=Engine.perplexity) as measured:
        assert go_on(runs, mixed).kept == []
    assert 0 < len(known) < 4
    assert measured.call_count == 4 - len(known)
    runs.check(here, mixed)


def test_nothing_is_sampled_for_a_checkpoint_in_its_place(
    runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before was interrupted while it removed its journal, of which the windows were first."""
    (runs.interrupt(here, SELF, IN_PLACE, ".") / "windows.safetensors").unlink()
    monkeypatch.setattr(pipeline, "sample_from_model", Mock(side_effect=AssertionError("sampled again")))
    outcome = run_cli(*(argument for argument in runs.command(*SELF) if argument != "--quiet"))
    assert (outcome.code, "Going on" in outcome.err) == (0, False)
    runs.check(here, SELF)


def test_half_written_windows_are_sampled_again(runs: Runs, here: Path) -> None:
    runs.interrupt(here, SELF, "write .*windows.safetensors")
    assert go_on(runs, SELF).outcome == Outcome(0, "", "")
    runs.check(here, SELF)


@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, id=name) for name, damage in DAMAGES.items()],
)
def test_damaged_windows_are_sampled_again(runs: Runs, here: Path, damage: Callable[[Path], object]) -> None:
    damage(runs.interrupt(here, SELF, *SAMPLED) / "windows.safetensors")
    assert go_on(runs, SELF).outcome == Outcome(0, "", "")
    runs.check(here, SELF)


# Disk


@pytest.mark.parametrize(
    ("moments", "kept"),
    [
        pytest.param(["write .*layers/00000"], [], id="first layer"),
        pytest.param(["write .*layers/00001"], [0], id="second layer"),
        pytest.param([LAYER_1, "open .*manifest"], [0], id="manifest"),
        pytest.param([*ALL_LAYERS, "write .*manifest"], [0, 1, 2], id="perplexity"),
        pytest.param([r"mkdir \S+/checkpoint$"], [0, 1, 2], id="checkpoint"),
        pytest.param(["open .*checkpoint/model.safetensors"], [0, 1, 2], id="weights"),
        pytest.param(["write .*compression.json"], [0, 1, 2], id="report"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    runs: Runs, here: Path, moments: list[str], kept: list[int]
) -> None:
    outcome = runs.attempt(here, SEQUENTIAL, moments, full=True)
    assert outcome.code == 1
    assert re.fullmatch(r"modegpt: [^\n]*No space left on device[^\n]*repeat the command to go on\n", outcome.err)
    assert sorted(map(int, json.loads((here / WORK / "manifest.json").read_text())["layers"])) == kept
    assert not (here / "small").exists()
    assert go_on(runs, SEQUENTIAL).kept == [layer for layer in range(LAYERS) if layer not in kept]
    runs.check(here, SEQUENTIAL)


def test_a_disk_full_from_the_start_leaves_nothing(runs: Runs, here: Path) -> None:
    outcome = runs.attempt(here, SEQUENTIAL, ["write .*manifest"], full=True)
    assert outcome.code == 1
    assert re.fullmatch(r"modegpt: [^\n]*No space left on device[^\n]*\n", outcome.err)
    assert list(here.iterdir()) == []


def test_a_full_offload_folder_is_one_line(runs: Runs, here: Path) -> None:
    outcome = runs.attempt(here, OFFLOADED, [*SCORED, "write .*states.*batch-00003"], full=True)
    assert outcome.code == 1
    assert re.fullmatch(r"modegpt: [^\n]*No space left on device[^\n]*\n", outcome.err)
    assert run_cli(*runs.command(*OFFLOADED)).code == 0
    runs.check(here, OFFLOADED)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, empty."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield disk
    os.chdir(tmp_path)
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_is_one_line(runs: Runs, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_disk)
    keep, filler = Journal.keep_layer, small_disk / "filler"

    def keep_on_a_full_disk(journal: Journal, index: int, *arguments: Any) -> None:
        if index == 1:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        keep(journal, index, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "keep_layer", keep_on_a_full_disk)
        outcome = run_cli(*runs.command(*SEQUENTIAL))
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch(r"modegpt: [^\n]*No space left on device[^\n]*repeat the command to go on\n", outcome.err)
    filler.unlink()
    assert go_on(runs, SEQUENTIAL).kept == [1, 2]
    runs.check(small_disk, SEQUENTIAL)


def test_a_read_only_disk_is_refused_before_any_work(
    runs: Runs, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(pipeline, "read_texts", Mock(side_effect=AssertionError("work was done")))
    outcome = run_cli(*runs.command(*SEQUENTIAL))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"modegpt: --output 'small': '{small_disk}' is not writable\n"


def test_a_read_only_parent_is_refused_before_any_work(runs: Runs, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    # Not chmod: nothing is read-only to the user that tests in a container run as.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here and access(path, mode))
    monkeypatch.setattr(pipeline, "read_texts", Mock(side_effect=AssertionError("work was done")))
    outcome = run_cli(*runs.command(*SEQUENTIAL))
    assert (outcome.code, outcome.err) == (2, f"modegpt: --output 'small': '{here}' is not writable\n")
    assert list(here.iterdir()) == []


# The parts


def test_a_replaced_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[tuple[Path, str]], dict[str, torch.Tensor]]:
    """Files of tensors of many types with a prefix each, and all tensors by their full names."""
    generator = torch.Generator().manual_seed(0)
    files: list[tuple[Path, str]] = []
    tensors: dict[str, torch.Tensor] = {}
    for number, prefix in enumerate(["", "model.layers.0.", "model.layers.1."]):
        own = {
            "odd": torch.randn(3, generator=generator).to(torch.bfloat16),
            "half": torch.randn(5, 3, generator=generator).half(),
            "wide": torch.randn(2, 7, generator=generator).double(),
            "single": torch.randn(11, generator=generator),
            "index": torch.randint(9, (3,), generator=generator),
            "empty": torch.empty(0, 4),
            "scalar": torch.tensor(1.5),
        }
        save_file(own, path := tmp_path / f"part-{number}.safetensors")
        files.append((path, prefix))
        tensors |= {f"{prefix}{name}": tensor for name, tensor in own.items()}
    return files, tensors


def offsets(file: Path) -> dict[str, tuple[str, int]]:
    """The dtype of every tensor in a safetensors file and where in the file it begins."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {
        name: (facts["dtype"], 8 + length + facts["data_offsets"][0])
        for name, facts in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize(("limit", "shards"), [(10**9, 1), (600, 2), (1, 3)])
def test_joined_files_hold_the_same_tensors(
    tmp_path: Path,
    parts: tuple[list[tuple[Path, str]], dict[str, torch.Tensor]],
    limit: int,
    shards: int,
) -> None:
    files, tensors = parts
    directory = tmp_path / "joined"
    directory.mkdir()
    write_shards(files, directory, limit)
    written = sorted(directory.glob("*.safetensors"))
    found = {name: tensor for file in written for name, tensor in load_file(file).items()}
    assert len(written) == shards
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensor.dtype and found[name].equal(tensor) for name, tensor in tensors.items())
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    assert all(start % sizes[dtype] == 0 for file in written for dtype, start in offsets(file).values())
    for file in written:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    if shards > 1:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert {name: directory / file for name, file in index["weight_map"].items()} == {
            name: file for file in written for name in load_file(file)
        }


@pytest.mark.parametrize("limit", [10**9, 40_000])
def test_joined_files_are_a_model_to_transformers(tmp_path: Path, limit: int) -> None:
    model = tiny_llama()
    state = model.state_dict()
    directory = tmp_path / "joined"
    model.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    files = []
    for prefix in ("", *(f"model.layers.{index}." for index in range(LAYERS))):
        own = {
            n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix or ("model.e", "model.n", "lm"))
        }
        save_file(own, path := tmp_path / f"{prefix}safetensors")
        files.append((path, prefix))
    write_shards(files, directory, limit)
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    assert loaded.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in loaded.state_dict().items())
    assert len(list(directory.glob("*.safetensors"))) == (1 if limit > 10**6 else LAYERS + 1)


RESULT = LayerResult({"mlp": 0.1 + 0.2}, {"mlp": ModuleResult(3, 4, 1 / 3, [0, 1, 2])})


def test_a_journal_gives_back_what_was_put_in(tmp_path: Path) -> None:
    output, tensors = tmp_path / "small", {"a": torch.randn(3, 4), "b": torch.arange(3)}
    windows = TokenWindows(torch.randint(9, (2, 5)))
    with open_journal(output, {"--ratio": 0.3}, restart=False) as journal:
        journal.keep_windows(windows)
        journal.keep_scores("some", [[1 / 3, 0.1, 1e-17]])
        journal.keep_layer(7, tensors, RESULT)
        journal.keep_perplexity("dense", 1 / 7)
        run = journal.run
    with open_journal(output, {"--ratio": 0.3}, restart=False) as journal:
        assert (journal.run, journal.starts, journal.broken) == (run, 2, [])
        assert journal.scores("some") == [[1 / 3, 0.1, 1e-17]]
        assert journal.finished == {7: RESULT}
        assert (journal.perplexity("dense"), journal.perplexity("compressed")) == (1 / 7, None)
        assert all(journal.tensors(7)[name].equal(tensor) for name, tensor in tensors.items())
        assert (kept := journal.windows()) is not None
        assert kept.ids.equal(windows.ids)
        assert journal.published is None
    with open_journal(output, {"--ratio": 0.3}, restart=True) as journal:
        assert (journal.starts, journal.finished, journal.scores("some"), journal.windows()) == (1, {}, None, None)
        assert journal.run != run


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_journal_keeps_a_perplexity_beyond_all_numbers(tmp_path: Path, value: float) -> None:
    output = tmp_path / "small"
    with open_journal(output, {}, restart=False) as journal:
        journal.keep_scores("some", [0.1])
        journal.keep_perplexity("dense", value)
    with open_journal(output, {}, restart=False) as journal:
        assert str(journal.perplexity("dense")) == str(value)


def test_a_journal_without_anything_finished_leaves_nothing(tmp_path: Path) -> None:
    with open_journal(tmp_path / "small", {}, restart=False) as journal:
        assert journal.directory == work_directory(tmp_path / "small") == tmp_path / WORK
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_cannot_be_kept_takes_none_before_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, tensors = tmp_path / "small", {"a": torch.ones(3)}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with open_journal(output, {}, restart=False) as journal:
        journal.keep_layer(0, tensors, RESULT)
        with monkeypatch.context() as patched:
            patched.setattr("modegpt.journal.save_file", Mock(side_effect=full))
            with pytest.raises(StorageError, match="No space left on device; what is finished so far is kept"):
                journal.keep_layer(1, tensors, RESULT)
        assert list(journal.finished) == [0]
    with open_journal(output, {}, restart=False) as journal:
        assert list(journal.finished) == [0]


def fill(activations: DiskActivations, layer: int) -> None:
    for number in range(2):
        activations.put(number, torch.full((1, 2, 3), float(layer + number)))
    activations.complete(layer)


def test_hidden_states_on_disk_come_back_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "states" / "run"
    activations = DiskActivations(2, folder)
    assert activations.get(0) is None
    for layer in (1, 2):
        fill(activations, layer)
    assert [path.name for path in folder.iterdir()] == ["inputs-00002"]
    activations.put(0, torch.zeros(1, 2, 3))

    later = DiskActivations(2, folder)
    assert not later.restore(1)
    assert later.get(0) is None
    assert later.restore(2)
    assert [path.name for path in folder.iterdir()] == ["inputs-00002"]
    assert [float(state.mean()) for number in range(2) if (state := later.get(number)) is not None] == [2, 3]
    later.remove()
    assert not folder.exists()


def test_incomplete_hidden_states_are_not_taken_up(tmp_path: Path) -> None:
    fill(DiskActivations(2, tmp_path), 1)
    assert not DiskActivations(3, tmp_path).restore(1)
    file = next((tmp_path / "inputs-00001").iterdir())
    os.truncate(file, file.stat().st_size - 1)
    assert not DiskActivations(2, tmp_path).restore(1)
