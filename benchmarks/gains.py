r"""What each choice of the greedy method brings, one at a time and together, at one ratio.

    python benchmarks/gains.py --train TRAIN.txt.gz --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz

Every row takes the solvers of the module types that it names from ``greedy`` and the others from ``modegpt``, the
paper's method. Texts, windows and model are those of
``quality.py``. The loss is ln(perplexity / dense perplexity). Writes ``results/gains.json`` and ``results/gains.md``;
started again after an interruption, it goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_texts import calibration_windows, evaluation_texts, named_files
from modegpt.config import CompressionConfig
from modegpt.engine import Engine
from modegpt.evaluation import perplexity
from modegpt.layered import resident
from modegpt.methods import METHODS, Method
from modegpt.sources import ModelSource
from quality import TEST, default_model
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="wikitext2")
    parser.add_argument("--test", default="wikitext2")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "gains.json")
    arguments = parser.parse_args()

    source = ModelSource(arguments.model)
    model, tokenizer = source.model("float32"), source.tokenizer()
    length, files = arguments.sequence_length, {TEST: arguments.test, **named_files(arguments.texts)}
    train, probe, calibration = calibration_windows(arguments.train, model, tokenizer, arguments.samples, length)
    texts = evaluation_texts(files, tokenizer, arguments.test_samples, length)

    results: dict[str, Any] = header(parser, arguments, ("model", "train", "test", "texts", "output"))
    named = {"--train": arguments.train, "--test": arguments.test}
    results["command"] += "".join(f" {option} {Path(file).name}" for option, file in named.items())
    if arguments.texts:
        results["command"] += " --texts " + " ".join(f"{n}={Path(f).name}" for n, f in files.items() if n != TEST)
    hashes = {name: windows.sha256() for name, windows in texts.items()}
    results |= {"calibration": calibration.model_dump(), "tokens_sha256": hashes, "rows": []}
    results["rows"] = rows = previous_rows(arguments.output, results)
    results["dense"] = {name: round(perplexity(model, windows), 4) for name, windows in texts.items()}
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
        engine = Engine(resident(model), train, batch_size=1, probe=probe)
        with engine.active():
            compressed = engine.compress(method, engine.choose_ranks(config), sequential=False).model
        row["perplexity"] = {name: round(perplexity(compressed, windows), 4) for name, windows in texts.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(results, arguments.output, text_of(results))


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
