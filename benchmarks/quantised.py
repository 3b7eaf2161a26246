r"""Removed parameters and rounded weights together: perplexity against the size of the GGUF file.

    python benchmarks/quantised.py --compressed DIR/gguf-20 DIR/gguf-30 --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz

The checkpoints are what ``profiles.py`` writes; the dense model is beside them. Of every model and type of GGUF file
the table has the size of the file and the perplexity with weights rounded as in the file; activations are float32,
while llama.cpp rounds those that enter quantised matrices to 8 bits as well. Writes ``results/quantised.json`` and
``results/quantised.md`` after every row.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

import modegpt
from benchmark_texts import TEST, evaluation_texts, model_sha256, named_files, parser_of_texts, perplexities
from modegpt.exports.gguf_file import BLOCK, TYPES, stored_as, write_gguf
from modegpt.exports.gguf_tokenizer import TokenizerFields, tokenizer_fields
from modegpt.exports.plain import PlainDecoder
from modegpt.exports.stock import stock_model
from modegpt.sources import ModelSource
from results_file import RESULTS, header, table, write

KINDS = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def main() -> None:
    """Measure every model with every type and write the results file."""
    parser = parser_of_texts(__doc__, RESULTS / "quantised.json")
    parser.add_argument("--compressed", type=Path, nargs="+", required=True, metavar="DIR")
    arguments = parser.parse_args()
    source, files = ModelSource(arguments.model), named_files(arguments.texts)
    tokenizer = source.tokenizer()
    every = {TEST: arguments.test, **files}
    texts = evaluation_texts(every, tokenizer, arguments.test_samples, arguments.sequence_length)

    places = ("train", "test", "texts", "model", "compressed", "output")
    results: dict[str, Any] = header(parser, arguments, places)
    results["command"] += f" --compressed {' '.join(f'DIR/{path.name}' for path in arguments.compressed)}"
    results["command"] += f" --test {Path(arguments.test).name}"
    if files:
        results["command"] += " --texts " + " ".join(f"{name}={Path(file).name}" for name, file in files.items())
    results["model_sha256"] = model_sha256(arguments.model)
    results |= {"tokens_sha256": {name: windows.sha256() for name, windows in texts.items()}, "rows": []}
    dense = source.model("float32")
    fields = tokenizer_fields(tokenizer, dense.config.vocab_size)
    for name, path in {"dense": None, **{path.name: path for path in arguments.compressed}}.items():
        model = dense if path is None else modegpt.load(path, dtype="float32")
        for kind in KINDS:
            row: dict[str, Any] = {"model": name, "type": kind, "bytes": file_bytes(model, kind, fields)}
            results["rows"].append(row | {"perplexity": perplexities(rounded(model, kind), texts)})
            print(json.dumps(results["rows"][-1]), flush=True)
            write(results, arguments.output, text_of(results))


def file_bytes(model: PreTrainedModel, kind: str, fields: TokenizerFields) -> int:
    """The size of the GGUF file of ``model`` with matrices of one ``kind``."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(path, PlainDecoder(model), kind, fields, "model")
        return path.stat().st_size


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """``model`` as a plain Llama with the weights that its GGUF file has.

    Rows are rounded in blocks of 32 numbers, so that the order of rows does not matter, nor zeros at their ends.
    """
    plain = PlainDecoder(model)
    if any(width % BLOCK for width in plain.shape.widths):
        raise SystemExit(
            f"give models of --profile gguf: MLPs with multiples of {BLOCK} channels, not {plain.shape.widths}"
        )
    stock = stock_model(plain)
    embeddings = {id(layer.weight) for layer in (stock.get_input_embeddings(), stock.get_output_embeddings())}
    for weight in stock.parameters():
        chosen = TYPES[stored_as(kind, weight, embeds=id(weight) in embeddings)][0]
        data = gguf.quants.quantize(weight.detach().numpy(), chosen)
        weight.data = torch.from_numpy(gguf.quants.dequantize(data, chosen).copy())
    return stock


def text_of(results: dict[str, Any]) -> str:
    """The table, the smallest file last."""
    names = list(results["tokens_sha256"])
    rows = sorted(results["rows"], key=lambda row: -row["bytes"])
    lines = [
        [row["model"], row["type"], f"{row['bytes'] / 1e6:.1f}", *(f"{row['perplexity'][name]:.2f}" for name in names)]
        for row in rows
    ]
    return "By size of the GGUF file.\n\n" + table(["model", "type", "MB", *names], lines)


if __name__ == "__main__":
    main()
