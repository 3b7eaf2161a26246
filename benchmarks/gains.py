r"""What each choice of the greedy method brings, one at a time and together.

    python benchmarks/gains.py --train TRAIN.txt.gz --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz

Every row takes the solvers of the module types that it names from ``greedy`` and the others from ``modegpt``, the
paper's method, and with ``second fit`` also the maps that are fitted once more where the rank is known; one row has the
greedy solvers with the ridge of the others. Texts, windows and model are
those of ``quality.py``. The loss is ln(perplexity / dense perplexity). Writes ``results/gains.json`` and
``results/gains.md``; started again after an interruption, it goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmark_texts import command_of, parser_of_texts, perplexities, prepared
from modegpt.budget import Module
from modegpt.config import CompressionConfig
from modegpt.engine import Engine
from modegpt.layered import resident
from modegpt.methods import Greedy, ModeGPT
from modegpt.methods.base import Solver
from results_file import RESULTS, header, previous_rows, table, write

SOLVERS: dict[str, Module] = {"Type I": "mlp", "Type II": "qk", "Type III": "vo"}
FINISH = "second fit"
THREE, ALL = tuple(SOLVERS), (*SOLVERS, FINISH)
PAPERS, OWN = ModeGPT.default_ridge, Greedy.default_ridge
#: What is ours and with which ridge, the allocation and its temperature.
STEPS: tuple[tuple[tuple[str, ...], float, str, Any], ...] = (
    ((), PAPERS, "uniform", "auto"),
    (("Type I",), OWN, "uniform", "auto"),
    (("Type I", FINISH), OWN, "uniform", "auto"),
    (("Type II",), OWN, "uniform", "auto"),
    (("Type III",), OWN, "uniform", "auto"),
    (("Type III", FINISH), OWN, "uniform", "auto"),
    (ALL, OWN, "uniform", "auto"),
    ((), PAPERS, "block-influence", 0.03),
    (ALL, OWN, "block-influence", 0.03),
    (ALL, OWN, "block-influence-split", 0.03),
    (ALL, OWN, "owl", "auto"),
    ((), PAPERS, "sensitivity", "auto"),
    (ALL, PAPERS, "sensitivity", "auto"),
    (THREE, OWN, "sensitivity", "auto"),
    (ALL, OWN, "sensitivity", "auto"),
)


class Mixed(ModeGPT):
    """The paper's method with the solvers of some modules from the greedy method, each with its own ridge."""

    def __init__(self, ours: Sequence[str], ridge: float) -> None:
        super().__init__(self.default_ridge)
        greedy: Mapping[Module, Solver] = Greedy(ridge).solvers()
        if FINISH not in ours:
            greedy = {module: unfinished(solver) for module, solver in greedy.items()}
        own = {module: greedy[module] for kind, module in SOLVERS.items() if kind in ours}
        self._solvers = {**super().solvers(), **own}
        self.statistics = ModeGPT.statistics | Greedy.statistics if ours else ModeGPT.statistics

    def solvers(self) -> Mapping[Module, Solver]:
        """Those chosen."""
        return self._solvers


def unfinished(solver: Solver) -> Solver:
    """The same without second fits."""
    return lambda weights, statistics: replace(solver(weights, statistics), finish=None)


def main() -> None:
    """Measure every row and write the results file."""
    parser = parser_of_texts(__doc__, RESULTS / "gains.json")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3])
    arguments = parser.parse_args()
    given = prepared(arguments)

    results: dict[str, Any] = header(parser, arguments, vars(arguments))
    results["command"] = command_of(arguments, "benchmarks/gains.py", given.calibration)
    hashes = {name: windows.sha256() for name, windows in given.texts.items()}
    results |= {"calibration": given.calibration.model_dump(), "tokens_sha256": hashes}
    results["rows"] = rows = previous_rows(arguments.output, results, ("versions", "calibration", "tokens_sha256"))
    ratios = sorted({*arguments.ratios, *(row["ratio"] for row in rows)})
    results["command"] += f" --ratios {' '.join(map(str, ratios))}"
    results["dense"] = perplexities(given.model, given.texts)
    profiled: tuple[Any, ...] = ()
    for ours, ridge, allocation, temperature in STEPS:
        method = "greedy" if ours else "modegpt"  # whose sensitivities are measured
        if profiled != (method, ridge, allocation):  # ratios and steps that can share a profile do
            engine = Engine(resident(given.model), given.train, batch_size=1, probe=given.probe)
            profiled = (method, ridge, allocation)
        step: dict[str, Any] = {
            "ours": list(ours),
            "ridge": ridge,
            "allocation": allocation,
            "temperature": temperature,
        }
        for ratio in arguments.ratios:
            row = {**step, "ratio": ratio}
            if any(other.items() >= row.items() for other in rows):
                continue
            config = CompressionConfig.validated(
                ratio=ratio,
                method=method,
                statistics="dense",
                allocation=allocation,
                temperature=temperature,
                ridge=ridge,
            )
            with engine.active():
                compressed = engine.compress(Mixed(ours, ridge), engine.choose_ranks(config), sequential=False).model
            row["perplexity"] = perplexities(compressed, given.texts)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(results, arguments.output, text_of(results))


def place(row: Mapping[str, Any]) -> int:
    """Where among the ``STEPS`` a row belongs, whenever it was measured; last where it is of none."""
    step = (tuple(row["ours"]), row["ridge"], row["allocation"], row["temperature"])
    return STEPS.index(step) if step in STEPS else len(STEPS)


def text_of(results: dict[str, Any]) -> str:
    """The tables, one for each ratio."""
    dense, rows = results["dense"], sorted(results["rows"], key=place)
    text = f"ln(perplexity / dense perplexity), calibrated on {results['calibration']['source']}. Dense perplexity: "
    text += ", ".join(f"{name} {value:.2f}" for name, value in dense.items()) + ".\n"
    for ratio in sorted({row["ratio"] for row in rows}):
        lines = []
        for row in (row for row in rows if row["ratio"] == ratio):
            ours = ", ".join(row["ours"]) + (f" (ridge {row['ridge']:g})" if row["ours"] else "nothing")
            allocation = row["allocation"] + (f", {row['temperature']}" if row["temperature"] != "auto" else "")
            losses = [f"{math.log(value / dense[name]):.3f}" for name, value in row["perplexity"].items()]
            lines.append([ours, allocation, *losses])
        text += f"\n{ratio:.0%} removed:\n\n" + table(["ours", "allocation", *dense], lines)
    return text


if __name__ == "__main__":
    main()
