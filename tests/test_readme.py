"""Numbers and commands in README and docs are those of the results files and of the command line."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer

from helpers import run_cli
from modegpt.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[list[str]]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return [shlex.split(line) for line in re.findall(r"^\$ modegpt (.*)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_commands_parse(words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_quality_tables_are_quoted_from_the_results() -> None:
    parts = (ROOT / "benchmarks/results/quality.md").read_text().split("\n\n")
    tables = [table.strip() for title, table in itertools.pairwise(parts) if title.startswith("Perplexity on")]
    crossed = tables.pop()  # that of all texts
    assert tables[0] in README
    assert crossed in README
    results = json.loads((ROOT / "benchmarks/results/quality.json").read_text())
    assert len(tables) == 1 + len(results["texts"])
    for row in results["rows"]:
        assert abs(row["block_parameters_removed"] - row["ratio"]) < 0.005
        found = [row["perplexity"], *(text["compressed"] for text in row.get("texts", {}).values())]
        shown = [f"{value:.2f}" if value < 1e4 else f"{value:.0e}" for value in found]
        assert all(value in table for value, table in zip(shown, tables, strict=False))


def test_what_is_lost_beside_the_papers_method_is_that_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]

    def lost(row: dict[str, Any], text: str) -> float:
        if text == "test":
            return math.log(row["perplexity"] / row["dense_perplexity"])
        return math.log(row["texts"][text]["compressed"] / row["texts"][text]["dense"])

    shares: dict[str, list[float]] = {}
    over_predicted: list[float] = []
    for text, ratio in itertools.product(("test", "ptb", "alpaca", "novels"), (0.1, 0.2, 0.3, 0.4, 0.5)):
        some = [row for row in rows if row["ratio"] == ratio and (text == "test" or text in row.get("texts", {}))]
        (own,) = (row for row in some if (row["method"], row["allocation"]) == ("greedy", "sensitivity"))
        assert all(lost(own, text) <= lost(row, text) for row in some)
        best = min(lost(row, text) for row in some if row["method"] == "modegpt")
        shares.setdefault(text, []).append(lost(own, text) / best)
        over_predicted += [] if text == "test" else [lost(own, text) / own["predicted_loss"]]
    own, others = shares.pop("test"), [share for one in shares.values() for share in one]
    page = " ".join(README.split())
    assert f"it loses {own[0]:.2f} (10 %) to {own[-1]:.2f} (50 %) of" in page
    assert f"on the other texts {min(others):.2f} to {max(others):.2f} of" in page
    times = f"{min(over_predicted):.1f} to {max(over_predicted):.0f} times"
    assert f"on other kinds {times} the predicted loss" in page
    page = " ".join((ROOT / "docs/mathematics.md").read_text(encoding="utf-8").split())
    assert "it is {:.2f}, {:.2f} and {:.2f}".format(*own[1:4]) in page
    assert f"more is lost than is predicted, {times} as much" in page
    assert f"on Penn Treebank it is {shares['ptb'][2]:.2f} and on novels {shares['novels'][2]:.2f}" in page


def test_what_a_mixture_changes_is_quoted_from_the_results() -> None:
    page = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")
    alone, mixed = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("quality", "mixture")
    )
    setting = {"method": "greedy", "allocation": "sensitivity", "ratio": 0.3}
    before, after = (next(row for row in run["rows"] if row.items() >= setting.items()) for run in (alone, mixed))
    found = [(after["dense_perplexity"], before["perplexity"], after["perplexity"])]
    found += [
        (text["dense"], before["texts"][name]["compressed"], text["compressed"])
        for name, text in after["texts"].items()
    ]
    assert len(found) == 4
    for values in found:
        assert "| {:.2f} | {:.2f} | {:.2f} |".format(*values) in page


@pytest.mark.parametrize(
    ("name", "place", "page"),
    [
        ("speed", 0, "README.md"),
        ("memory", 0, "README.md"),
        ("quantised", 1, "README.md"),
        ("tasks", 1, "README.md"),
        ("throughput", 1, "README.md"),
        ("crossed", 0, "docs/calibration.md"),
        ("profiles", 0, "docs/engines.md"),
        ("gains", 0, "docs/mathematics.md"),
    ],
)
def test_measured_costs_are_quoted_from_the_results(name: str, place: int, page: str) -> None:
    parts = (ROOT / f"benchmarks/results/{name}.md").read_text().split("\n\n")
    tables = [part for part in parts if part.startswith("|")]
    assert tables[place].strip() in (ROOT / page).read_text(encoding="utf-8")


def test_the_scaling_table_is_that_of_the_formulas() -> None:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    assert spec is not None
    assert spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"scaling": scaling}):
        spec.loader.exec_module(scaling)
    table = (ROOT / "benchmarks/results/scaling.md").read_text()
    assert scaling.table() == table
    assert table in (ROOT / "docs/scaling.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/families.md"])
def test_the_table_of_families_is_that_of_the_command(page: str) -> None:
    outcome = run_cli("families", "--markdown")
    assert outcome.code == 0
    assert outcome.out.count("\n") > 19
    assert outcome.out in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def test_what_tasks_lose_without_one_of_them_is_said() -> None:
    models = json.loads((ROOT / "benchmarks/results/tasks.json").read_text())["models"]

    def average(one: dict[str, Any]) -> float:
        others = [task for name, task in one["tasks"].items() if name != "boolq"]
        return sum(task["metrics"][task["shown"]] for task in others) / len(others)

    lost = {one["model"]: f"{100 * (1 - average(one) / average(models[0])):.0f}" for one in models}
    text = " ".join((ROOT / "README.md").read_text().split())
    for method, words in (("greedy", "it loses {}, {}, {}, {} and {} %"), ("modegpt", "{}, {}, {}, {} and {} %")):
        assert words.format(*(lost[f"{method}-{ratio}"] for ratio in (10, 20, 30, 40, 50))) in text
