r"""What calibrates against what perplexity is measured on, as in table B.15 of MoDeGPT's paper.

    python benchmarks/crossed.py --train wikitext2=TRAIN.txt.gz ptb=PTB_TRAIN.txt.gz alpaca=ALPACA.jsonl.gz \
        --texts wikitext2=TEST.txt.gz ptb=PTB_TEST.txt.gz alpaca=ALPACA.jsonl.gz

The default method and the paper's (at a temperature of 0.03, with the default method's dense statistics and with its
own sequential ones) at one ratio, calibrated on the first windows of each text alone, and (``all``) on as many of all
of them together. Sensitivities are measured on windows that seed 0 draws from the rest. Of a text named ``alpaca`` the
last tenth is evaluated and the rest calibrates; one named ``ptb`` is joined by spaces. Writes ``results/crossed.json``
and ``results/crossed.md`` after every row; started again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmark_texts import default_model, evaluation_texts, model_sha256, named_files, perplexities, split_text
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows, first_windows, other_windows
from modegpt.engine import Engine
from modegpt.layered import resident
from modegpt.mixture import interleave
from modegpt.profile import probe_windows
from modegpt.sources import ModelSource
from results_file import RESULTS, header, previous_rows, table, write

#: Method and statistics, and what else they are run with.
METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("greedy", "dense"): {},
    ("modegpt", "dense"): {"temperature": 0.03},
    ("modegpt", "sequential"): {"temperature": 0.03},
}
ALL = "all"


def main() -> None:
    """Measure every row and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "crossed.json")
    arguments = parser.parse_args()
    files = {"--train": named_files(arguments.train), "--texts": named_files(arguments.texts)}
    source, length = ModelSource(arguments.model), arguments.sequence_length
    model, tokenizer = source.model("float32"), source.tokenizer()
    texts = evaluation_texts(files["--texts"], tokenizer, arguments.test_samples, length)
    calibrations = calibration_windows(files["--train"], tokenizer, arguments.samples, length)

    results: dict[str, Any] = header(parser, arguments, ("train", "texts", "model", "output"))
    for option, named in files.items():
        results["command"] += f" {option} " + " ".join(f"{name}={Path(file).name}" for name, file in named.items())
    results |= {"model_sha256": model_sha256(arguments.model), "seed": 0, "ratio": arguments.ratio}
    results["calibration_sha256"] = {name: windows.sha256() for name, (windows, _) in calibrations.items()}
    results["tokens_sha256"] = {name: windows.sha256() for name, windows in texts.items()}
    results["rows"] = rows = previous_rows(arguments.output, results, results.keys() - {"machine"})
    results["dense"] = perplexities(model, texts)
    for name, (windows, probe) in calibrations.items():
        for (method, statistics), options in METHODS.items():
            row = {"calibration": name, "method": method, "statistics": statistics, **options}
            if any(other.items() >= row.items() for other in rows):
                continue
            config = CompressionConfig.validated(method=method, statistics=statistics, ratio=arguments.ratio, **options)
            engine = Engine(resident(model), windows, batch_size=1, probe=probe)  # each keeps one method's statistics
            with engine.active():
                small = engine.run(config).model
            rows.append({**row, "perplexity": perplexities(small, texts)})
            print(json.dumps(rows[-1]), flush=True)
            write(results, arguments.output, text_of(results))


def calibration_windows(
    files: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int
) -> dict[str, tuple[TokenWindows, TokenWindows | None]]:
    """Of every text and of all together: the windows that calibrate, and those that sensitivities are measured on."""
    ids = {name: split_text(name, file, tokenizer, length, evaluation=False) for name, file in files.items()}
    whole = {name: first_windows(own, samples, length, what=f"--train {name}") for name, own in ids.items()}
    probes = {
        name: other_windows(own[samples * length :], probe_windows(length), length, 0, but=0)
        for name, own in ids.items()
    }
    shares = [TokenWindows(own.ids[: -(-samples // len(whole))]) for own in whole.values()]
    some = [TokenWindows(probe.ids[:1]) for probe in probes.values() if probe is not None]
    mixed = TokenWindows(interleave(shares, 0).ids[:samples]), interleave(some, 0) if some else None
    return {name: (whole[name], probes[name]) for name in files} | {ALL: mixed}


def text_of(results: dict[str, Any]) -> str:
    """The table: a line for each method and what calibrated it."""
    names = list(results["dense"])
    lines = [["dense", "", "", *(f"{results['dense'][name]:.2f}" for name in names)]]
    for kind in METHODS:
        own = [row for row in results["rows"] if (row["method"], row["statistics"]) == kind]
        own.sort(key=lambda row: list(results["calibration_sha256"]).index(row["calibration"]))
        lines += [[*kind, row["calibration"], *(f"{row['perplexity'][name]:.2f}" for name in names)] for row in own]
    text = f"Perplexity, {results['ratio']:.0%} of the decoder blocks' parameters removed.\n\n"
    return text + table(["method", "statistics", "calibrated on", *names], lines)


if __name__ == "__main__":
    main()
