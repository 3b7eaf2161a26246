"""The README of a compressed checkpoint, made from its report."""

from __future__ import annotations

from .report import CompressionReport


def card_rows(report: CompressionReport) -> list[tuple[str, str]]:
    """What a compressed model is, in pairs of a name and a value."""
    rows = [
        ("Compressed from", report.source),
        ("Method", f"{report.options.get('method')}, allocation {report.options.get('allocation')}"),
        ("Decoder-block parameters removed", f"{report.block_parameters.removed:.1%}"),
        ("All parameters removed", f"{report.parameters.removed:.1%} ({report.parameters.compressed:,.0f} left)"),
        ("Weights", f"{report.dtype}, {report.bytes.compressed / 1e6:,.1f} MB"),
        ("Calibration", f"{report.calibration.source}, {report.calibration.tokens:,} tokens"),
    ]
    if report.perplexity and report.evaluation:
        change = f"{report.perplexity.dense:.2f} dense, {report.perplexity.compressed:.2f} compressed"
        rows.append((f"Perplexity ({report.evaluation.source})", change))
    return rows


def model_card(report: CompressionReport) -> str:
    """Markdown with the facts of ``report``, how to load the model, and how to repeat the compression."""
    (first, source), *others = card_rows(report)
    table = "\n".join(f"| {name} | {value} |" for name, value in [(first, f"`{source}`"), *others])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- modegpt
- compressed
---

# Compressed with modegpt

| | |
|---|---|
{table}

## Use

```python
import modegpt
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
```

Without modegpt installed, pass `trust_remote_code=True` to both: the modeling files are in this directory.
`compression.json` holds every rank, kept index and error, the versions and the hash of the calibration tokens.

## Made by

```
{report.command}
```
"""
