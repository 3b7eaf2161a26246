"""Several processes on one compression: real ``torchrun`` groups on a tiny model, against one process alone.

``torchrun`` runs this file too: see the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from family_table import BY_NAME
from helpers import Outcome, compress_arguments, random_text, run_cli, run_process
from modegpt import cli, parallel, statistics
from modegpt.activations import DiskActivations
from modegpt.costs import spread
from modegpt.data import random_windows, split_held_out, tokenize
from modegpt.engine import Engine
from modegpt.errors import InvalidRequest
from modegpt.journal import Journal, work_directory
from modegpt.parallel import ProcessGroup, Workers
from modegpt.report import CompressionReport, RunFacts
from modegpt.solving import LayerSolver
from modegpt.sources import ModelSource

# Seven windows are shared unevenly by two and by three; two windows of evaluation leave the third worker none.
FEW = ("--quiet", "--samples", 7, "--evaluation-samples", 2)
STATISTICS: dict[str, tuple[object, ...]] = {
    "sequential": ("--statistics", "sequential"),
    "dense": ("--statistics", "dense", "--batch-size", 2),
    "greedy": ("--method", "greedy"),
}


#: Fewer than there are tokens.
ROWS = 50


# What a group does


def torchrun(processes: int, *command: object, restarts: int = 0) -> Outcome:
    """Run ``command`` (``-m module`` or a script, and its arguments) in a group of processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", f"--max-restarts={restarts}", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def several(plan: str) -> None:
    """Run many commands in one group, and note how each ended in this process."""
    folder, commands, interrupted = json.loads(Path(plan).read_text())
    distributed.init_process_group("gloo")
    with (
        patch.object(distributed, "init_process_group"),  # it is there already
        patch.object(distributed, "destroy_process_group"),
        patch.object(statistics, "SAMPLED_ROWS", ROWS),
    ):
        crew = ProcessGroup()
        outcomes = {}
        for name, command in commands.items():
            with ExitStack() as stack:
                if name == interrupted:
                    stack.enter_context(patch.object(Engine, "keep_layer", interrupting_after(1)))
                outcomes[name] = vars(run_cli(*command))
        torch.save({"outcomes": outcomes, "exchange": exchange(crew)}, Path(folder) / f"{crew.rank}.pt")
    distributed.destroy_process_group()


def exchange(crew: ProcessGroup) -> dict[str, Any]:
    """What this worker holds after every kind of exchange."""
    sums = [torch.full((2, 3), 2.0**-40 + crew.rank, dtype=torch.float64), torch.tensor(2**40 + crew.rank)]
    for tensor in sums:
        crew.sum(tensor)
    copies = [torch.full((2,), crew.rank + 1).to(dtype) for dtype in (torch.int64, torch.float64, torch.bfloat16)]
    for tensor in copies:
        crew.copy(tensor, source=1)
    cpu = torch.device("cpu")
    return {
        "share": crew.share(range(7)),
        "sums": sums,
        "copies": copies,
        "told": [crew.tell({"rank": crew.rank}), crew.tell(crew.rank, source=1), crew.tell(None)],
        "tensors": crew.tensors(tensors_of_rank_1() if crew.rank == 1 else None, 1, cpu),
        "none": crew.tensors({} if crew.first else None, 0, cpu),
    }


def tensors_of_rank_1() -> dict[str, torch.Tensor]:
    return {
        "int64": torch.arange(6).view(2, 3),
        "float64": torch.tensor([torch.pi], dtype=torch.float64),
        "float32": torch.tensor(1e-30),
        "strided": torch.arange(12.0).view(3, 4)[:, ::2],
        "bfloat16": torch.tensor([[0.1], [torch.inf]], dtype=torch.bfloat16),
    }


def interrupting_after(layer: int) -> Callable[..., None]:
    """``Engine.keep_layer`` as if the user interrupted once ``layer`` is kept."""
    keep = Engine.keep_layer

    def keep_and_stop(self: Engine, index: int, *args: Any, **options: Any) -> None:
        keep(self, index, *args, **options)
        if index == layer:
            raise KeyboardInterrupt

    return keep_and_stop


def killed(rank: str, log: str, *command: str) -> None:
    """``modegpt`` in a group whose ``rank`` kills itself after layer 1, unless it was started again already."""
    solve, keep, complete = LayerSolver.ladders, Engine.keep_layer, DiskActivations.complete
    mine = os.environ["RANK"]
    dies = parallel.restarts() == 0 and mine == rank

    def logged_solve(self: LayerSolver, index: int, *args: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{parallel.restarts()} {index}\n")
        return solve(self, index, *args)

    def deadly_keep(self: Engine, index: int, *args: Any, **options: Any) -> None:
        keep(self, index, *args, **options)
        if dies and rank == "0" and index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_complete(self: DiskActivations, layer: int) -> None:
        if dies and rank == "1" and layer == 2 and self._folder.name.startswith("compress"):
            while not (self._folder.with_name("compress-0-of-2") / "inputs-00002").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        complete(self, layer)

    if parallel.restarts() == 1:  # the killed one comes last: the other must not look for it where it was
        if mine != rank:
            Path(f"{log}-back").touch()
        while not Path(f"{log}-back").exists():
            time.sleep(0.01)
        time.sleep(0 if mine != rank else 1)
    with (
        patch.object(LayerSolver, "ladders", logged_solve),
        patch.object(Engine, "keep_layer", deadly_keep),
        patch.object(DiskActivations, "complete", deadly_complete),
        patch.object(sys, "argv", ["modegpt", *command]),
    ):
        cli.main()


# What it left


def assert_same_result(directory: Path, reference: Path) -> None:
    """Equal ranks and kept indices, weights equal to 1e-6, the same perplexities, the same files."""
    one, other = CompressionReport.read(directory), CompressionReport.read(reference)
    for layer, expected in zip(one.layers, other.layers, strict=True):
        for name, module in layer.modules.items():
            assert (module.rank, module.kept) == (expected.modules[name].rank, expected.modules[name].kept)
    assert one.perplexity is not None
    assert other.perplexity is not None
    assert one.perplexity.model_dump() == pytest.approx(other.perplexity.model_dump(), rel=1e-6)
    assert (one.calibration, one.evaluation) == (other.calibration, other.evaluation)
    assert {path.name for path in directory.iterdir()} == {path.name for path in reference.iterdir()}
    tensors, expected_tensors = (load_file(path / "model.safetensors") for path in (directory, reference))
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=1e-6, atol=1e-6, msg=name)


def run_facts(directory: Path) -> RunFacts:
    facts = RunFacts.read(directory)
    assert facts is not None
    return facts


@dataclass(frozen=True)
class Group:
    """A finished :func:`several`."""

    outputs: Path
    processes: list[dict[str, Any]]

    def outcomes(self, name: str) -> list[Outcome]:
        """How the command ``name`` ended in every process."""
        return [Outcome(**process["outcomes"][name]) for process in self.processes]


@pytest.fixture(scope="module")
def command(tiny_checkpoint: Path, text_file: Path) -> Callable[..., list[object]]:
    def arguments(output: Path, *options: object) -> list[object]:
        return compress_arguments(tiny_checkpoint, output, text_file, *FEW, *options)

    return arguments


@pytest.fixture(scope="module")
def alone(command: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process, by the name of their statistics."""
    folder = tmp_path_factory.mktemp("alone")
    for name, options in STATISTICS.items():
        with patch.object(statistics, "SAMPLED_ROWS", ROWS):
            assert run_cli(*command(folder / name, *options)).code == 0
    return folder


def run_several(folder: Path, processes: int, commands: dict[str, list[object]], interrupted: str = "") -> Group:
    plan = folder / "plan.json"
    plan.write_text(json.dumps([folder, commands, interrupted], default=str))
    outcome = torchrun(processes, __file__, "several", plan)
    assert outcome.code == 0, outcome.err
    return Group(folder / "outputs", [torch.load(folder / f"{rank}.pt") for rank in range(processes)])


@pytest.fixture(scope="module")
def three(command: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("three")
    return run_several(
        folder, 3, {name: command(folder / "outputs" / name, *options) for name, options in STATISTICS.items()}
    )


@pytest.fixture(scope="module")
def two(
    command: Callable[..., list[object]],
    tiny_checkpoint: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Group:
    folder = tmp_path_factory.mktemp("two")
    outputs = folder / "outputs"
    commands = {name: command(outputs / name, *options) for name, options in STATISTICS.items()}
    for name in ("offloaded", "handed over"):
        commands[name] = command(outputs / name, "--offload-folder", folder / "states" / name)
    model, text, seed = seen_by_rank_1_alone(folder, tiny_checkpoint)
    options = (*FEW, "--seed", seed, "--offload-folder", folder / "states" / "failed")
    commands["failed"] = compress_arguments(model, outputs / "failed", text, *options)
    commands["refused"] = command(outputs / "refused", "--samples", 1)

    commands["begun alone"] = command(outputs / "begun alone")
    with patch.object(Engine, "keep_layer", interrupting_after(1)):
        assert run_cli(*commands["begun alone"]).code == 130
    group = run_several(folder, 2, commands, interrupted="handed over")
    assert {outcome.code for outcome in group.outcomes("handed over")} == {130}
    assert run_cli(*commands["handed over"]).code == 0
    return group


def seen_by_rank_1_alone(folder: Path, checkpoint: Path) -> tuple[Path, Path, int]:
    """A model with NaN at one token, a text, and a seed that gives the only window with that token to rank 1."""
    source = ModelSource(str(checkpoint))
    tokenizer, model = source.tokenizer(), source.model()
    text = folder / "one-q.txt"
    text.write_text(random_text(5, seed=2) + "\nQ\n" + random_text(20, seed=3))
    (token,) = tokenize(tokenizer, "Q").tolist()
    ids, held_out = split_held_out(tokenize(tokenizer, text.read_text()), 32)
    assert token not in held_out

    def share(seed: int) -> set[int]:
        windows = random_windows(ids, 7, 32, seed, what="test").ids
        return {row % 2 for row, window in enumerate(windows) if token in window}

    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(folder / "nan")
    tokenizer.save_pretrained(folder / "nan")
    return folder / "nan", text, next(seed for seed in range(1000) if share(seed) == {1})


@pytest.fixture(scope="module")
def devices(tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run that starts its two processes by itself, and speaks."""
    output = tmp_path_factory.mktemp("devices") / "small"
    options = (*FEW[1:], "--devices", 2)
    return output, run_process(*compress_arguments(tiny_checkpoint, output, text_file, *options))


# Any number of processes


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("group", ["two", "three"])
def test_any_number_of_processes_gives_the_same(
    group: str, statistics: str, alone: Path, request: pytest.FixtureRequest
) -> None:
    finished: Group = request.getfixturevalue(group)
    assert [outcome.code for outcome in finished.outcomes(statistics)] == [0] * len(finished.processes)
    assert_same_result(finished.outputs / statistics, alone / statistics)
    assert run_facts(finished.outputs / statistics).processes == len(finished.processes)


@pytest.mark.parametrize("name", ["qwen3-moe", "olmo2"])
def test_experts_and_norms_over_all_heads_are_the_same_for_two_processes(
    name: str, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = ModelSource(str(tiny_checkpoint)).tokenizer()
    BY_NAME[name].build(vocab_size=len(tokenizer) + 8).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for output, options in (("alone", ()), ("two", ("--devices", 2))):
        arguments = compress_arguments(tmp_path / "model", tmp_path / output, text_file, *FEW, *options)
        outcome = run_process(*arguments)
        assert outcome.code == 0, outcome.err
    assert_same_result(tmp_path / "two", tmp_path / "alone")
    alone, two = (CompressionReport.read(tmp_path / output) for output in ("alone", "two"))
    tokens = [[layer.modules["mlp"].expert_tokens for layer in report.layers] for report in (alone, two)]
    assert tokens[0] == tokens[1]
    assert (name == "olmo2") == all(found is None for found in tokens[0])


@pytest.mark.parametrize(
    ("method", "options"),
    [("obc", ()), ("flap", ()), ("sleb", ()), ("slicegpt", ()), ("magnitude", ("--allocation", "owl"))],
)
def test_structured_baselines_are_the_same_for_two_processes(
    method: str, options: tuple[str, ...], command: Callable[..., list[object]], tmp_path: Path
) -> None:
    for name, devices in (("alone", 1), ("two", 2)):
        output = tmp_path / name
        outcome = run_process(*command(output, "--method", method, *options, "--devices", devices))
        assert outcome.code == 0, outcome.err
    alone, two = (CompressionReport.read(tmp_path / name) for name in ("alone", "two"))
    for one, other in zip(alone.layers, two.layers, strict=True):
        assert one.modules.keys() == other.modules.keys()
        for module, result in one.modules.items():
            assert (result.rank, result.kept) == (other.modules[module].rank, other.modules[module].kept)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two"))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


def test_one_set_of_files_is_written_and_nothing_is_left_over(two: Group, three: Group, alone: Path) -> None:
    assert {path.name for path in alone.iterdir()} == STATISTICS.keys()
    assert {path.name for path in three.outputs.iterdir()} == STATISTICS.keys()
    finished = {*STATISTICS, "offloaded", "handed over", "begun alone"}
    assert {path.name for path in two.outputs.iterdir()} == finished


@pytest.mark.parametrize("name", ["offloaded", "begun alone", "handed over"])
def test_hidden_states_on_disk_and_another_number_of_processes_change_nothing(
    name: str, two: Group, alone: Path
) -> None:
    assert_same_result(two.outputs / name, alone / "sequential")
    facts = run_facts(two.outputs / name)
    expected = {"offloaded": (2, 1), "begun alone": (2, 2), "handed over": (1, 2)}
    assert (facts.processes, facts.starts) == expected[name]


@pytest.mark.parametrize("name", ["offloaded", "handed over", "failed"])
def test_no_hidden_states_are_left_on_disk(name: str, two: Group) -> None:
    assert not list((two.outputs.parent / "states" / name).rglob("*"))


def test_nan_in_one_process_ends_all_of_them(two: Group) -> None:
    for outcome in two.outcomes("failed"):
        assert outcome.code == 1
    assert two.outcomes("failed")[0].err == "modegpt: layer 0: NaN or infinite activations in the layer's output\n"


def test_more_processes_than_batches_are_refused_once(two: Group) -> None:
    first, second = two.outcomes("refused")
    assert (first.code, second.code) == (2, 2)
    assert len(first.err.splitlines()) == 1
    for option in ("--devices", "--samples", "--batch-size"):
        assert option in first.err
    assert not second.err


def test_devices_starts_the_processes_by_itself(devices: tuple[Path, Outcome], alone: Path) -> None:
    output, outcome = devices
    assert outcome.code == 0, outcome.err
    assert_same_result(output, alone / "sequential")
    assert run_facts(output).processes == 2
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_one_process_speaks_for_all(devices: tuple[Path, Outcome]) -> None:
    output, outcome = devices
    assert outcome.out.splitlines()[-1] == f"Checkpoint: {output}"
    assert outcome.out.count("Ratio aimed at") == 1
    assert outcome.err.count("Plan: ") == 1
    assert outcome.err.count("Compressing layers: 3 of 3") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ratio", 1.5), "--ratio"),
        (("--ratio", 0.97), "--ratio"),
        (("--devices", 0), "--devices"),
        (("--devices", "all"), "--devices"),
        pytest.param(("--samples", 1), "--devices"),
        pytest.param(("--samples", 1000), "--calibration"),
        (("--evaluate", "no-such-text"), "--evaluate"),
    ],
)
def test_nothing_is_started_for_a_wrong_request(
    options: tuple[object, ...],
    words: str,
    command: Callable[..., list[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[object] = []
    monkeypatch.setattr(parallel, "launch", lambda *arguments: started.append(arguments) or 0)
    outcome = run_cli(*command(tmp_path / "small", "--devices", 2, *options))
    assert not started
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert words in outcome.err
    assert not list(tmp_path.iterdir())


def test_too_many_processes_cost_no_finished_work(
    command: Callable[..., list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(tmp_path / "small")
    with patch.object(Engine, "keep_layer", interrupting_after(1)):
        assert run_cli(*arguments).code == 130
    assert run_cli(*arguments, "--devices", 100).code == 2
    assert run_cli(*arguments).code == 0
    assert run_facts(tmp_path / "small").starts > 1


# A process that is killed


@dataclass(frozen=True)
class Restarted:
    """A run that lost one process and was started again."""

    outcome: Outcome
    output: Path
    solved: list[tuple[int, int]]
    """Start of the group, layer."""


@pytest.fixture(scope="module", params=[0, 1])
def restarted(
    request: pytest.FixtureRequest, command: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory
) -> Restarted:
    """Rank 0 is killed in a run that throws earlier work away, rank 1 in one with its hidden states on disk."""
    folder = tmp_path_factory.mktemp("killed")
    output, log = folder / "small", folder / "log"
    options = ("--restart",) if request.param == 0 else ("--offload-folder", folder / "states")
    outcome = torchrun(2, __file__, "killed", request.param, log, *command(output, *options), restarts=1)
    solved = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    return Restarted(outcome, output, solved)


def test_a_group_that_lost_a_process_goes_on(restarted: Restarted) -> None:
    assert restarted.outcome.code == 0, restarted.outcome.err
    facts = run_facts(restarted.output)
    assert (facts.processes, facts.starts) == (2, 2)
    assert not work_directory(restarted.output).exists()


def test_finished_layers_are_not_solved_again(restarted: Restarted) -> None:
    assert sorted(restarted.solved) == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 2), (1, 2)]


def test_a_killed_process_changes_nothing(restarted: Restarted, alone: Path) -> None:
    assert_same_result(restarted.output, alone / "sequential")


def test_a_group_that_starts_again_meets_in_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the store that torchrun keeps, what the processes before left is not found."""
    server = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": server.port}
    for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(parallel, "launched", lambda: True)
    keys = [server.num_keys()]
    for start in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        with parallel.workers("cpu"):
            keys.append(server.num_keys())
    assert keys[0] < keys[1] < keys[2]


def test_a_group_finds_the_checkpoint_in_its_place(
    command: Callable[..., list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before was interrupted when only its journal was left to be removed."""
    arguments = command(tmp_path / "small")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove", Mock(side_effect=KeyboardInterrupt))
        assert run_cli(*arguments).code == 130
    assert work_directory(tmp_path / "small").exists()
    outcome = torchrun(2, "-m", "modegpt", *arguments)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_hidden_states_that_only_some_workers_have_are_not_used(
    command: Callable[..., list[object]], alone: Path, tmp_path: Path
) -> None:
    arguments = command(tmp_path / "small", "--offload-folder", tmp_path / "states")
    solve = LayerSolver.ladders

    def interrupted_solve(self: LayerSolver, index: int, *args: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return solve(self, index, *args)

    with patch.object(LayerSolver, "ladders", interrupted_solve):
        assert run_cli(*arguments).code == 130
    with patch.object(Engine, "everywhere", lambda self, true: False):
        assert run_cli(*arguments).code == 0
    assert_same_result(tmp_path / "small", alone / "sequential")


# The parts


def test_a_group_exchanges_what_it_should(two: Group) -> None:
    first, second = (process["exchange"] for process in two.processes)
    assert (first.pop("share"), second.pop("share")) == ([0, 2, 4, 6], [1, 3, 5])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert [tensor.dtype for tensor in first["sums"]] == [torch.float64, torch.int64]
    assert first["sums"][0].unique().tolist() == [1 + 2.0**-39]
    assert int(first["sums"][1]) == 2**41 + 1
    assert [tensor.dtype for tensor in first["copies"]] == [torch.int64, torch.float64, torch.bfloat16]
    assert all(tensor.tolist() == [2, 2] for tensor in first["copies"])
    assert first["told"] == [{"rank": 0}, 1, None]
    torch.testing.assert_close(first["tensors"], tensors_of_rank_1(), rtol=0, atol=0)
    assert first["none"] == {}


def test_a_lone_worker_keeps_everything_as_it_is() -> None:
    worker = Workers()
    assert worker.first
    assert worker.share(range(5)) == [0, 1, 2, 3, 4]
    tensor = torch.arange(3.0)
    worker.sum(tensor)
    worker.copy(tensor, 0)
    assert tensor.tolist() == [0, 1, 2]
    assert worker.tell("word") == "word"
    assert worker.tensors({"name": tensor}, 0, tensor.device) == {"name": tensor}
    assert worker.tensors({}, 0, tensor.device) == {}


@pytest.mark.parametrize("items", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_item_is_shared_exactly_once(size: int, items: int) -> None:
    shares = []
    for rank in range(size):
        worker = Workers()
        worker.rank, worker.size = rank, size
        shares.append(worker.share(range(items)))
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_costliest_task_goes_first_and_to_the_least_busy() -> None:
    assert spread({"a": 1, "b": 3, "c": 2, "d": 2}, 2) == {"b": 0, "c": 1, "d": 1, "a": 0}
    assert spread({"a": 1, "b": 1, "c": 1}, 3) == {"a": 0, "b": 1, "c": 2}
    assert spread({"a": 1, "b": 2}, 1) == {"a": 0, "b": 0}
    assert spread({}, 3) == {}


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("tasks", [1, 3, 20])
def test_tasks_are_spread_evenly(workers: int, tasks: int) -> None:
    numbers = random.Random(0)
    costs = {task: numbers.expovariate(1) for task in range(tasks)}
    owners = spread(costs, workers)
    assert owners.keys() == costs.keys()
    loads = [sum(cost for task, cost in costs.items() if owners[task] == worker) for worker in range(workers)]
    assert max(loads) - min(loads) <= max(costs.values())


@pytest.mark.parametrize(
    ("devices", "device", "gpus", "expected"),
    [(1, "cuda", 4, 1), (3, "cpu", 0, 3), ("auto", "cpu", 4, 1), ("auto", "cuda", 4, 4), (4, "cuda:0", 4, 4)],
)
def test_auto_is_one_process_for_every_gpu(
    devices: int | str, device: str, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert parallel.processes(devices, device) == expected
    assert parallel.processes_here(devices, device) == expected


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidRequest, match="--devices 3: this machine has 2 GPUs"):
        parallel.processes(3, "cuda")


def test_torchrun_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (parallel.processes(1, "cpu"), parallel.processes_here(1, "cpu")) == (16, 8)


def test_the_place_in_a_group_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parallel.launched()
    assert parallel.first_process()
    assert parallel.restarts() == 0
    assert parallel.local_device("cuda:1") == "cuda:1"
    for name, value in {"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 1, "TORCHELASTIC_RESTART_COUNT": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert parallel.launched()
    assert not parallel.first_process()
    assert parallel.restarts() == 2
    assert parallel.local_device("cuda") == "cuda:1"
    assert parallel.local_device("cpu") == "cpu"


def test_a_worker_without_windows_has_no_hidden_states(tmp_path: Path) -> None:
    states = DiskActivations(0, tmp_path / "states")
    states.complete(1)
    states.remove()
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    {"several": several, "killed": killed}[sys.argv[1]](*sys.argv[2:])
