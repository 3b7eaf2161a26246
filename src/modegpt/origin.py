"""Where a profile came from: what ``profile`` writes beside it, and what a compression takes over from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedConfig
from typing_extensions import Self

from .config import HELD_OUT, NONE, RunConfig
from .errors import CheckpointError, InvalidRequest
from .files import replace_file
from .kept import PROFILE_FILE
from .report import TextFacts

ORIGIN_FILE = "origin.json"
#: What the profile was made with; a compression from it has the same.
_TAKEN = ("method", "modules", "ridge", "joint_only", "calibration", "samples", "sequence_length", "seed")


class Origin(BaseModel):
    """The facts of ``origin.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    command: str
    versions: dict[str, str]
    source: str
    model: dict[str, str]
    """What tells the model from others, see :func:`model_identity`."""
    dtype: str
    options: dict[str, Any]
    calibration: TextFacts
    probe: TextFacts | None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if missing := [name for name in _TAKEN if name not in self.options]:
            raise ValueError(f"options lack {', '.join(missing)}")
        self.settled()
        return self

    def write(self, directory: Path) -> None:
        """Write ``origin.json`` into ``directory``."""
        text = self.model_dump_json(indent=1) + "\n"
        replace_file(directory / ORIGIN_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, directory: Path) -> Origin:
        """The facts in ``directory``; raises :class:`CheckpointError`."""
        try:
            return cls.model_validate_json((directory / ORIGIN_FILE).read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{str(directory)!r} is no profile: {ORIGIN_FILE} cannot be read: {error.strerror}; "
                "make one with modegpt profile"
            ) from error
        except ValidationError as error:
            raise CheckpointError(f"{directory / ORIGIN_FILE} is not what modegpt profile writes") from error

    def settled(self) -> RunConfig:
        """What a compression from the profile has in common with it; the rest is as it is by default."""
        return RunConfig.validated(**{name: self.options[name] for name in _TAKEN}, ratio=0.5, model="", output="")

    def applied(self, config: RunConfig) -> RunConfig:
        """``config`` with what the profile settles; refuses options that ask for something else.

        Nothing is evaluated unless ``--evaluate`` names a text: held-out text would be calibration text.
        """
        settled = self.settled()
        for name in _TAKEN:
            given, own = getattr(config, name), getattr(settled, name)
            if name in config.model_fields_set and given != own and (name, given) != ("calibration", NONE):
                option = "--" + name.replace("_", "-")
                raise InvalidRequest(f"{option} {_words(given)}: the profile was made with {_words(own)}; leave it out")
        for name, possible in (("allocation", ("sensitivity", "uniform")), ("statistics", ("dense",))):
            given = getattr(config, name)
            if name in config.model_fields_set and given not in possible:
                raise InvalidRequest(
                    f"--{name} {given} needs calibration text; with --profile-from use {' or '.join(possible)}"
                )
        if "evaluate" in config.model_fields_set and config.evaluate == HELD_OUT:
            raise InvalidRequest(
                f"--evaluate {HELD_OUT}: with --profile-from there is no calibration text to hold any out of; "
                "name a text, or leave it out"
            )
        changes: dict[str, Any] = {name: getattr(settled, name) for name in _TAKEN}
        changes |= {"statistics": "dense"}
        changes |= {} if "allocation" in config.model_fields_set else {"allocation": "sensitivity"}
        changes |= {"evaluate": "none"} if config.evaluate == HELD_OUT else {}
        given = {name: getattr(config, name) for name in config.model_fields_set}
        return type(config).validated(**given | changes)  # what was settled is checked with what was asked for

    def check(self, identity: Mapping[str, str]) -> None:
        """Refuse another model than the one that was profiled."""
        if dict(identity) != self.model:
            raise InvalidRequest(
                f"MODEL is not the one that was profiled ({self.source}): its config or its weights differ; "
                "profile it first"
            )


def _words(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def model_identity(config: PreTrainedConfig, weights: str) -> dict[str, str]:
    """What tells a model from others: the hash of its config, and a fingerprint of its ``weights``.

    The dtype is not part of it: it is written into the config when the weights are loaded, in whichever one.
    """
    facts = {name: value for name, value in config.to_dict().items() if name not in ("dtype", "transformers_version")}
    text = json.dumps(facts, sort_keys=True, default=str)
    return {"config": sha256(text.encode()).hexdigest(), "weights": weights}


def profile_hash(directory: Path) -> str:
    """What tells a profile from others."""
    return sha256((directory / PROFILE_FILE).read_bytes()).hexdigest()
