"""The README of a compressed checkpoint, made from its report."""

from __future__ import annotations

import re
from pathlib import Path

from .report import CompressionReport

#: The first Transformers that the modeling code runs with.
OLDEST = "5.16"
_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.gguf)")


def card_rows(report: CompressionReport) -> list[tuple[str, str]]:
    """What a compressed model is, in pairs of a name and a value."""
    blocks, everything, size = report.block_parameters, report.parameters, report.bytes
    left = f"{everything.compressed:,.0f} of {everything.dense:,.0f} left"
    rows = [
        ("Compressed from", report.source),
        ("Method", f"{report.options.get('method')}, allocation {report.options.get('allocation')}"),
        ("Decoder-block parameters removed", f"{blocks.removed:.1%} ({report.requested_ratio:.1%} aimed at)"),
        ("All parameters removed", f"{everything.removed:.1%} ({left})"),
        ("Weights", f"{report.dtype}, {size.compressed / 1e6:,.1f} MB ({size.dense / 1e6:,.1f} MB dense)"),
        ("Calibration", f"{report.calibration.source}, {report.calibration.tokens:,} tokens"),
    ]
    for text, pair in report.measured().items():
        rows.append((f"Perplexity ({text})", f"{pair.compressed:.2f} ({pair.dense:.2f} dense)"))
    return rows


def model_card(report: CompressionReport) -> str:
    """Markdown with the facts of ``report``, how to load the model, and how to repeat the compression."""
    (first, source), *others = card_rows(report)
    table = "\n".join(f"| {name} | {value} |" for name, value in [(first, f"`{source}`"), *others])
    return f"""---
{_base_model(report.source)}library_name: transformers
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
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "..."  # of this repository, or the directory with these files
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
```

This takes Transformers {OLDEST} or newer; the modeling files are among these. The licence of the model that was
compressed applies. `compression.json` holds every rank, kept index and error, the versions and the hash of the
calibration tokens.

## Made by

```
{report.command}
```
"""


def _base_model(source: str) -> str:
    """What links the card to the dense model, if that is on the hub and not on this machine."""
    return f"base_model: {source}\n" if _ON_THE_HUB.fullmatch(source) and not Path(source).exists() else ""
