r"""What each choice of the greedy method brings, one at a time and together, at one ratio.

    python benchmarks/gains.py --train TRAIN.txt.gz --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz

Every row takes the solvers of the module types that it names from ``greedy`` and the others from ``modegpt``, the
paper's method. Texts, windows and model are those of
``quality.py``. The loss is ln(perplexity / dense perplexity). Writes ``results/gains.json`` and ``results/gains.md``;
started again after an interruption, it goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmark_texts import command_of, parser_of_texts, prepared
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows
from modegpt.engine import Engine
from modegpt.evaluation import perplexity
from modegpt.layered import resident
from modegpt.methods import METHODS, Method
from results_file import RESULTS, header, table, write

SOLVERS = {"Type I": "mlp", "Type II": "query_key", "Type III": "value_output"}
#: What is ours, the allocation and its temperature.
STEPS: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    ((), "uniform", "auto"),
    (("Type I",), "uniform", "auto"),
    (("Type II",), "uniform", "auto"),
    (("Type III",), "uniform", "auto"),
    (tuple(SOLVERS), "uniform", "auto"),
    ((), "block-influence", 0.03),
    (tuple(SOLVERS), "block-influence", 0.03),
    ((), "sensitivity", "auto"),
    (tuple(SOLVERS), "sensitivity", "auto"),
)


def mixed(ours: Sequence[str], config: CompressionConfig) -> Method:
    """The paper's method with ``ours`` of its solvers from the greedy method."""
    paper, greedy = METHODS["modegpt"], METHODS["greedy"]
    solvers = {name: getattr(greedy, name) for name in (SOLVERS[kind] for kind in ours)}
    statistics = paper.statistics | greedy.statistics if ours else paper.statistics
    return type("Mixed", (paper,), {"statistics": statistics, **solvers}).from_config(config)


def main() -> None:
    """Measure every row and write the results file."""
    parser = parser_of_texts(__doc__, RESULTS / "gains.json")
    parser.add_argument("--ratio", type=float, default=0.3)
    arguments = parser.parse_args()
    given = prepared(arguments)

    results: dict[str, Any] = header(parser, arguments, vars(arguments))
    results["command"] = command_of(arguments, "benchmarks/gains.py", given.calibration) + f" --ratio {arguments.ratio}"
    hashes = {name: windows.sha256() for name, windows in given.texts.items()}
    results |= {"calibration": given.calibration.model_dump(), "tokens_sha256": hashes, "rows": []}
    results["rows"] = rows = previous_rows(arguments.output, results)
    results["dense"] = perplexities(given.model, given.texts)
    for ours, allocation, temperature in STEPS:
        row: dict[str, Any] = {"ours": list(ours), "allocation": allocation, "temperature": temperature}
        if any(other.items() >= row.items() for other in rows):
            continue
        config = CompressionConfig.validated(
            ratio=arguments.ratio,
            method="greedy" if ours else "modegpt",  # whose sensitivities are measured
            statistics="dense",
            allocation=allocation,
            temperature=temperature,
        )
        method = mixed(ours, config)
        engine = Engine(resident(given.model), given.train, batch_size=1, probe=given.probe)
        with engine.active():
            compressed = engine.compress(method, engine.choose_ranks(config), sequential=False).model
        row["perplexity"] = perplexities(compressed, given.texts)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(results, arguments.output, text_of(results))


def perplexities(model: PreTrainedModel, texts: Mapping[str, TokenWindows]) -> dict[str, float]:
    """That of ``model`` on each of ``texts``."""
    return {name: round(perplexity(model, windows), 4) for name, windows in texts.items()}


def previous_rows(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run, if it was the same."""
    if not path.is_file():
        return []
    previous = json.loads(path.read_text())
    same = all(previous.get(key) == results[key] for key in ("command", "versions", "calibration", "tokens_sha256"))
    return list(previous["rows"]) if same else []


def text_of(results: dict[str, Any]) -> str:
    """The table."""
    dense, rows = results["dense"], results["rows"]
    text = f"Calibrated on {results['calibration']['source']}. Dense: "
    text += ", ".join(f"{name} {value:.2f}" for name, value in dense.items()) + ".\n\n"
    columns = ["ours", "allocation", *(f"{kind} on {name}" for name in dense for kind in ("perplexity", "loss"))]
    lines = []
    for row in rows:
        allocation = row["allocation"] + (f", {row['temperature']}" if row["temperature"] != "auto" else "")
        cells = [
            cell
            for name, value in row["perplexity"].items()
            for cell in (f"{value:.2f}", f"{math.log(value / dense[name]):.3f}")
        ]
        lines.append([", ".join(row["ours"]) or "nothing", allocation, *cells])
    return text + table(columns, lines)


if __name__ == "__main__":
    main()
