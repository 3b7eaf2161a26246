r"""What each choice of the greedy method brings, one at a time and together.

    python benchmarks/gains.py --train TRAIN.txt.gz --test TEST.txt.gz --texts ptb=PTB_TEST.txt.gz

Every row takes the solvers of the module types that it names from ``greedy`` and the others from ``modegpt``, the
paper's method, and with ``second fit`` also the maps that are fitted once more where the rank is known; one row has the
greedy solvers with the ridge of the others, and the last ones lack one detail each (:data:`LACKS`), with the
sensitivities of the whole method, but where the detail is of the statistics. Texts, windows and model are those of
``quality.py``. The loss is ln(perplexity / dense perplexity). Writes ``results/gains.json`` and ``results/gains.md``;
started again after an interruption, it goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from benchmark_texts import command_of, parser_of_texts, perplexities, prepared
from modegpt.budget import Module
from modegpt.config import CompressionConfig
from modegpt.decompositions import alternating_fit, kept_coefficients, output_fit, selection_ladder, value_errors
from modegpt.engine import Engine
from modegpt.layered import resident
from modegpt.logits import Attended
from modegpt.logits import _drawn as drawn
from modegpt.methods import Greedy, ModeGPT
from modegpt.methods.base import Solver
from modegpt.results import ModuleProfile, Profile
from results_file import RESULTS, header, previous_rows, table, write

SOLVERS: dict[str, Module] = {"Type I": "mlp", "Type II": "qk", "Type III": "vo"}
FINISH = "second fit"
THREE, ALL = tuple(SOLVERS), (*SOLVERS, FINISH)
PAPERS, OWN = ModeGPT.default_ridge, Greedy.default_ridge


def pairs_as_they_are(*arguments: Any, turned: bool) -> Any:
    """:func:`kept_coefficients` of pairs that are chosen only."""
    return kept_coefficients(*arguments, turned=False)


def equal_energies(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A ridge that is the same for all channels."""
    return torch.ones(inputs[0].shape[1], dtype=torch.float64, device=inputs[0].device)


def head_by_head(fit: Callable[..., Any]) -> Callable[..., Any]:
    """``fit`` with what the heads put out taken to be uncorrelated, so that each has an output map of its own."""

    def alone(matrix: torch.Tensor, output: torch.Tensor, basis: torch.Tensor) -> Any:
        h = output.shape[-2]
        blocks = matrix.view(-1, h, len(matrix) // h, h).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return fit(torch.block_diag(*blocks), output, basis)

    return alone


def evenly(attention: Attended) -> Attended:
    """The keys that a query can attend to, whether it does or not."""
    allowed = (attention.weights > 0).to(attention.weights)
    return drawn(replace(attention, weights=allowed / allowed.sum(-1, keepdim=True)))


class Taken(ModuleProfile):
    """One that is taken at its word however little its module loses at the probed rank."""

    faint = False


def taken(profile: Profile) -> Profile:
    """All of them so."""
    layers = [{name: Taken(**vars(one)) for name, one in layer.items()} for layer in profile.layers]
    return replace(profile, layers=layers)


#: What stands in place of a detail of the solvers, by its name in modegpt.methods.greedy.
PLAINER: dict[str, dict[str, Any]] = {
    "pairs not turned": {"logit_ladder": selection_ladder, "kept_coefficients": pairs_as_they_are},
    "the same ridge for all channels": {"weight_energies": equal_energies},
    "outputs fitted head by head": {
        fit.__name__: head_by_head(fit) for fit in (value_errors, output_fit, alternating_fit)
    },
}
#: And of the statistics, by its name in modegpt.logits.
BLINDER: dict[str, dict[str, Any]] = {"every key counts the same": {"_drawn": evenly}}
SEQUENTIAL = "sequential statistics"
#: And of the profile.
SIMPLER: dict[str, Callable[[Profile], Profile]] = {
    "losses that add up": lambda profile: replace(profile, together={}),
    "faint losses at their word": taken,
}
LACKS = (*PLAINER, *SIMPLER, SEQUENTIAL, *BLINDER)
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
    ((), PAPERS, "block-influence-split", "auto"),
    ((), PAPERS, "owl", "auto"),
    (ALL, OWN, "block-influence", 0.03),
    (ALL, OWN, "block-influence-split", 0.03),
    (ALL, OWN, "owl", "auto"),
    ((), PAPERS, "sensitivity", "auto"),
    (ALL, PAPERS, "sensitivity", "auto"),
    (THREE, OWN, "sensitivity", "auto"),
    (ALL, OWN, "sensitivity", "auto"),
    *(((*ALL, detail), OWN, "sensitivity", "auto") for detail in LACKS),
)


class Mixed(ModeGPT):
    """The paper's method with the solvers of some modules from the greedy method, each with its own ridge."""

    def __init__(self, ours: Collection[str], ridge: float) -> None:
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
        blind = next((names for detail, names in BLINDER.items() if detail in ours), {})
        if profiled != (method, ridge, allocation, blind):  # ratios and steps that can share a profile do
            engine = Engine(resident(given.model), given.train, batch_size=1, probe=given.probe)
            profiled = (method, ridge, allocation, blind)
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
            with patched("modegpt.logits", blind):
                compressed = compress(engine, config, ours)
            row["perplexity"] = perplexities(compressed, given.texts)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(results, arguments.output, text_of(results))


def compress(engine: Engine, config: CompressionConfig, ours: Collection[str]) -> PreTrainedModel:
    """By what is ours of the method, at the ranks of the allocation."""
    replaced = next((names for detail, names in PLAINER.items() if detail in ours), {})
    with engine.active():
        profile = engine.profile(config) if config.allocation == "sensitivity" else None
        for detail, simpler in SIMPLER.items():
            profile = simpler(profile) if detail in ours and profile is not None else profile
        choice = engine.choose_ranks(config, profile=profile)
        assert config.ridge is not None
        with patched("modegpt.methods.greedy", replaced):
            return engine.compress(Mixed(ours, config.ridge), choice, sequential=SEQUENTIAL in ours).model


def patched(module: str, names: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """The ``names`` of a ``module`` replaced; patch.multiple takes no fewer than one."""
    return patch.multiple(module, **names) if names else nullcontext()


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
