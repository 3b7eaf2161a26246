r"""Accuracy of compressed checkpoints on the tasks of MoDeGPT's paper, by ``modegpt evaluate --tasks``.

    python benchmarks/tasks.py --compressed DIR/greedy-20 DIR/greedy-30 --task-data DATA --limit 200

The checkpoints are what ``quality.py --checkpoints DIR`` and ``modegpt compress`` write; DATA has the rows of the tasks
where no hub is at hand. Writes ``results/tasks.json``, with all metrics, and ``results/tasks.md``, after every model;
started again, with further models as well, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmark_texts import default_model, weights_sha256
from modegpt.comparison import ModelScores, compare, facts_of
from modegpt.tasks import Tasks, degradation, mean
from results_file import RESULTS, header, table, write

TASKS = "arc_easy arc_challenge piqa winogrande hellaswag boolq openbookqa mathqa copa lambada_openai mmlu"


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default=default_model())
    parser.add_argument("--compressed", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", default=TASKS.split())
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS / "tasks.json")
    arguments = parser.parse_args()

    results: dict[str, Any] = header(parser, arguments, ("dense", "compressed", "task_data", "output"))
    results["weights_sha256"] = {
        Path(one).name: weights_sha256(Path(one)) for one in (arguments.dense, *arguments.compressed)
    }
    known = previous_scores(arguments.output, results)
    results["command"] += f" --compressed {' '.join(f'DIR/{Path(one).name}' for one in arguments.compressed)}"
    results["command"] += " --task-data DATA" if arguments.task_data else ""

    addresses = {Path(address).name: address for address in (arguments.dense, *arguments.compressed)}
    if len(addresses) <= len(arguments.compressed):
        raise SystemExit("--compressed: give checkpoints of different names")

    def keep(scores: list[ModelScores]) -> None:
        known.update({Path(one.model).name: replace(one, model=Path(one.model).name) for one in scores})
        found = [known[name] for name in addresses if name in known]
        results.update(facts_of(found))
        write(results, arguments.output, text_of(found, arguments.limit))
        print(f"{Path(scores[-1].model).name}: {mean(scores[-1].tasks)}", flush=True)

    asked = Tasks(arguments.tasks, arguments.task_data, arguments.limit, arguments.num_fewshot)
    missing = [address for name, address in addresses.items() if name not in known]
    compare(missing, None, asked, batch_size=arguments.batch_size, dtype="float32", finished=keep)


def previous_scores(path: Path, results: dict[str, Any]) -> dict[str, ModelScores]:
    """What an earlier run measured of which model, if it asked the same: of those with the same weights."""
    previous = json.loads(path.read_text()) if path.is_file() else {"command": "", "versions": {}}
    asked = previous["command"].partition(" --compressed ")[0]
    if (asked, previous["versions"]) != (results["command"], results["versions"]):
        return {}
    weights, now = previous.get("weights_sha256", {}), results["weights_sha256"]
    changed = {name for name in now if weights.get(name) != now[name]}
    results["weights_sha256"] = weights | now
    kept = [one for one in previous["models"] if one["model"] not in changed]
    return {one["model"]: TypeAdapter(ModelScores).validate_python(one) for one in kept}


def text_of(scores: list[ModelScores], limit: int | None) -> str:
    """The tables: a line for each task, then one for each model with the mean and what of it was lost."""
    first = scores[0].tasks
    judged = {task: facts for task, facts in first.items() if facts.is_accuracy}
    names = ["dense", *(Path(one.model).name for one in scores[1:])]
    lines = []
    for task, facts in judged.items():
        found = [(one.tasks[task].metrics[facts.shown], one.tasks[task].errors[facts.shown]) for one in scores]
        lines.append([task, facts.shown, str(facts.items), *(percent(value, error) for value, error in found)])
    means = [percent(*(mean(one.tasks) or (0.0, None))) for one in scores]
    lost = [degradation(one.tasks, first) for one in scores]
    first_rows = f", the first {limit} rows of each (of mmlu, of each subject)" if limit else ""
    text = f"Accuracy in percent with standard errors, on tasks of lm-evaluation-harness{first_rows}.\n\n"
    text += table(["task", "metric", "items", *names], lines)
    text += f"\nMean over these {len(judged)} tasks, and what of the dense model's is lost.\n\n"
    relative = ["" if one is None else f"{one:.1%}" for one in lost]
    return text + table(
        ["model", "mean", "relative degradation"], list(map(list, zip(names, means, relative, strict=True)))
    )


def percent(value: float, error: float | None) -> str:
    """With its error."""
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


if __name__ == "__main__":
    main()
