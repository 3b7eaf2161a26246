"""Peak resident memory against the model's size: `modegpt compress`, and compression of a model in memory.

    python benchmarks/memory.py
    python benchmarks/memory.py --layers 1 2 --hidden 256 --intermediate 704 --vocabulary 1000  # a minute

Random float32 Llamas of equal layers, more and more of them, are compressed by `modegpt compress` (layer by layer) and
by ``from_pretrained``, ``modegpt.compress`` and ``modegpt.save`` (whole model). Each case is a process of its own; its
peak is the ``ru_maxrss`` that the operating system counted when it ended, files it had mapped included. On the largest
model both run under a hard limit, which only the first should survive. Beside each peak of the engine stand
what its plan predicted and the bound it has to keep: embeddings and head, two layers, a layer's statistics, the
hidden states, and 1.5 GB. Few tokens are used: they cost time, and the hidden states are a known part of the sum.

Checkpoints are made below ``--directory`` and removed again; about three times the largest model must be free there.
Writes ``results/memory.json``, ``memory.md`` and ``memory.png`` after every case. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from modegpt.report import RunFacts, peak_memory
from random_checkpoint import DEFAULT, Shape, add_shape_options, shape_of, write_text
from results_file import RESULTS, gigabytes, header, table, write

ENGINE, WHOLE = "engine", "whole-model"
ITEM = 4  # bytes of a float32
SEED = 0
INTERVAL = 0.05
CGROUPS = Path("/sys/fs/cgroup")
WHOLE_MODEL = """
import sys
import modegpt
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, text, output, ratio, samples, length, allocation = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
options = {"samples": int(samples), "sequence_length": int(length), "allocation": allocation}
smaller = modegpt.compress(model, tokenizer, ratio=float(ratio), method="modegpt", calibration=text, **options)
modegpt.save(smaller, output, tokenizer=tokenizer)
"""


@dataclass(frozen=True)
class Child:
    """How a process ended."""

    code: int
    peak: int
    """Its largest resident size in bytes."""
    seconds: float
    stopped: bool
    """Whether the limit ended it."""
    log: str


@dataclass(frozen=True)
class Limit:
    """A hard limit of a process's memory, in bytes: the kernel's where a cgroup can be made, else a watchdog's."""

    bytes: int
    cgroup: Path | None

    @property
    def means(self) -> str:
        """How it is imposed, in words."""
        if self.cgroup is not None:
            return "cgroup v2: memory.max, no swap"
        return f"watchdog: VmRSS + VmSwap every {INTERVAL * 1000:.0f} ms, kill above the limit"

    def wrap(self, command: list[str]) -> list[str]:
        """``command`` within the limit, as far as the kernel imposes it."""
        if self.cgroup is None:
            return command
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.cgroup / "cgroup.procs"), *command]

    def broken_by(self, pid: int) -> bool:
        """Whether the process is above the limit, where a watchdog imposes it."""
        return self.cgroup is None and _resident(pid) > self.bytes

    def ended(self) -> bool:
        """Whether the kernel ended a process for this limit."""
        if self.cgroup is None:
            return False
        events = dict(line.split() for line in (self.cgroup / "memory.events").read_text().splitlines())
        return int(events["oom_kill"]) > 0


def _resident(pid: int) -> int:
    """Bytes that a process has in memory and in swap; 0 when it is over."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS:", "VmSwap:")))


@contextmanager
def limited(count: int, root: Path = CGROUPS) -> Iterator[Limit]:
    """A limit of ``count`` bytes for one process."""
    cgroup = _new_cgroup(count, root)
    try:
        yield Limit(count, cgroup)
    finally:
        if cgroup is not None:
            cgroup.rmdir()


def _new_cgroup(count: int, root: Path) -> Path | None:
    """A cgroup with that much memory below the closest one that lets us; None where cgroup v2 is not ours to use."""
    if not (root / "cgroup.controllers").is_file():
        return None
    entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = root / next((path for number, _, path in entries if number == "0"), "/").lstrip("/")
    for parent in (own, *(folder for folder in own.parents if folder.is_relative_to(root))):
        group = parent / f"modegpt-memory-{os.getpid()}"
        try:
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                continue
            group.mkdir()
        except OSError:
            continue
        try:
            (group / "memory.max").write_text(str(count))
            if (group / "memory.swap.max").exists():
                (group / "memory.swap.max").write_text("0")
            subprocess.run(Limit(count, group).wrap(["true"]), check=True, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            group.rmdir()
            continue
        return group
    return None


def run(command: list[str], log: Path, limit: Limit | None = None) -> Child:
    """Run ``command`` to its end, or to the ``limit``."""
    started, stopped, status = time.perf_counter(), False, 0
    with open(log, "wb") as output:
        process = subprocess.Popen(limit.wrap(command) if limit else command, stdout=output, stderr=output)
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if limit is not None and not stopped and limit.broken_by(process.pid):
                stopped = True
                process.kill()
            time.sleep(INTERVAL)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    stopped = stopped or (limit is not None and limit.ended())
    text = log.read_text(errors="replace")
    return Child(process.returncode, usage.ru_maxrss * unit, time.perf_counter() - started, stopped, text)


def bound(shape: Shape, tokens: int) -> dict[str, int]:
    """The terms of the bound on the peak memory of `modegpt compress`, in bytes."""
    head = shape.hidden // shape.heads
    sums = shape.intermediate**2 + shape.hidden**2 + (shape.heads + shape.groups) * head**2
    return {
        "embeddings and head": shape.rest_parameters * ITEM,
        "two layers": 2 * shape.layer_parameters * ITEM,
        "statistics of a layer (float64)": 8 * sums,
        "hidden states": tokens * shape.hidden * ITEM,
        "everything else": 1_500_000_000,
    }


def main() -> None:
    """Measure every case and write the results files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 22, 34])
    add_shape_options(parser, DEFAULT)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--limit", type=int, default=4_000_000_000, help="bytes, for the largest model")
    parser.add_argument("--paths", nargs="+", choices=(ENGINE, WHOLE), default=[ENGINE, WHOLE])
    parser.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    arguments = parser.parse_args()

    tokens = arguments.samples * arguments.sequence_length
    shapes = [shape_of(arguments, layers) for layers in sorted(arguments.layers)]
    with limited(arguments.limit) as limit:
        means = limit.means
    results: dict[str, Any] = header(parser, arguments, ("directory", "output"))
    results |= {
        "layer": {"hidden": arguments.hidden, "intermediate": arguments.intermediate}
        | {"heads": arguments.heads, "key_value_heads": arguments.groups, "vocabulary": arguments.vocabulary},
        "dtype": "float32",
        "calibration": {"windows": arguments.samples, "tokens": tokens, "text": "random tokens"},
        "ratio": arguments.ratio,
        "allocation": arguments.allocation,
        "seeds": {"weights": SEED, "text": SEED},
        "limit": {"bytes": arguments.limit, "means": means, "layers": shapes[-1].layers},
        "bound": bound(shapes[0], tokens),
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="modegpt-memory-") as place:
        needed, free = 3 * shapes[-1].parameters * ITEM, shutil.disk_usage(place).free
        if needed > free:
            raise SystemExit(f"{gigabytes(needed)} GB of disk are needed, {gigabytes(free)} GB are free: --directory")
        for shape in shapes:
            for row in measure(Path(place), shape, arguments, limited_too=shape is shapes[-1]):
                results["rows"].append(row)
                print(json.dumps({key: value for key, value in row.items() if key != "planned"}), flush=True)
                write(results, arguments.output, report(results))
                plot(results, arguments.output.with_suffix(".png"))


def measure(place: Path, shape: Shape, arguments: argparse.Namespace, *, limited_too: bool) -> Iterator[dict[str, Any]]:
    """The rows of one model, which is made in ``place`` and removed."""
    model, text, output, log = place / "model", place / "text.txt", place / "compressed", place / "log.txt"
    write_text(text, arguments.samples * arguments.sequence_length, shape.vocabulary, SEED)
    builder = Path(__file__).with_name("random_checkpoint.py")
    options = [f"--{name}={value}" for name, value in vars(shape).items()]
    _succeed(run([sys.executable, str(builder), str(model), *options, f"--seed={SEED}"], log))
    size = {"layers": shape.layers, "parameters": shape.parameters, "weights_bytes": shape.parameters * ITEM}
    # On the largest model the engine runs under the limit only, the whole-model path with and without.
    limits: dict[str, list[int | None]] = {ENGINE: [arguments.limit] if limited_too else [None], WHOLE: [None]}
    limits[WHOLE] += [arguments.limit] if limited_too else []
    cases = [(path, limit) for path in (ENGINE, WHOLE) if path in arguments.paths for limit in limits[path]]
    for path, limit in cases:
        row: dict[str, Any] = {"path": path, **size, "limit_bytes": limit}
        if path == WHOLE and limit is None:
            needed, free = _whole_model_needs(shape, arguments), psutil.virtual_memory().available
            if needed > free:
                skipped = f"needs about {gigabytes(needed)} GB; {gigabytes(free)} GB were free"
                yield row | {"skipped": skipped}
                continue
        command = _command(path, model, text, output, arguments)
        if limit is None:
            child = run(command, log)
        else:
            with limited(limit) as imposed:
                child = run(command, log, imposed)
        if not child.stopped:
            _succeed(child)
        if child.peak <= peak_memory():
            raise SystemExit("a process counts its parent's memory at its start as its own; this one never held more")
        row |= {"stopped_by_limit": child.stopped, "peak_bytes": child.peak, "seconds": round(child.seconds, 1)}
        facts = None if child.stopped or path == WHOLE else RunFacts.read(output)
        if facts is not None:
            parts = facts.planned["host"]
            row |= {"planned_bytes": sum(part["bytes"] for part in parts), "planned": parts}
        yield row
        for left in (output, place / f".{output.name}.unfinished"):
            shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(model)


def _command(path: str, model: Path, text: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of a case."""
    ratio, samples, length = map(str, (arguments.ratio, arguments.samples, arguments.sequence_length))
    if path == WHOLE:
        places = [str(model), str(text), str(output)]
        return [sys.executable, "-c", WHOLE_MODEL, *places, ratio, samples, length, arguments.allocation]
    command = [sys.executable, "-m", "modegpt", "compress", str(model), "--ratio", ratio, "--output", str(output)]
    command += ["--calibration", str(text), "--method", "modegpt", "--samples", samples, "--sequence-length", length]
    return [*command, "--allocation", arguments.allocation, "--evaluate", "none", "--device", "cpu"]


def _whole_model_needs(shape: Shape, arguments: argparse.Namespace) -> int:
    """About what the whole-model path takes: the bound, and both models."""
    both: float = (2 - arguments.ratio) * shape.layers * shape.layer_parameters + 2 * shape.rest_parameters
    return round(sum(bound(shape, arguments.samples * arguments.sequence_length).values()) + both * ITEM)


def _succeed(child: Child) -> None:
    if child.code:
        raise SystemExit(f"a process failed with exit code {child.code}:\n{child.log[-2000:]}")


def report(results: dict[str, Any]) -> str:
    """The results in words and a table."""
    limit, bound_bytes = results["limit"], sum(results["bound"].values())
    columns = ["path", "layers", "weights", "peak", "plan", "peak / plan", "bound", "limit", "time"]
    rows = []
    for row in results["rows"]:
        cells = [row["path"], str(row["layers"]), gigabytes(row["weights_bytes"])]
        if "skipped" in row:
            rows.append([*cells, f"not run: {row['skipped']}", "", "", "", "", ""])
            continue
        planned = row.get("planned_bytes")
        stopped = " (stopped)" if row["stopped_by_limit"] else ""
        cells += [gigabytes(row["peak_bytes"]) + stopped]
        cells += ["", ""] if planned is None else [gigabytes(planned), f"{row['peak_bytes'] / planned:.2f}"]
        cells += [gigabytes(bound_bytes) if row["path"] == ENGINE else ""]
        cells += ["" if row["limit_bytes"] is None else gigabytes(row["limit_bytes"])]
        rows.append([*cells, f"{row['seconds']:.0f} s"])
    layer = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in results["layer"].items())
    terms = " + ".join(f"{gigabytes(size)} {name}" for name, size in results["bound"].items())
    return (
        f"Peak resident memory in GB (10^9 bytes) of compressing random float32 Llamas ({layer}) by "
        f"{results['ratio']:.0%} with `--method modegpt`, on {results['calibration']['tokens']:,} tokens; "
        "ru_maxrss of a process of its own. The plan is what `modegpt compress` predicts before it starts.\n\n"
        + table(columns, rows)
        + f"\nBound: {terms}.\n\nLimit, on {limit['layers']} layers: {limit['means']}.\n"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the peaks against the size of the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if "skipped" not in row and not row["stopped_by_limit"]]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, mark in ((ENGINE, "o-"), (WHOLE, "s-")):
        _line(axes, [(row["weights_bytes"], row["peak_bytes"]) for row in rows if row["path"] == name], mark, name)
    planned = [(row["weights_bytes"], row["planned_bytes"]) for row in rows if "planned_bytes" in row]
    _line(axes, planned, "x:", f"{ENGINE}, planned")
    stopped = [row for row in results["rows"] if row.get("stopped_by_limit")]
    _line(axes, [(row["weights_bytes"], row["peak_bytes"]) for row in stopped], "rX", "stopped by the limit")
    axes.axhline(sum(results["bound"].values()) / 1e9, color="grey", linestyle="--", label="bound")
    limit = results["limit"]["bytes"] / 1e9
    axes.axhline(limit, color="red", linewidth=1, label=f"{limit:g} GB")
    axes.set(xlabel="weights (GB)", ylabel="peak resident memory (GB)", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _line(axes: Any, points: Sequence[tuple[int, int]], mark: str, label: str) -> None:
    if points:
        axes.plot(*([value / 1e9 for value in values] for values in zip(*points, strict=True)), mark, label=label)


if __name__ == "__main__":
    main()
