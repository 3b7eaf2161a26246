"""Options that several commands have, and what the configuration of a run says of its fields."""

from __future__ import annotations

from typing import Annotated

import typer

from .config import RunConfig


def help_of(field: str) -> str:
    """What the configuration of a run says of one of its fields."""
    return RunConfig.model_fields[field].description or ""


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result and errors.")]
Device = Annotated[str, typer.Option(help=help_of("device"))]
Dtype = Annotated[str, typer.Option(help=help_of("dtype"))]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help=help_of("trust_remote_code"))]
