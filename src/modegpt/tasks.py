"""Accuracy on the tasks of EleutherAI's lm-evaluation-harness: its prompts, metrics and filters, on models of ours."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import InvalidRequest, ModeGPTError
from .local_tasks import LocalTasks
from .progress import Progress

#: The metric of a task that is shown, where it has several, and those that make a mean over tasks.
SHOWN = ("acc_norm", "acc", "exact_match")
#: Of the harness: what every run begins with.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
#: Samples for the standard errors that have no formula, such as those of perplexities.
BOOTSTRAP = 1000


def harness_version() -> str:
    """That of lm-evaluation-harness."""
    return f"lm_eval {version('lm_eval')}"


@dataclass(frozen=True)
class TaskScore:
    """What one model reached on one task."""

    metrics: Mapping[str, float]
    errors: Mapping[str, float | None]
    """Standard errors of the metrics, where the harness has one."""
    items: int
    few_shot: int | None
    version: str
    files: Mapping[str, str] = field(default_factory=dict)
    """The local files that the rows are from, with their hashes; none where they are from the hub."""
    parts: Mapping[str, TaskScore] = field(default_factory=dict)
    """Those of a group's tasks."""

    @property
    def shown(self) -> str:
        """The name of the metric that the task is judged by."""
        known = [name for wanted in SHOWN for name in self.metrics if name.split(",")[0] == wanted]
        return (known or list(self.metrics))[0]

    @property
    def is_accuracy(self) -> bool:
        """Whether that metric is a share of right answers."""
        return self.shown.split(",")[0] in SHOWN


def mean(scores: Mapping[str, TaskScore]) -> tuple[float, float | None] | None:
    """The mean accuracy over tasks, and its standard error, sqrt(sum of squares) / n; None where no task has one."""
    judged = [score for score in scores.values() if score.is_accuracy]
    if not judged:
        return None
    errors = [score.errors[score.shown] for score in judged]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(judged) if len(known) == len(judged) else None
    return math.fsum(score.metrics[score.shown] for score in judged) / len(judged), error


def degradation(scores: Mapping[str, TaskScore], dense: Mapping[str, TaskScore]) -> float | None:
    """The mean accuracy lost over the ``dense`` mean, as in MoDeGPT's table 11; None without a dense one."""
    own, whole = mean(scores), mean(dense)
    return None if own is None or whole is None or whole[0] == 0 else 1 - own[0] / whole[0]


@dataclass(frozen=True)
class Tasks:
    """Which tasks and groups of tasks of the harness to put to models.

    Their data is the hub's, or that of the local files in ``data``. ``limit`` is how many first rows each task
    asks (None: all), ``num_fewshot`` that of answered examples before each question (None: the task's own). With
    ``chat_template`` questions are a user's turn in the tokenizer's template, and examples turns before it.
    Raises :class:`InvalidRequest` for what cannot be.
    """

    names: Sequence[str]
    data: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        for option, value, least in (("--limit", self.limit, 1), ("--num-fewshot", self.num_fewshot, 0)):
            if value is not None and value < least:
                raise InvalidRequest(f"{option} {value}: must be at least {least}")
        if self.data is not None and not self.data.is_dir():
            raise InvalidRequest(f"--task-data {str(self.data)!r}: no such directory")
        if find_spec("lm_eval") is None:
            raise InvalidRequest("--tasks needs lm-evaluation-harness; install it: pip install lm-eval")

    def check(self, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        """Refuse a ``model`` whose prompts cannot be what they are to be."""
        if self.chat_template and tokenizer.chat_template is None:
            raise InvalidRequest(f"--apply-chat-template: {model!r} has no chat template; leave it out")

    def read(self, progress: Progress | None = None) -> LoadedTasks:
        """The tasks with their data; raises :class:`InvalidRequest` for unknown ones, and where there is no data."""
        manager = _manager()
        wanted = list(dict.fromkeys(one for name in self.names for one in _spelt_out(manager, name)))
        local = self.data and LocalTasks(manager, self.data, self.num_fewshot, progress or Progress())
        if local and (files := [name for name in wanted if name not in manager.task_index]):
            raise InvalidRequest(f"--tasks {files[0]}: says itself where its rows are; leave out --task-data")
        loaded = [local.load(name) if local else _load(manager, name) for name in wanted]
        for name, one in zip(wanted, loaded, strict=True):
            if not getattr(one, "has_aggregation", True):
                parts = ",".join(one.child_names)
                raise InvalidRequest(f"--tasks {name}: the group has no metric of its own; name its tasks: {parts}")
        names = [getattr(one, "task_name", None) or one.name for one in loaded]
        return LoadedTasks(self, dict(zip(names, loaded, strict=True)), local.used if local else {})


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, to be put to any number of models."""

    wanted: Tasks
    loaded: Mapping[str, Any]
    files: Mapping[str, Mapping[str, str]]
    """The local files of every task, with their hashes."""

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> dict[str, TaskScore]:
        """What ``model`` reaches on each of them, ``batch_size`` sequences at once."""
        from lm_eval import simple_evaluate

        from .task_model import TaskModel

        lm = TaskModel(model, tokenizer, batch_size, progress or Progress())
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):  # the harness's own progress bars
            try:
                results = simple_evaluate(
                    lm,
                    tasks=list(self.loaded.values()),
                    limit=self.wanted.limit,
                    num_fewshot=self.wanted.num_fewshot,
                    apply_chat_template=self.wanted.chat_template,
                    bootstrap_iters=BOOTSTRAP,
                    log_samples=False,
                    task_manager=_manager(),
                    **SEEDS,
                )
            except ModeGPTError:  # a ValueError, some of them
                raise
            except (KeyError, IndexError, ValueError, TypeError) as error:  # the task's own code, on a row
                message = " ".join(str(error).split())
                raise InvalidRequest(f"--tasks: a row is none that its task expects: {message}") from error
        return {name: _score(results, name, self.files.get(name, {})) for name in self.loaded}


def _score(results: Mapping[str, Any], name: str, files: Mapping[str, str]) -> TaskScore:
    found, parts = results["results"][name], results.get("group_subtasks", {}).get(name, [])
    # Names are "metric,filter"; that of no filter is "none".
    pairs = {key.removesuffix(",none"): key for key in found if "," in key and "_stderr," not in key}
    errors = {short: found.get(key.replace(",", "_stderr,", 1)) for short, key in pairs.items()}
    return TaskScore(
        metrics={short: float(found[key]) for short, key in pairs.items()},
        errors={short: float(error) if isinstance(error, float) else None for short, error in errors.items()},
        items=found["sample_len"],
        few_shot=results["n-shot"].get(name),
        version=str(results["versions"].get(name)),
        files=files,
        parts={part: _score(results, part, {}) for part in parts},
    )


@cache
def _manager() -> Any:
    """The harness's register of tasks, which takes seconds to read."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    evaluator.get_git_commit_hash = lambda: None  # git says on the user's terminal that this is no repository
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # standard errors from copies of a process with PyTorch's threads
    return TaskManager()


def _spelt_out(manager: Any, name: str) -> list[str]:
    """The task or group with this name or in this YAML file, or all tasks with this tag."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return [name]
    if name not in manager.task_index:
        raise InvalidRequest(f"--tasks {name!r}: lm-evaluation-harness has no such task; see `lm-eval ls tasks`")
    return sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]


def _load(manager: Any, name: str) -> Any:
    """A task or group with its data from the hub, or from where a YAML file says."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # the hub, the data set's files and the task's own code all fail in their own ways
        message = " ".join(str(error).split())
        raise InvalidRequest(
            f"--tasks {name}: its data could not be loaded: {message}; local files can be given by --task-data DIR"
        ) from error
    return loaded["groups"].get(name) or next(iter(loaded["tasks"].values()))
