"""The facts of one compression, as ``compression.json`` and ``spectra.json`` keep them beside the weights."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import PreTrainedModel

from .budget import Module
from .config import NONE, CompressionConfig
from .data import TokenWindows
from .engine import Compression
from .errors import CheckpointError
from .families import decoder_layers, family_of
from .results import Choice, LayerResult, ModuleResult

REPORT_FILE, SPECTRA_FILE, RUN_FILE = "compression.json", "spectra.json", "run.json"
_PACKAGES = ("modegpt", "torch", "transformers", "safetensors", "tokenizers", "numpy")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextFacts(_Facts):
    """Which tokens were used."""

    source: str
    windows: int
    tokens: int
    sha256: str
    mixture: dict[str, int] | None = None
    """The number of windows from each source, where there are several."""

    @classmethod
    def of(
        cls, source: str, windows: TokenWindows | None, parts: Mapping[str, TokenWindows] | None = None
    ) -> TextFacts:
        """Describe ``windows`` that came from ``source``: from those of ``parts``, where there are several.

        Without any, that there were none.
        """
        if windows is None:
            return cls(source=NONE, windows=0, tokens=0, sha256=sha256().hexdigest())
        mixture = {name: len(part) for name, part in parts.items()} if parts and len(parts) > 1 else None
        return cls(source=source, windows=len(windows), tokens=windows.tokens, sha256=windows.sha256(), mixture=mixture)


class Pair(_Facts):
    """The same quantity of the dense and the compressed model."""

    dense: Annotated[float, Field(gt=0)]
    compressed: float

    @property
    def removed(self) -> float:
        """The share that is gone."""
        return 1 - self.compressed / self.dense

    @classmethod
    def mean(cls, pairs: Mapping[str, Pair], weights: Mapping[str, int]) -> Pair:
        """The weighted geometric mean of ``pairs``, by name.

        Of perplexities on windows of one length, with the numbers of windows as weights, it is the perplexity on all
        of them.
        """
        total = sum(weights[name] for name in pairs)

        def of(kind: str) -> float:
            return math.exp(math.fsum(math.log(getattr(p, kind)) * weights[name] / total for name, p in pairs.items()))

        return cls(dense=of("dense"), compressed=of("compressed"))


class LayerFacts(_Facts):
    """One decoder layer."""

    sparsity: dict[Module, float]
    scores: list[Annotated[float, Field(allow_inf_nan=False)]] | None
    divergence: dict[Module, float] | None = None
    """What every module was predicted to cost in nats per token, where the allocation knew."""
    modules: dict[Module, ModuleResult]


class RunFacts(_Facts):
    """What one run took, as ``run.json`` keeps it: unlike the report, different every time."""

    seconds: dict[str, float]
    """Wall-clock time by phase, of the last process where there were several."""
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    processes: int
    starts: int
    """How often the run was started: more than once if it was interrupted."""
    planned: dict[str, Any]
    """What was predicted before: see :class:`modegpt.plan.Plan`."""

    def write(self, directory: Path) -> None:
        """Write ``run.json`` into ``directory``."""
        (directory / RUN_FILE).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunFacts | None:
        """The facts in ``directory``; None where there are none that can be read."""
        try:
            return cls.model_validate_json((directory / RUN_FILE).read_bytes())
        except (OSError, ValidationError):
            return None


class AlignmentFacts(_Facts):
    """Which alignment of ranks was chosen, and by what."""

    chosen: int
    seconds: dict[int, list[float]]
    """For each alignment, of products with a billion parameters: with one token and with many at once."""


_Curve = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)] | None


class _Spectrum(_Facts):
    """What of a :class:`ModuleResult` the report has no room for."""

    curve: _Curve = None
    spectrum: _Curve = None


class _Spectra(_Facts):
    """What ``spectra.json`` keeps."""

    format: int = 1
    layers: list[dict[Module, _Spectrum]]


class CompressionReport(_Facts):
    """Everything needed to judge a compression and to repeat it."""

    format: int = 1
    command: str
    versions: dict[str, str]
    source: str
    dtype: str
    options: dict[str, Any]
    calibration: TextFacts
    evaluation: TextFacts | None
    perplexity: Pair | None
    perplexities: dict[str, Pair] | None = None
    """The perplexity on each source of the evaluation text, where there are several."""
    predicted_loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """ln(perplexity / dense perplexity) as the allocation predicted it, where it did."""
    requested_ratio: float
    block_parameters: Pair
    parameters: Pair
    bytes: Pair
    temperature: float | None
    alignment: AlignmentFacts | None = None
    """Where the alignment of ranks was measured."""
    layers: list[LayerFacts] = Field(min_length=1)

    def measured(self) -> dict[str, Pair]:
        """The perplexity on the evaluation text and, where that has several sources, on each of them."""
        if self.perplexity is None or self.evaluation is None:
            return {}
        return {self.evaluation.source: self.perplexity, **(self.perplexities or {})}

    def write(self, directory: Path) -> None:
        """Write ``compression.json`` into ``directory`` and, where there is something for it, ``spectra.json``."""
        facts = self.model_dump(mode="json")
        modules = [layer["modules"] for layer in facts["layers"]]
        spectra = [
            {name: {part: one.pop(part) for part in _Spectrum.model_fields} for name, one in layer.items()}
            for layer in modules
        ]
        _write_layers(directory / REPORT_FILE, facts)
        if any(part for layer in spectra for one in layer.values() for part in one.values()):
            _write_layers(directory / SPECTRA_FILE, {"format": 1, "layers": spectra})

    @classmethod
    def read(cls, directory: Path) -> CompressionReport:
        """Read and validate the report in ``directory`` and the spectra beside it; raises :class:`CheckpointError`."""
        report = _read(directory / REPORT_FILE, cls)
        if not (path := directory / SPECTRA_FILE).is_file():
            return report
        spectra = _read(path, _Spectra).layers
        if [layer.keys() for layer in spectra] != [layer.modules.keys() for layer in report.layers]:
            raise CheckpointError(f"{path} is not of the layers that {REPORT_FILE} has")
        layers = [
            layer.model_copy(
                update={"modules": {name: replace(one, **vars(own[name])) for name, one in layer.modules.items()}}
            )
            for layer, own in zip(report.layers, spectra, strict=True)
        ]
        return report.model_copy(update={"layers": layers})


_File = TypeVar("_File", bound=_Facts)
_KINDS = {REPORT_FILE: "a compression report", SPECTRA_FILE: "a report's spectra"}


def _read(path: Path, kind: type[_File]) -> _File:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"is not compressed by modegpt: it has no {path.name}" if path.parent.is_dir() else "is no directory"
        raise CheckpointError(f"{path.parent} {what}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise CheckpointError(f"{path} is not {_KINDS[path.name]}: {where}: {problem['msg']}") from error


def _write_layers(path: Path, facts: Mapping[str, Any]) -> None:
    """``facts`` as JSON: readable at its head, and one line for every layer."""
    layers = ",\n".join(f"  {json.dumps(layer)}" for layer in facts["layers"])
    head = json.dumps({name: value for name, value in facts.items() if name != "layers"}, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "layers": [\n{layers}\n ]\n}}\n', encoding="utf-8")


def build_report(
    dense: PreTrainedModel,
    result: Compression,
    config: CompressionConfig,
    calibration: TextFacts,
    *,
    command: str,
    source: str | None = None,
    evaluation: TextFacts | None = None,
    perplexities: Mapping[str, Pair] | None = None,
) -> CompressionReport:
    """Gather the facts of a compression of ``dense`` that gave ``result``.

    ``perplexities`` are those on each source of the ``evaluation`` text.
    """
    models = (dense, result.model)
    blocks = [_parameters(nn.ModuleList(decoder_layers(model, family_of(dense)))) for model in models]
    everything = [_parameters(model) for model in models]
    stored = [_stored_bytes(model) for model in models]
    return CompressionReport(
        command=command,
        versions=versions(),
        source=source or dense.name_or_path or type(dense).__name__,
        dtype=str(dense.dtype).removeprefix("torch."),
        options=config.settings(),
        calibration=calibration,
        evaluation=evaluation,
        perplexity=_perplexity(evaluation, perplexities or {}),
        perplexities=dict(perplexities) if perplexities and len(perplexities) > 1 else None,
        predicted_loss=result.choice.loss,
        requested_ratio=config.ratio or result.choice.ratio or 0.0,
        block_parameters=Pair(dense=blocks[0], compressed=blocks[1]),
        parameters=Pair(dense=everything[0], compressed=everything[1]),
        bytes=Pair(dense=stored[0], compressed=stored[1]),
        temperature=_finite(result.choice.temperature),
        alignment=None if result.alignment is None else AlignmentFacts(**asdict(result.alignment)),
        layers=_layer_facts(result.layers, result.choice),
    )


def _perplexity(evaluation: TextFacts | None, perplexities: Mapping[str, Pair]) -> Pair | None:
    """The perplexity on all of the evaluation text."""
    if len(perplexities) <= 1 or evaluation is None:
        return next(iter(perplexities.values()), None)
    return Pair.mean(perplexities, evaluation.mixture or {})


def _finite(value: float | None) -> float | None:
    """None for the infinite temperature of a uniform allocation, which JSON cannot hold."""
    return None if value is None or math.isinf(value) else value


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stored_bytes(model: nn.Module) -> int:
    """What the weights take in safetensors files: tied tensors once, buffers included."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in parameters]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *buffers])


def _layer_facts(layers: Sequence[LayerResult], choice: Choice) -> list[LayerFacts]:
    return [
        LayerFacts(
            sparsity=dict(layer.sparsity),
            scores=None if choice.scores is None else list(choice.scores[index]),
            divergence=None if choice.divergence is None else choice.divergence[index],
            modules=dict(layer.modules),
        )
        for index, layer in enumerate(layers)
    ]


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's other count begins with the parent's size
        match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)
        if match is not None:
            return int(match[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_memory(device: torch.device) -> int | None:
    """Largest memory held on a CUDA device so far, in bytes; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
