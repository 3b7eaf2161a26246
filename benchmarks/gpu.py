"""Time and memory of compressing random bfloat16 models of the shapes of Llama-2-7B and Llama-3-8B on a GPU.

    python benchmarks/gpu.py

Each model is compressed by `modegpt compress --method modegpt`, evaluation included, in a process of its own; beside
every phase and peak stands what the plan predicted. Then the same process runs plain dense forward passes over the
same calibration windows, one by one, with the model as a whole on the device. Without CUDA the same is done on the
CPU with narrower and fewer layers and fewer tokens: that shows that the script works, and nothing about these models.

Checkpoints are made below ``--directory`` and removed again; about three times a model's size must be free there.
Writes ``results/gpu.json`` and ``gpu.md`` after every model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from modegpt.config import RunConfig
from modegpt.console import choose_progress
from modegpt.data import TokenWindows
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.report import RunFacts
from modegpt.sources import ModelSource
from random_checkpoint import Shape, write_text
from results_file import RESULTS, gigabytes, header, table, write

SHAPES = {
    "Llama-2-7B": Shape(layers=32, hidden=4096, intermediate=11008, heads=32, groups=32, vocabulary=32000),
    "Llama-3-8B": Shape(layers=32, hidden=4096, intermediate=14336, heads=32, groups=8, vocabulary=128256),
}
SEED = 0
#: The plan's phases that one phase of the run is made of, where they differ.
PLANNED = {"compress": ("calibrate", "solve", "pass on")}


def main() -> None:
    """Measure every model and write the results files."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--scale", type=int, help="divide all widths by this; 1 on a GPU, 16 without")
    parser.add_argument("--layers", type=int, help="32 on a GPU, 2 without")
    parser.add_argument("--samples", type=int, help="128 on a GPU, 8 without")
    parser.add_argument("--sequence-length", type=int, help="2048 on a GPU, 256 without")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the process that is measured
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments)))
        return

    results: dict[str, Any] = header(parser, arguments, ("directory", "output", "measure"))
    scale, layers, samples, length = (1, 32, 128, 2048) if cuda else (16, 2, 8, 256)
    scale, layers = arguments.scale or scale, arguments.layers or layers
    samples, length = arguments.samples or samples, arguments.sequence_length or length
    results |= {
        "dtype": "bfloat16",
        "calibration": {"windows": samples, "tokens": samples * length, "text": "random tokens"},
        "ratio": arguments.ratio,
        "scale": scale,
        "seeds": {"weights": SEED, "text": SEED, "calibration": SEED},
        "rows": [],
    }
    for name in arguments.models:
        shape = scaled(SHAPES[name], scale, layers)
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="modegpt-gpu-") as place:
            prepare(Path(place), shape, samples, length)
            command = [sys.executable, __file__, "--measure", place, f"--ratio={arguments.ratio}"]
            command += [f"--samples={samples}", f"--sequence-length={length}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = {"model": name, **asdict(shape), "parameters": shape.parameters, "weights_bytes": 2 * shape.parameters}
        row |= json.loads(printed.splitlines()[-1])
        results["machine"]["gpu"] = row.pop("gpu")
        results["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(results, arguments.output, report(results))


def scaled(shape: Shape, scale: int, layers: int) -> Shape:
    """A narrower model of fewer layers; heads keep their size."""
    return Shape(
        layers=layers,
        hidden=shape.hidden // scale,
        intermediate=shape.intermediate // scale,
        heads=max(1, shape.heads // scale),
        groups=max(1, shape.groups // scale),
        vocabulary=shape.vocabulary // scale,
    )


def prepare(place: Path, shape: Shape, samples: int, length: int) -> None:
    """Write a checkpoint and a text, a tenth of which is enough to evaluate on."""
    needed, free = 6 * shape.parameters, shutil.disk_usage(place).free
    if needed > free:
        raise SystemExit(f"{gigabytes(needed)} GB of disk are needed, {gigabytes(free)} GB are free: --directory")
    windows = max(math.ceil(samples / 0.9), 80) + 2
    write_text(place / "text.txt", windows * length, shape.vocabulary, SEED)
    builder = Path(__file__).with_name("random_checkpoint.py")
    options = [f"--{name}={value}" for name, value in asdict(shape).items()]
    command = [sys.executable, str(builder), str(place / "model"), *options, "--dtype=bfloat16", f"--seed={SEED}"]
    subprocess.run(command, check=True)


def measure(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress the model in ``place``, then run plain forward passes."""
    config = RunConfig.validated(
        model=str(place / "model"),
        ratio=arguments.ratio,
        method="modegpt",
        output=place / "compressed",
        calibration=str(place / "text.txt"),
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        seed=SEED,
    )
    progress = choose_progress(Console(stderr=True), quiet=False)
    started = time.perf_counter()
    compress_to_directory(config, progress, show=lambda plan: None)  # a plan to be shown includes times
    total = time.perf_counter() - started
    facts = RunFacts.read(config.output)
    assert facts is not None
    cuda = torch.device(config.device).type == "cuda"
    row = {
        "gpu": torch.cuda.get_device_name(config.device) if cuda else None,
        "device": torch.device(config.device).type,
        "threads": torch.get_num_threads(),
        "total_seconds": round(total, 2),
        "phases": phases(facts),
        "peak_memory_bytes": facts.peak_memory_bytes,
        "planned_memory": facts.planned["host"],
        "peak_device_memory_bytes": facts.peak_device_memory_bytes,
        "peak_device_reserved_bytes": torch.cuda.max_memory_reserved(config.device) if cuda else None,
        "planned_device_memory": facts.planned["device"],
    }
    source = ModelSource(config.model)
    windows = read_texts(config, source.tokenizer()).calibration
    model = source.model(config.dtype, config.device)
    row["dense_decoder_seconds"] = round(forward_seconds(model.model, windows, config.device), 3)
    row["dense_forward_seconds"] = round(forward_seconds(model, windows, config.device), 3)
    return row


def phases(facts: RunFacts) -> list[dict[str, Any]]:
    """Measured and planned seconds of the run's phases; not every phase has a plan."""
    planned = {phase["name"]: phase["seconds"] for phase in facts.planned["phases"]}
    rows = []
    for name, seconds in facts.seconds.items():
        parts = {part: planned[part] for part in PLANNED.get(name, (name,)) if part in planned}
        rows.append({"name": name, "seconds": round(seconds, 2), "planned_seconds": parts})
    return rows


@torch.inference_mode()
def forward_seconds(model: Any, windows: TokenWindows, device: str) -> float:
    """Wall-clock seconds of one pass over ``windows``, one at a time, after a pass over the first."""
    batches = [batch.ids.to(device) for batch in windows.batches(1)]
    for timed in (batches[:1], batches):
        _wait(device)
        started = time.perf_counter()
        for ids in timed:
            model(input_ids=ids, use_cache=False)
        _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def report(results: dict[str, Any]) -> str:
    """The results in words and tables."""
    calibration, rows = results["calibration"], results["rows"]
    text = f"Compression by {results['ratio']:.0%} of random bfloat16 models, calibrated on {calibration['windows']} "
    text += f"windows of {calibration['tokens'] // calibration['windows']} random tokens, by `--method modegpt`.\n"
    if any(row["device"] == "cpu" for row in rows):
        text += "\n**No GPU: this was run on the CPU, to see that the script works.**\n"
    if results["scale"] != 1 or any(row["layers"] != SHAPES[row["model"]].layers for row in rows):
        text += f"\n**Not the real shapes: widths divided by {results['scale']}, {rows[0]['layers']} layers.**\n"
    for row in rows:
        text += f"\n## The shape of {row['model']}: {row['parameters'] / 1e9:.3f} billion parameters\n\n"
        text += table(["", "measured", "planned"], [*_times(row), *_peaks(row)]) + "\n"
        text += "Time of one dense pass over the calibration windows, plain Transformers: "
        text += f"{row['dense_forward_seconds']:.2f} s, without the output head {row['dense_decoder_seconds']:.2f} s.\n"
    text += "\nThe phase `compress` is planned in parts. `all` also has the planning, reading and writing of files. "
    return text + "GB are 10^9 bytes.\n"


def _times(row: dict[str, Any]) -> list[list[str]]:
    lines, planned_sum = [], 0.0
    for phase in row["phases"]:
        parts = phase["planned_seconds"]
        planned = sum(parts.values())
        planned_sum += planned
        cell = f"{planned:.2f}" if parts else ""
        if len(parts) > 1:
            cell += f" ({', '.join(f'{name} {seconds:.2f}' for name, seconds in parts.items())})"
        lines.append([f"{phase['name']}, s", f"{phase['seconds']:.2f}", cell])
    return [*lines, ["all, s", f"{row['total_seconds']:.2f}", f"{planned_sum:.2f}"]]


def _peaks(row: dict[str, Any]) -> list[list[str]]:
    lines = [("host memory, GB", row["peak_memory_bytes"], row["planned_memory"])]
    if row["device"] == "cuda":
        lines.append(("GPU memory, tensors, GB", row["peak_device_memory_bytes"], row["planned_device_memory"]))
        lines.append(("GPU memory, reserved, GB", row["peak_device_reserved_bytes"], []))
    return [
        [name, gigabytes(peak), gigabytes(sum(part["bytes"] for part in planned)) if planned else ""]
        for name, peak, planned in lines
    ]


if __name__ == "__main__":
    main()
