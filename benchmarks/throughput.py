r"""Speed of compressed checkpoints against the dense model, by ``modegpt bench``.

    python benchmarks/throughput.py --compressed DIR/full-20 DIR/full-30 --threads 2

The checkpoints are what ``profiles.py`` writes. Writes ``results/throughput.json``, with every single time, and
``results/throughput.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmark_texts import default_model, weights_sha256
from modegpt.bench import KIND, Load, Ratio, Speed, facts_of, measure
from results_file import RESULTS, header, table, write


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default=default_model())
    parser.add_argument("--compressed", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.json")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    load = Load(arguments.batch_sizes, [arguments.sequence_length], arguments.new_tokens, arguments.repeats)
    addresses = [arguments.dense, *arguments.compressed]
    speeds = measure(addresses, load, dtype=arguments.dtype, device=arguments.device)
    results: dict[str, Any] = header(parser, arguments, ("dense", "compressed", "output"))
    results["command"] += f" --compressed {' '.join(f'DIR/{Path(one).name}' for one in arguments.compressed)}"
    facts = facts_of(speeds, load)
    results["machine"] |= facts["machine"]
    if arguments.device.startswith("cuda"):
        results["machine"]["gpu"] = facts["machine"]["device"]
    results["models"] = [
        {**one, "model": Path(address).name, "weights_sha256": weights_sha256(Path(address))}
        for address, one in zip(addresses, facts["models"], strict=True)
    ]
    write(results, arguments.output, text_of(speeds, load, arguments.dtype))


def text_of(speeds: list[Speed], load: Load, dtype: str) -> str:
    """The tables: sizes, and speed by the number of sequences."""
    names = ["dense", *(Path(speed.model).name for speed in speeds[1:])]
    sizes = [
        [
            name,
            f"{one.parameters / 1e6:.1f}",
            f"{one.weight_bytes / 1e6:.0f}",
            f"{one.macs_per_token / 1e6:.1f}",
            f"{one.odd:.0%}",
        ]
        for name, one in zip(names, speeds, strict=True)
    ]
    text = "Millions of parameters, megabytes of weights, millions of multiplications per token (logits included), the "
    text += f"share of the maps' parameters in maps with a width that is no multiple of {KIND}.\n\n"
    text += table(["model", "parameters", "weights", "multiplications", f"not divisible by {KIND}"], sizes)
    (length,) = load.sequence_lengths
    text += f"\nPrompts of {length} tokens, then {load.new_tokens} one by one, {dtype}; tokens per second, "
    text += "times the dense model's speed (median of the repeats, least and greatest), milliseconds of one token.\n\n"
    lines = []
    for place, first in enumerate(speeds[0].timings):
        for name, speed in zip(names, speeds, strict=True):
            own = speed.timings[place]
            prompt, further = own.speeds(load)
            ratios = [Ratio.of(own.prefill, first.prefill), Ratio.of(own.decode, first.decode)]
            shown = [f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.greatest:.2f})" for ratio in ratios]
            latencies = [f"{1000 * seconds:.1f}" for seconds in own.latencies()]
            memory = [f"{own.cache_bytes / 1e6:.1f}", f"{own.peak_bytes / 1e6:.0f}"]
            cells = [str(own.batch_size), name, f"{prompt:.0f}", shown[0], f"{further:.1f}", shown[1]]
            lines.append([*cells, *latencies, *memory])
    heads = ["sequences", "model", "prompt", "times", "new", "times", "p50", "p90", "p99", "cache, MB", "peak, MB"]
    return text + table(heads, lines)


if __name__ == "__main__":
    main()
