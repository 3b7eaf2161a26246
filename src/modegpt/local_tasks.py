"""Tasks of lm-evaluation-harness on local files: all of a task is the harness's own, but where its rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InvalidRequest
from .files import sha256_of
from .progress import Progress
from .task_rows import FORMS, files_of, read_rows


class LocalTasks:
    """Those of the harness's ``manager`` whose rows are in ``directory``.

    A task needs a file of the split that it asks of, and one of the split that its examples are drawn from where it is
    given any (``num_fewshot``; None: the task's own number). ``used`` has the hashes of the files that were read.
    """

    def __init__(self, manager: Any, directory: Path, num_fewshot: int | None, progress: Progress) -> None:
        self.used: dict[str, dict[str, str]] = {}
        self._manager, self._directory, self._num_fewshot = manager, directory, num_fewshot
        self._progress = progress

    def load(self, name: str) -> Any:
        """The task or group ``name``, of a group those tasks that have rows."""
        if name not in self._manager.all_groups:
            if (task := self._task(name, name)) is None:
                raise InvalidRequest(f"--tasks {name}: {', '.join(self.used[name])} has no row")
            return task
        from lm_eval.api.group import Group

        found = [self._task(task, name) for task in self._leaves(name)]
        group = Group.from_config(self._manager.task_index[name].cfg)
        for task in filter(None, found):
            group.add(task)
        if not group.child_names:
            raise InvalidRequest(f"--task-data {str(self._directory)!r}: no row is on a subject of {name}")
        self._progress.note(f"{name}: {len(group.child_names)} of its {len(found)} tasks have rows")
        return group

    def _leaves(self, name: str) -> list[str]:
        """The tasks of a group and of the groups in it."""
        if name in self._manager.all_tags:
            return sorted(self._manager.task_index[name].tags)
        if name not in self._manager.all_groups:
            return [name]
        parts = self._manager.task_index[name].cfg["task"]
        names = [part if isinstance(part, str) else part.get("task") or part["group"] for part in parts]
        return [leaf for part in names for leaf in self._leaves(part)]

    def _task(self, name: str, asked: str) -> Any:
        """The task ``name``, which was ``asked`` for or is of the group that was; None if the group's file lacks it."""
        try:
            if (changes := self._data(name, asked)) is None:
                return None
            # What is said of a task within a group is added to its own config.
            group = {"group": f"{name} from files", "task": [{"task": name, **changes}]}
            return self._manager.load([group])["tasks"][name]
        except InvalidRequest:
            raise
        except Exception as error:  # the task's own code, on a row that it does not expect
            message = " ".join(str(error).split())
            raise InvalidRequest(f"--tasks {name} cannot read {', '.join(self.used[asked])}: {message}") from error

    def _data(self, name: str, asked: str) -> dict[str, Any] | None:
        """What replaces the hub's data in a task's config, and nothing else; None where a group's file has no rows."""
        from datasets import Dataset, DatasetDict

        config = self._manager.task_index[name].cfg
        if "dataset_path" not in config:
            raise InvalidRequest(f"--tasks {name}: the task makes its own data; leave out --task-data")
        splits = {kind: config.get(f"{kind}_split") for kind in ("fewshot", "training", "validation", "test")}
        evaluated = splits["test"] or splits["validation"]
        rows = {evaluated: self._rows(config, asked, evaluated)}
        if not rows[evaluated]:
            return None
        examples = next(split for split in splits.values() if split)  # the harness's rule
        count = (config.get("num_fewshot") if self._num_fewshot is None else self._num_fewshot) or 0
        if count:
            if examples != evaluated:
                rows[examples] = self._rows(config, asked, examples, of_examples=True)
            available = len(rows[examples]) - (examples == evaluated)  # but for the question itself
            if available < count:
                raise InvalidRequest(f"--num-fewshot {count}: {name} has {available} rows to draw examples from")
        data = DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})
        known = {f"{kind}_split": split if split in rows else None for kind, split in splits.items()}
        return {"custom_dataset": lambda **_: data, **known}

    def _rows(
        self, config: Mapping[str, Any], asked: str, split: str, *, of_examples: bool = False
    ) -> list[dict[str, Any]]:
        """Those of a split, of the first file that has the task's fields; of a group's file those of one subject."""
        name, path, subset = config["task"], config["dataset_path"], config.get("dataset_name")
        own = files_of(self._directory, name, split, whole=not of_examples)
        paths = own or files_of(self._directory, asked, split, whole=not of_examples)
        if not paths:
            why = ", which the examples of --num-fewshot are drawn from" if of_examples else ""
            raise InvalidRequest(
                f"--tasks {asked}: --task-data {str(self._directory)!r} has no {asked}_{split}.jsonl or .jsonl.gz{why}"
            )
        form = path if path in FORMS else f"{path} {subset}"
        problems: list[InvalidRequest] = []
        for file in paths:
            try:
                rows = read_rows(file, form, None if own else subset)
            except InvalidRequest as error:
                problems.append(error)
                continue
            self.used.setdefault(asked, {})[file.name] = sha256_of(file)
            for problem in problems:
                self._progress.note(f"left out: {problem}")
            if others := [path.name for path in paths[len(problems) + 1 :]]:
                self._progress.note(f"{asked}: rows are from {file.name}, not from {', '.join(others)}")
            return rows
        raise problems[0]
