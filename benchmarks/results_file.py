"""What the results files of the benchmarks have in common: the command, the versions, the machine."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from modegpt.report import versions

RESULTS = Path(__file__).parent / "results"


def header(parser: argparse.ArgumentParser, arguments: argparse.Namespace, places: Collection[str]) -> dict[str, Any]:
    """The command with the options that are not the defaults, the versions, and the machine.

    Options in ``places`` say where files lie and are left out.
    """
    command = ["python", f"benchmarks/{Path(parser.prog).name}"]
    for name, value in vars(arguments).items():
        if name not in places and value != parser.get_default(name):
            values = value if isinstance(value, (list, tuple)) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return {
        "command": shlex.join(command),
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
    }


def previous_rows(path: Path, results: Mapping[str, Any], keys: Collection[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run, if its ``keys`` were the same as those of ``results``."""
    previous = json.loads(path.read_text()) if path.is_file() else {}
    same = all(previous.get(key) == results[key] for key in keys)
    return list(previous["rows"]) if same else []


def write(results: dict[str, Any], path: Path, text: str) -> None:
    """Write ``results`` as JSON, and ``text``, the table made from them, beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{text}\nMade by `{results['command']}` on {machine_line(results)}.\n")


def machine_line(results: dict[str, Any]) -> str:
    """The machine of a results file in words."""
    machine = results["machine"]
    names = [machine["gpu"]] if machine.get("gpu") else []
    names += [f"{machine['cores']} cores", f"{machine['memory_bytes'] / 1e9:.1f} GB memory"]
    return ", ".join([*names, f"torch {results['versions']['torch']}"])


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def gigabytes(count: float) -> str:
    """Bytes in decimal gigabytes."""
    return f"{count / 1e9:.2f}"
