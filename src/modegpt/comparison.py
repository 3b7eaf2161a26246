"""Models side by side: perplexity on texts and accuracy on tasks. The first is what the others are compared with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .address import open_model
from .data import TokenWindows, check_length, check_source, first_windows, read_text, tokenize
from .errors import InvalidRequest
from .evaluation import perplexity
from .progress import Progress
from .tasks import SEEDS, LoadedTasks, Tasks, TaskScore, degradation, harness_version, mean


@dataclass(frozen=True)
class Texts:
    """What perplexity is measured on: the first ``samples`` windows of ``sequence_length`` tokens (None: all) of each.

    Windows follow one another, or begin every ``stride`` tokens; then only tokens that no window before had count.
    Raises :class:`InvalidRequest` for what cannot be.
    """

    names: Sequence[str]
    samples: int | None = None
    sequence_length: int = 2048
    stride: int | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            check_source(name, option="--perplexity")
        least = {"samples": (self.samples, 1), "sequence-length": (self.sequence_length, 2), "stride": (self.stride, 1)}
        for option, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise InvalidRequest(f"--{option} {value}: must be at least {smallest}")
        if self.stride is not None and self.stride > self.sequence_length:
            raise InvalidRequest(
                f"--stride {self.stride} would skip tokens; use at most --sequence-length, {self.sequence_length}"
            )

    @classmethod
    def parse(cls, names: str, **options: Any) -> Texts:
        """``names`` separated by commas; a file's name as a whole is that file."""
        return cls([names] if os.path.isfile(names) else split_names(names, "--perplexity"), **options)

    def read(self) -> dict[str, str]:
        """The texts by name."""
        return {name: read_text(name, evaluation=True) for name in self.names}

    def windows(self, text: str, name: str, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """Those of one text."""
        ids, length, stride = tokenize(tokenizer, text), self.sequence_length, self.stride or self.sequence_length
        count = max(1, (len(ids) - length) // stride + 1) if self.samples is None else self.samples
        return first_windows(ids, count, length, stride, what=f"--perplexity {name}")


@dataclass(frozen=True)
class TextScore:
    """Perplexity on the windows of a text, and the hash of their tokens."""

    perplexity: float
    windows: int
    sequence_length: int
    stride: int | None
    sha256: str


@dataclass(frozen=True)
class ModelScores:
    """What one model reached."""

    model: str
    texts: Mapping[str, TextScore] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)

    def facts(self, first: ModelScores) -> dict[str, Any]:
        """For a results file, with the comparison with the ``first`` model."""
        facts = asdict(self)
        for name, score in self.tasks.items():
            facts["tasks"][name] |= {"shown": score.shown, "is_accuracy": score.is_accuracy}
        if (average := mean(self.tasks)) is not None:
            facts["mean"] = {"accuracy": average[0], "error": average[1]}
            facts["mean"]["degradation"] = degradation(self.tasks, first.tasks)
        return facts


def facts_of(scores: Sequence[ModelScores]) -> dict[str, Any]:
    """All ``scores`` for a results file, with the seeds and the version of what asks tasks."""
    asked = any(one.tasks for one in scores)
    return {
        "seeds": SEEDS if asked else {},
        "harness": harness_version() if asked else None,
        "models": [one.facts(scores[0]) for one in scores],
    }


def split_names(names: str, option: str) -> list[str]:
    """What stands between commas, each once; raises :class:`InvalidRequest` where nothing does."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise InvalidRequest(f"{option} {names!r}: name at least one")
    return found


def compare(
    addresses: Sequence[str],
    texts: Texts | None = None,
    tasks: Tasks | None = None,
    *,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    finished: Callable[[list[ModelScores]], None] | None = None,
) -> list[ModelScores]:
    """Measure every model; all are checked, and all data is read, before the first is loaded.

    ``finished`` is told all scores so far after every model. Raises :class:`InvalidRequest` for a model, text or task
    that cannot be had, and for texts that are too short.
    """
    progress = progress or Progress()
    if batch_size < 1:
        raise InvalidRequest(f"--batch-size {batch_size}: must be at least 1")
    models = [
        _Model(address, *open_model(address, dtype=dtype, device=device, trust_remote_code=trust_remote_code))
        for address in addresses
    ]
    if texts is not None:
        for model in models:
            check_length(texts.sequence_length, model.config)
        with progress.phase("text"):
            for name, text in texts.read().items():
                for model in models:
                    model.windows[name] = texts.windows(text, name, model.tokenizer)
    loaded = None
    if tasks is not None:
        for model in models:
            tasks.check(model.tokenizer, model.address)
        with progress.phase("tasks"):
            loaded = tasks.read(progress)
    scores: list[ModelScores] = []
    for model in models:
        scores.append(model.measure(loaded, texts.stride if texts else None, batch_size, progress))
        if finished is not None:
            finished(scores)
    return scores


@dataclass(frozen=True)
class _Model:
    address: str
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    load: Callable[[], PreTrainedModel]
    windows: dict[str, TokenWindows] = field(default_factory=dict)

    def measure(
        self, tasks: LoadedTasks | None, stride: int | None, batch_size: int, progress: Progress
    ) -> ModelScores:
        """Load it, and measure."""
        with progress.phase("load"):
            model = self.load()
        texts = {}
        for name, windows in self.windows.items():
            with progress.phase("evaluate", math.ceil(len(windows) / batch_size)):
                progress.detail(f"{Path(self.address).name}, {Path(name).name}")
                value = perplexity(model, windows, batch_size, progress, stride)
            texts[name] = TextScore(value, len(windows), windows.ids.shape[1], stride, windows.sha256())
        return ModelScores(
            self.address, texts, {} if tasks is None else tasks.scores(model, self.tokenizer, batch_size, progress)
        )
