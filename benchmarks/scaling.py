"""What the plan's formulas say of large models: memory, disk, arithmetic and network, without running anything.

    python benchmarks/scaling.py

Writes ``results/scaling.md``, which ``docs/scaling.md`` explains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modegpt import RunConfig
from modegpt.costs import Sizes, layer_parameters, solve_bytes, solve_flops, statistics_bytes
from modegpt.methods import ModeGPT
from modegpt.plan import Plan, Shape, predict

RESULTS = Path(__file__).parent / "results"
RATIO, SAMPLES, LENGTH = 0.3, 128, 2048


@dataclass(frozen=True)
class Model:
    """A model's published shape."""

    name: str
    sizes: Sizes
    vocabulary: int

    def shape(self) -> Shape:
        """The shape in bfloat16, with an untied head."""
        sizes = self.sizes
        layer = layer_parameters(sizes) + 2 * sizes.hidden
        rest = (2 * self.vocabulary + 1) * sizes.hidden
        return Shape(sizes=sizes, layer=layer, rest=rest, vocabulary=self.vocabulary, item=2)


def llama(name: str, layers: int, hidden: int, intermediate: int, heads: int, groups: int, vocabulary: int) -> Model:
    """A Llama of this shape."""
    return Model(name, Sizes(layers, hidden, intermediate, heads, groups, hidden // heads, 2), vocabulary)


MODELS = (
    llama("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000),
    llama("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256),
    llama("Llama-2-13B", 40, 5120, 13824, 40, 40, 32000),
    llama("Llama-3-70B", 80, 8192, 28672, 64, 8, 128256),
    llama("Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128256),
)


def plan_of(model: Model, method: str = "modegpt") -> Plan:
    """The plan of a 30 % compression on a GPU."""
    config = RunConfig.validated(
        model=model.name, output="compressed", ratio=RATIO, method=method, device="cpu", evaluate="none"
    )
    assert (config.samples, config.sequence_length) == (SAMPLES, LENGTH)
    return predict(config, model.shape(), on_gpu=True)


def on_host(plan: Plan) -> float:
    """The peak on the host, beside the program."""
    return sum(part.bytes for part in plan.host if part.name != "program")


def rows(model: Model) -> dict[str, str]:
    """The figures of one model."""
    shape, plan = model.shape(), plan_of(model)
    sizes, tokens = shape.sizes, SAMPLES * LENGTH
    layer = shape.layer * shape.item
    phases = {phase.name: phase.flops for phase in plan.phases}
    ours = plan_of(model, "greedy")
    return {
        "parameters": f"{(shape.rest + sizes.layers * shape.layer) / 1e9:.1f} G",
        "weights (bfloat16)": gb(shape.rest * 2 + shape.layers),
        "one layer": gb(layer),
        "its statistics (float64)": gb(statistics_bytes(sizes, ModeGPT.statistics, tokens, shape.item)),
        "what its solver holds besides": gb(solve_bytes(sizes, tokens, 1 - RATIO / 2)),
        "hidden states of all windows": gb(tokens * sizes.hidden * 2),
        "peak on the GPU": gb(plan.device_peak),
        "peak on the host, beside the program": gb(on_host(plan)),
        "disk at the output": gb(plan.disk_peak),
        "scores": pflop(phases["scores"]),
        "calibrate": pflop(phases["calibrate"]),
        "pass on": pflop(phases["pass on"]),
        "solve (float64)": pflop(phases["solve"]),
        "share of the solving that the MLP has": f"{solve_flops('mlp', sizes) / one_solve(sizes):.0%}",
        "all-reduced for each layer": gb(statistics_bytes(sizes, ModeGPT.statistics, tokens, shape.item)),
        "broadcast for each layer": gb((1 - RATIO) * layer),
        "`greedy`: peak on the GPU": gb(ours.device_peak),
        "`greedy`: peak on the host, beside the program": gb(on_host(ours)),
        "`greedy`: disk at the output": gb(ours.disk_peak),
        "`greedy`: all arithmetic": pflop(ours.flops),
    }


def one_solve(sizes: Sizes) -> float:
    """Operations to solve a layer."""
    return solve_flops("mlp", sizes) + solve_flops("qk", sizes) + solve_flops("vo", sizes)


def gb(count: float) -> str:
    """Decimal gigabytes."""
    return f"{count / 1e9:,.2f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def pflop(count: float) -> str:
    """10^15 operations."""
    return f"{count / 1e15:,.2f} PFLOP"


def table() -> str:
    """All figures, a column for each model."""
    columns = {model.name: rows(model) for model in MODELS}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns.values())} |" for name in rows(MODELS[0])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    path = RESULTS / "scaling.md"
    path.write_text(table(), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
