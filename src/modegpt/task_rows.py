"""Local files in place of the data sets that lm-evaluation-harness fetches from the hub.

A file holds one row a line (``.jsonl`` or ``.jsonl.gz``) and is named after its task and split, as in
``arc_easy_test.jsonl``. Its rows have the fields of the data set on the hub or, of those in :data:`FORMS`, the fields
that its authors publish: the task's own prompt and metric see no difference.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .errors import InvalidRequest

Row = Mapping[str, Any]

#: What a file's name calls a split.
SPLITS: Mapping[str, tuple[str, ...]] = {"validation": ("val", "valid", "validation", "dev")}


def files_of(directory: Path, task: str, split: str, *, whole: bool) -> list[Path]:
    """The files of a task's ``split`` in ``directory``, the most exactly named first.

    That is ``TASK_SPLIT.jsonl``, then the split's other names, then those with more behind them; as a ``whole``,
    ``TASK.jsonl`` where there is none of these.
    """
    splits = dict.fromkeys((split, *SPLITS.get(split, ())))
    named = re.compile(rf"{re.escape(task)}_({'|'.join(map(re.escape, splits))})(_.*)?\.jsonl(?:\.gz)?")
    found = [(match, path) for path in directory.iterdir() if (match := named.fullmatch(path.name))]
    if not found and whole:
        return sorted(path for path in directory.iterdir() if path.name in (f"{task}.jsonl", f"{task}.jsonl.gz"))
    places = {name: place for place, name in enumerate(splits)}
    found.sort(key=lambda one: (one[0][2] is not None, places[one[0][1]], one[1].name))
    return [path for _, path in found]


def read_rows(path: Path, dataset: str, subject: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file in the form of ``dataset`` on the hub, of one ``subject`` where that is given.

    Raises :class:`InvalidRequest` for a damaged file, and for rows that lack a field or hold something else in it.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in raw.decode("utf-8").split("\n") if line.strip()]
    except Exception as error:  # a damaged archive, broken JSON, another encoding, ...
        raise InvalidRequest(f"--task-data: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InvalidRequest(f"--task-data: a line of {path} is no JSON object")
    form = FORMS.get(dataset, dict)
    try:
        return [form(row) for row in rows if subject is None or row["subject"] == subject]
    except KeyError as error:
        raise InvalidRequest(f"--task-data: a row of {path} has no {error.args[0]!r}; {dataset} has") from error
    except (TypeError, ValueError, IndexError) as error:
        raise InvalidRequest(f"--task-data: a row of {path} is not one of {dataset}: {error}") from error


def _fields(row: Row, names: Iterable[str], **converted: Callable[[Any], Any]) -> dict[str, Any]:
    """Those ``names`` and those that are ``converted``."""
    return {name: row[name] for name in names} | {name: convert(row[name]) for name, convert in converted.items()}


def _one_of(*known: str) -> Callable[[Any], str]:
    """What refuses all but the ``known`` answers."""

    def checked(value: Any) -> str:
        if str(value) not in known:
            raise ValueError(f"the answer {value!r} is none of {', '.join(known)}")
        return str(value)

    return checked


def _number(*known: str) -> Callable[[Any], int]:
    """The same of numbers; true and false are 1 and 0."""
    return lambda value: int(_one_of(*known)(int(value)))


def _choices(choices: list[Any]) -> dict[str, list[str]]:
    """Texts with or without labels: A, B, ... if without."""
    if all(isinstance(choice, str) for choice in choices):
        return {"text": choices, "label": list("ABCDEFGH"[: len(choices)])}
    return {name: [choice[name] for choice in choices] for name in ("text", "label")}


def _question(row: Row, name: str) -> dict[str, Any]:
    """ARC and OpenBookQA: the authors put the choices into ``question``; on the hub its text is ``name``."""
    if isinstance(row.get("question"), Mapping):
        row = {**row, **row["question"], name: row["question"]["stem"]}
    choices = row["choices"] if isinstance(row["choices"], Mapping) else _choices(row["choices"])
    return _fields(row, (name,), answerKey=_one_of(*choices["label"])) | {"choices": choices}


def _boolq(row: Row) -> dict[str, Any]:
    """The authors' ``answer`` is SuperGLUE's ``label``."""
    return _fields({"label": row.get("answer"), **row}, ("passage", "question"), label=_number("0", "1"))


def _mathqa(row: Row) -> dict[str, Any]:
    """The options are one text, ``a ) 38 , b ) 27.675 , ...``."""
    options = row["options"]
    if not isinstance(options, str):
        options = " , ".join(f"{letter} ) {option}" for letter, option in zip("abcde", options, strict=True))
    return _fields(row, ("Problem",), correct=_one_of(*"abcde")) | {"options": options}


def _lambada(row: Row) -> dict[str, Any]:
    """The passage may be apart from its last word."""
    return {"text": row["text"] if "text" in row else f"{row['context']} {row['continuation']}"}


def _mmlu(row: Row) -> dict[str, Any]:
    """The answer is a number, or a letter as its authors have it."""
    letters = list("ABCD")
    number = letters.index(row["answer"]) if row["answer"] in letters else row["answer"]
    return _fields(row, ("question", "choices")) | {"answer": _number(*"0123")(number)}


#: What makes a row of a data set on the hub from one of a file.
FORMS: Mapping[str, Callable[[Row], dict[str, Any]]] = {
    "allenai/ai2_arc": partial(_question, name="question"),
    "allenai/openbookqa": partial(_question, name="question_stem"),
    "baber/piqa": partial(_fields, names=("goal", "sol1", "sol2"), label=_number("0", "1")),
    "allenai/winogrande": partial(_fields, names=("sentence", "option1", "option2"), answer=_one_of("1", "2")),
    "Rowan/hellaswag": partial(_fields, names=("activity_label", "ctx_a", "ctx_b", "endings"), label=_one_of(*"0123")),
    "regisss/math_qa": _mathqa,
    "EleutherAI/lambada_openai": _lambada,
    "cais/mmlu": _mmlu,
    "aps/super_glue boolq": _boolq,
    "aps/super_glue copa": partial(
        _fields, names=("premise", "choice1", "choice2", "question"), label=_number("0", "1")
    ),
}
