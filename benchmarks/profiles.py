r"""What it costs to keep to the layer shapes that engines and kernels ask for, at the same ratios.

    python benchmarks/profiles.py --train TRAIN.txt.gz --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz --checkpoints DIR

The profiles full (with any ranks, and with multiples of 8), gguf and stock, by the default method; texts, windows and
model are those of ``quality.py``. Beside each perplexity are the parameters of the checkpoint and what it has once
written for other engines, with the zeros that their formats ask for. The checkpoints, which other benchmarks take, are
written into DIR. Writes ``results/profiles.json`` and ``results/profiles.md`` after every row; started again, it goes
on with what is missing.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import modegpt
from benchmark_texts import command_of, model_sha256, parser_of_texts, perplexities, prepared
from modegpt.config import CompressionConfig
from modegpt.engine import Engine
from modegpt.exports.gguf_file import BLOCK
from modegpt.exports.plain import PlainDecoder
from modegpt.exports.stock import stock_model
from modegpt.layered import resident
from modegpt.report import build_report
from modegpt.sources import ModelSource
from results_file import RESULTS, header, previous_rows, table, write

#: The profile and the alignment of ranks.
SETTINGS = (("full", 1), ("full", 8), ("gguf", 1), ("stock", 1))


def main() -> None:
    """Measure every row and write the results file."""
    parser = parser_of_texts(__doc__, RESULTS / "profiles.json")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--checkpoints", type=Path, required=True)
    arguments = parser.parse_args()
    given, tokenizer = prepared(arguments), ModelSource(arguments.model).tokenizer()

    results: dict[str, Any] = header(parser, arguments, vars(arguments))
    results["command"] = command_of(arguments, "benchmarks/profiles.py", given.calibration) + " --checkpoints DIR"
    if arguments.ratios != parser.get_default("ratios"):
        results["command"] += f" --ratios {' '.join(map(str, arguments.ratios))}"
    results |= {"model_sha256": model_sha256(arguments.model), "calibration": given.calibration.model_dump(), "seed": 0}
    results["tokens_sha256"] = {name: windows.sha256() for name, windows in given.texts.items()}
    results["dense"] = {"perplexity": perplexities(given.model, given.texts), **sizes(given.model)}
    same = ("command", "versions", "model_sha256", "calibration", "tokens_sha256")
    results["rows"] = previous_rows(arguments.output, results, same)
    engine = Engine(resident(given.model), given.train, batch_size=1, probe=given.probe)
    with engine.active():
        for ratio, (profile, align) in itertools.product(arguments.ratios, SETTINGS):
            row: dict[str, Any] = {"profile": profile, "align": align, "ratio": ratio}
            directory = arguments.checkpoints / checkpoint_name(row)
            known = next((other for other in results["rows"] if other.items() >= row.items()), None)
            if known is not None:
                if directory.is_dir():
                    continue
                results["rows"].remove(known)
            config = CompressionConfig.validated(ratio=ratio, method="greedy", profile=profile, align=align)
            compression = engine.run(config)
            row |= sizes(compression.model) | {"perplexity": perplexities(compression.model, given.texts)}
            report = build_report(given.model, compression, config, given.calibration, command=results["command"])
            modegpt.save(compression.model, directory, tokenizer=tokenizer, report=report, overwrite=True)
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            write(results, arguments.output, text_of(results))


def checkpoint_name(row: dict[str, Any]) -> str:
    """The directory of a row's model."""
    aligned = f"-by-{row['align']}" if row["align"] > 1 else ""
    return f"{row['profile']}-{round(100 * row['ratio'])}{aligned}"


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """The parameters of ``model``, as it is and once written for other engines."""
    stock = stock_model(plain := PlainDecoder(model))
    widths = [math.ceil(width / BLOCK) * BLOCK for width in plain.shape.widths]
    layers = [plain.layer(index, width=width) for index, width in enumerate(widths)]
    gguf = sum(tensor.numel() for tensors in [plain.rest(), *layers] for tensor in tensors.values())
    return {"parameters": model.num_parameters(), "gguf": gguf, "stock": stock.num_parameters()}


def order(row: dict[str, Any]) -> tuple[float, int]:
    """Of the lines of the table."""
    return row["ratio"], SETTINGS.index((row["profile"], row["align"]))


def text_of(results: dict[str, Any]) -> str:
    """The table, the dense model first."""
    names = list(results["dense"]["perplexity"])
    lines = []
    for row in [results["dense"], *sorted(results["rows"], key=order)]:
        removed = [row["profile"], str(row["align"]), f"{row['ratio']:.0%}"] if "profile" in row else ["dense", "", ""]
        counts = [f"{row[kind] / 1e6:.2f}" for kind in ("parameters", "gguf", "stock")]
        lines.append([*removed, *(f"{row['perplexity'][name]:.2f}" for name in names), *counts])
    text = f"Perplexity, calibrated on {results['calibration']['source']}, and parameters in millions: of the "
    text += "checkpoint, of its GGUF file, of the plain Llama.\n\n"
    columns = ["profile", "multiples of", "removed of the blocks", *names, "checkpoint", "as gguf", "as stock"]
    return text + table(columns, lines)


if __name__ == "__main__":
    main()
