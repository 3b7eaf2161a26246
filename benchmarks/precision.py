"""Whether it matters that products of activations are summed in float32: the same compressions with float64 products.

    python benchmarks/precision.py MODEL TRAIN TEST

Both use the same windows and differ in nothing else. Writes ``results/precision.json`` and ``results/precision.md``.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel

from modegpt import CompressionConfig, perplexity
from modegpt.data import TokenWindows, first_windows, read_text, tokenize
from modegpt.engine import compress_model
from modegpt.sources import ModelSource
from modegpt.statistics import GramSum
from results_file import RESULTS, header, table, write

SETTINGS = [("dense", "uniform")]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.json")
    arguments = parser.parse_args()

    source = ModelSource(str(arguments.model))
    model, tokenizer = source.model("float32"), source.tokenizer()
    length = arguments.sequence_length
    train = first_windows(tokenize(tokenizer, read_text(str(arguments.train))), arguments.samples, length, what="TRAIN")
    test_ids = tokenize(tokenizer, read_text(str(arguments.test), evaluation=True))
    test = first_windows(test_ids, arguments.test_samples, length, what="TEST")

    results: dict[str, Any] = header(parser, arguments, ("model", "train", "test", "output"))
    results["command"] += f" {arguments.model.name} {arguments.train.name} {arguments.test.name}"
    results |= {"tokens_sha256": {"train": train.sha256(), "test": test.sha256()}}
    results |= {"dense_perplexity": round(perplexity(model, test), 4), "rows": []}
    for statistics, allocation in SETTINGS:
        config = CompressionConfig.validated(
            ratio=arguments.ratio, method="modegpt", statistics=statistics, allocation=allocation
        )
        for products in ("float32", "float64"):
            row = {"statistics": statistics, "allocation": allocation, "products": products}
            results["rows"].append(row | measured(model, train, test, config, products))
            print(statistics, allocation, products, results["rows"][-1]["perplexity"], flush=True)
    for row in results["rows"]:
        row["kept_mlp_channels_shared"] = shared(row, results["rows"])
    for row in results["rows"]:
        del row["kept_mlp_channels"]
    write(results, arguments.output, report(results))


def measured(
    model: PreTrainedModel, train: TokenWindows, test: TokenWindows, config: CompressionConfig, products: str
) -> dict[str, Any]:
    """Perplexity and kept channels of a compression whose statistics are sums of such ``products``."""
    add = GramSum.add
    doubled = patch.object(GramSum, "add", lambda self, x: add(self, x.double()))
    with doubled if products == "float64" else nullcontext():
        compressed = compress_model(model, train, config)
    return {
        "perplexity": round(perplexity(compressed.model, test), 4),
        "kept_mlp_channels": [layer.modules["mlp"].kept for layer in compressed.layers],
    }


def shared(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """The share of a row's kept MLP channels that the same setting keeps with the other products."""
    same = ("statistics", "allocation")
    other = next(one for one in rows if one is not row and all(one[key] == row[key] for key in same))
    pairs = list(zip(row["kept_mlp_channels"], other["kept_mlp_channels"], strict=True))
    common = sum(len(set(mine) & set(theirs)) for mine, theirs in pairs)
    return round(common / sum(len(mine) for mine, _ in pairs), 6)


def report(results: dict[str, Any]) -> str:
    """The results in words and a table."""
    columns = ["statistics", "allocation", "products", "perplexity", "kept MLP channels in common"]
    rows = []
    for row in results["rows"]:
        cells = [row["statistics"], row["allocation"], row["products"], f"{row['perplexity']:.4f}"]
        rows.append([*cells, f"{row['kept_mlp_channels_shared']:.2%}"])
    title = f"Perplexity by the dtype of the products of activations; dense model {results['dense_perplexity']}."
    return f"{title}\n\n{table(columns, rows)}"


if __name__ == "__main__":
    main()
