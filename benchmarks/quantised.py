r"""Removed parameters and rounded weights together: perplexity against the size of the GGUF file.

    python benchmarks/quantised.py --compressed DIR/gguf-20 DIR/gguf-30 --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz

The checkpoints are what ``profiles.py`` writes; the dense model is beside them. Of every model and type of GGUF file
the table has the size of the file and the perplexity with the weights of the file; activations are float32, while
llama.cpp rounds those that enter quantised matrices to 8 bits as well. ``--k-quants`` needs llama.cpp's llama-quantize.
Writes ``results/quantised.json`` and ``results/quantised.md`` after every row; started again, it goes on with the
models and types that are missing, or of other weights.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

import modegpt
from benchmark_texts import (
    TEST,
    evaluation_texts,
    model_sha256,
    named_files,
    parser_of_texts,
    perplexities,
    weights_sha256,
)
from modegpt.exports.gguf_file import from_gguf, write_gguf
from modegpt.exports.gguf_tokenizer import TokenizerFields, tokenizer_fields
from modegpt.exports.k_quants import check_quantizer
from modegpt.exports.plain import PlainDecoder
from modegpt.exports.stock import stock_model
from modegpt.sources import ModelSource
from results_file import RESULTS, header, previous_rows, table, write

KINDS = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_KINDS = ("q6_k", "q5_k_m", "q4_k_m")


def main() -> None:
    """Measure every model with every type and write the results file."""
    parser = parser_of_texts(__doc__, RESULTS / "quantised.json")
    parser.add_argument("--compressed", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--k-quants", action="store_true", help="also the types that only llama-quantize makes")
    arguments = parser.parse_args()
    if arguments.k_quants:
        check_quantizer("q4_k_m")
    source, files = ModelSource(arguments.model), named_files(arguments.texts)
    tokenizer = source.tokenizer()
    every = {TEST: arguments.test, **files}
    texts = evaluation_texts(every, tokenizer, arguments.test_samples, arguments.sequence_length)

    places = ("train", "test", "texts", "model", "compressed", "k_quants", "output")
    results: dict[str, Any] = header(parser, arguments, places)
    results["command"] += f" --compressed {' '.join(f'DIR/{path.name}' for path in arguments.compressed)}"
    results["command"] += f" --test {Path(arguments.test).name}" + " --k-quants" * arguments.k_quants
    if files:
        results["command"] += " --texts " + " ".join(f"{name}={Path(file).name}" for name, file in files.items())
    results["versions"] |= {"gguf": version("gguf")}
    results["model_sha256"] = model_sha256(arguments.model)
    results["tokens_sha256"] = {name: windows.sha256() for name, windows in texts.items()}
    results["rows"] = previous_rows(arguments.output, results, ("versions", "model_sha256", "tokens_sha256"))
    dense = source.model("float32")
    fields = tokenizer_fields(tokenizer, dense.config.vocab_size)
    for name, path in {"dense": None, **{path.name: path for path in arguments.compressed}}.items():
        model = dense if path is None else modegpt.load(path, dtype="float32")
        weights = results["model_sha256"] if path is None else weights_sha256(path)
        for kind in (*KINDS, *(K_KINDS if arguments.k_quants else ())):
            row: dict[str, Any] = {"model": name, "type": kind, "weights_sha256": weights}
            if any(known.items() >= row.items() for known in results["rows"]):
                continue
            size, as_written = rounded(model, kind, fields)
            older = [known for known in results["rows"] if (known["model"], known["type"]) != (name, kind)]
            results["rows"] = [*older, row | {"bytes": size, "perplexity": perplexities(as_written, texts)}]
            print(json.dumps(results["rows"][-1]), flush=True)
            write(results, arguments.output, text_of(results))


def rounded(model: PreTrainedModel, kind: str, fields: TokenizerFields) -> tuple[int, PreTrainedModel]:
    """The size of the GGUF file of ``model`` with matrices of one ``kind``, and a plain Llama with its weights."""
    plain = PlainDecoder(model)
    if plain.shape.normed:
        raise SystemExit(
            "--compressed: models with query and key norms are written in another order; not read back here"
        )
    stock = stock_model(plain)
    parameters = dict(stock.named_parameters())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(path, plain, kind, fields, "model")
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name == "rope_freqs.weight":  # the config has them
                continue
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            name, values = from_gguf(tensor.name, values, plain.shape.head)
            weight = parameters[name].data
            common = tuple(map(slice, map(min, weight.shape, values.shape)))  # the rest are zeros that fill layers up
            weight[common] = values[common]
        return path.stat().st_size, stock


def text_of(results: dict[str, Any]) -> str:
    """The tables, the smallest file last: of all, and of what else as many bytes give."""
    names = list(results["tokens_sha256"])
    rows = sorted(results["rows"], key=lambda row: -row["bytes"])

    def cells(row: dict[str, Any]) -> list[str]:
        perplexities = (f"{row['perplexity'][name]:.2f}" for name in names)
        return [row["type"], f"{row['bytes'] / 1e6:.1f}", *perplexities]

    text = "By size of the GGUF file.\n\n"
    text += table(["model", "type", "MB", *names], [[row["model"], *cells(row)] for row in rows])
    dense, compressed = ([row for row in rows if (row["model"] == "dense") is same] for same in (True, False))
    lines = []
    for row in compressed:
        beside = next((one for one in dense if one["bytes"] <= row["bytes"]), None)  # rows go from large to small
        lines.append([row["model"], *cells(row), *(cells(beside) if beside else [""] * (2 + len(names)))])
    columns = ["model", "type", "MB", *names, "dense", "MB", *(f"dense on {name}" for name in names)]
    return text + "\nBeside the largest file of the dense model that is no larger.\n\n" + table(columns, lines)


if __name__ == "__main__":
    main()
