"""The README's numbers and commands are those of the results files and of the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from modegpt.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    lines = re.findall(r"^\$ modegpt (.*)$", README, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_commands_parse(words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_quality_table_is_quoted_from_the_results() -> None:
    table = [line for line in (ROOT / "benchmarks/results/quality.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(table) in README
    results = json.loads((ROOT / "benchmarks/results/quality.json").read_text())
    for row in results["rows"]:
        assert abs(row["block_parameters_removed"] - row["ratio"]) < 0.005
        assert f"{row['perplexity']:.2f}" in "\n".join(table)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
