"""The validated description of a compression. Field descriptions are the command line's help texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from . import mixture
from .budget import Base, LayerGeometry, Module
from .data import HUB_DATASETS
from .errors import InvalidRequest
from .methods import METHODS, Allocation, Calibrated, Method
from .sources import Dtype, usable_device

#: In place of a text: a part of the calibration text, and no text.
HELD_OUT, NONE = "held-out", "none"

#: The one that loses least, see benchmarks/results/quality.md.
DEFAULT_METHOD = "greedy"


#: What an error of an option's value does not say by itself.
_HINTS = {("--ratio", "less_than"): " (30 % is 0.3)", ("--align", "int_parsing"): ", or 'auto'"}


def _of_method(value: Callable[[type[Method]], Any]) -> Callable[[Mapping[str, Any]], Any]:
    """A default that the method decides, which is validated before; any will do where that was refused."""
    return lambda given: value(METHODS[given.get("method", DEFAULT_METHOD)])


def _needs_text(method: str, allocation: str) -> bool:
    return bool(METHODS[method].statistics) or allocation != "uniform"


def _text(given: Mapping[str, Any]) -> str:
    """The default calibration text: none where it would not be read."""
    known = "method" in given and "allocation" in given
    return mixture.DEFAULT if not known or _needs_text(given["method"], given["allocation"]) else NONE


def _ranges(layers: str) -> list[tuple[int, int]]:
    """The first and the last layer of every range in ``layers``; none for all."""
    parts = [] if layers == "all" else [part.split("-") for part in layers.split(",")]
    return [(int(part[0]), int(part[-1])) for part in parts]


#: How much is removed is said by one of these.
AIMS = ("ratio", "target_parameters", "target_size", "max_perplexity_increase")
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZES = {f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
_SIZES |= {f"{prefix}IB": 1024 ** (power + 1) for power, prefix in enumerate(("K", "M", "G", "T"))}


def _quantity(value: object, units: Mapping[str, int], wanted: str) -> object:
    """The whole number that a text such as '5.5B' stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", value.strip(), flags=re.IGNORECASE)
    if found is None or found[2].upper() not in units or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"give {wanted}")
    number = float(found[1]) * units[found[2].upper()]
    if math.isinf(number):
        raise ValueError(f"give {wanted}")
    return round(number)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


class CompressionConfig(BaseModel):
    """What to remove, how to choose it, and what to calibrate on. Immutable; validated on construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Share of the decoder blocks' parameters to remove, between 0 and 1. "
        "Embeddings and head are never touched (but 'slicegpt' narrows the embeddings).",
    )
    target_parameters: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Instead of --ratio: what the whole model is to have at most, e.g. 5.5B or 120M parameters."
    )
    target_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Instead of --ratio: what the weights are to take on disk at most, e.g. 4GiB or 250MB."
    )
    max_perplexity_increase: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Instead of --ratio: as much as is predicted to raise the perplexity by no more than this, e.g. "
        "10%. Needs the 'sensitivity' allocation.",
    )
    profile: Literal["full", "gguf", "stock"] = Field(
        "full",
        description="What the compressed layers may look like: 'full', every module its own ranks; 'gguf', what a GGUF "
        "file can hold without padding (all heads of one size, with the same rotary pairs; MLPs of multiples of 32 "
        "channels); 'stock', a plain Llama or Qwen3 (the same, and MLPs of one width). See modegpt export.",
    )
    ratio_of: Literal["blocks", "touched"] = Field(
        "blocks",
        description="What the ratio is of: 'blocks', all parameters of the decoder blocks, or 'touched', only what the "
        "method can remove from the chosen modules and layers.",
    )
    layers: str = Field(
        "all", description="Layers to compress, counted from 0, such as 2-29 or 0,4-7; the others stay whole."
    )
    method: str = Field(
        DEFAULT_METHOD,
        description="Compression method. " + " ".join(f"'{name}': {m.summary}." for name, m in METHODS.items()),
    )
    allocation: Allocation = Field(
        default_factory=_of_method(lambda method: method.allocation),
        description="How the layers share the loss: 'uniform'; 'block-influence', less from layers that change "
        "their input more (eq. 11); 'block-influence-split', attention and MLP scored apart (eq. 43); 'owl', less from "
        "layers with more outliers among weights times inputs; 'sensitivity', "
        "less from modules that, compressed alone, move the model's predictions further; 'own', as the method itself "
        "has it. By default what suits the method: "
        + ", ".join(f"'{m.allocation}' for '{name}'" for name, m in METHODS.items())
        + ".",
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto",
        description="Temperature of the block-influence allocations: low concentrates the loss on few layers. "
        "'auto' lets the most compressed layer lose 80 %.",
    )
    owl_threshold: Annotated[float, Field(ge=1, le=1000)] = Field(
        5.0, description="What counts as an outlier for 'owl': so many times the layer's mean. The paper tries 3 to 10."
    )
    owl_reach: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.08, description="How far 'owl' lets a layer's sparsity be from the average, on either side."
    )
    modules: tuple[Module, ...] = Field(
        default_factory=_of_method(lambda method: method.modules),
        description="Comma-separated modules to compress, all of the method by default: mlp, qk (query-key), "
        "vo (value-output), heads (whole key-value heads with their queries), layer (whole layers), stream (the "
        "width of the residual stream).",
    )
    statistics: Calibrated = Field(
        default_factory=_of_method(lambda method: method.calibrated),
        description="'sequential': each layer is calibrated on what the compressed layers before it produce; "
        "'dense': on what the dense model produces. By default what suits the method: "
        + ", ".join(f"'{m.calibrated}' for '{name}'" for name, m in METHODS.items())
        + ".",
    )
    align: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Round ranks to multiples of this many channels; 8 to 64 can suit a GPU's kernels better. 'auto' "
        "takes what the layers' products are fastest by on this device, measured first.",
    )
    ridge: Annotated[float, Field(ge=1e-12, le=1e6)] = Field(
        default_factory=_of_method(lambda method: method.default_ridge),
        description="Ridge of leverage scores, fits and whitening (lambda) in units of the mean channel energy, hence "
        f"scale-free. By default {METHODS[DEFAULT_METHOD].default_ridge:g} for '{DEFAULT_METHOD}', "
        f"{Method.default_ridge:g} for the others.",
    )
    joint_only: bool = Field(
        False,
        description="With 'joint-rank-k': leave the maps without a partner (values, attention output, down) whole.",
    )
    samples: Annotated[int, Field(ge=1)] = Field(128, description="Number of calibration windows.")
    sequence_length: Annotated[int, Field(ge=2)] = Field(2048, description="Tokens in a window.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seed of every random choice.")
    batch_size: Annotated[int, Field(ge=1)] = Field(
        1, description="Windows run at once; more needs more memory and changes results only by rounding."
    )

    @property
    def alignment(self) -> int:
        """``align``, the least where it is still to be measured."""
        return 1 if self.align == "auto" else self.align

    @field_validator("target_parameters", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        return _quantity(value, _COUNTS, "a number of parameters such as 5.5B or 120M")

    @field_validator("target_size", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return _quantity(value, _SIZES, "a size such as 4GiB or 250MB")

    @field_validator("max_perplexity_increase", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        if isinstance(value, str):
            number, percent = value.strip().removesuffix("%"), value.strip().endswith("%")
            try:
                share = float(number) / (100 if percent else 1)
            except ValueError:
                raise ValueError("give a share such as 10% or 0.1") from None
            if 1 < share < math.inf and not percent:
                raise ValueError(f"is that {number}% or {100 * share:g}%? Give it with the sign")
            return share
        return value

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        given = [name for name in AIMS if getattr(self, name) is not None]
        if len(given) != 1:
            options = ", ".join(map(_option, given)) or "none"
            raise ValueError(f"give one of {', '.join(map(_option, AIMS))}; given: {options}")
        if self.allocation == "own" and (self.layers, self.ratio_of) != ("all", "blocks"):
            raise ValueError(
                f"--method {self.method} chooses among all layers itself; leave out --layers and --ratio-of"
            )
        if self.align == "auto" and (self.target_parameters or self.target_size):
            raise ValueError(f"--align auto goes with --ratio, not {_option(given[0])}; give a number")
        if self.align == "auto" and not {"mlp", "qk", "vo"} & set(self.modules):
            raise ValueError(f"--align auto: no channels are removed from {','.join(self.modules)}; leave it out")
        if self.align == "auto" and not METHODS[self.method].narrows:
            raise ValueError(f"--align auto: --method {self.method} makes two maps of each; give a number")
        if self.ratio is None and self.ratio_of != "blocks":
            raise ValueError(f"--ratio-of {self.ratio_of} goes with --ratio, not {_option(given[0])}")
        # A profile's own allocation, where no other is asked for.
        profiled = getattr(self, "profile_from", None) is not None and "allocation" not in self.model_fields_set
        predicted = self.allocation == "sensitivity" or profiled
        if self.max_perplexity_increase is not None and not predicted:
            raise ValueError(
                f"--max-perplexity-increase needs predictions; use --allocation sensitivity, not {self.allocation}"
            )
        return self

    @model_validator(mode="after")
    def _profile_with_predictions(self) -> Self:
        if self.profile == "full":
            return self
        method, option = METHODS[self.method], f"--profile {self.profile}"
        from_profile = getattr(self, "profile_from", None) is not None
        if not method.tied:
            usable = ", ".join(name for name, one in METHODS.items() if one.tied)
            raise ValueError(f"{option} goes with --method {usable}, not {self.method}")
        if self.allocation != "sensitivity" and not (from_profile and "allocation" not in self.model_fields_set):
            raise ValueError(f"{option} needs predictions; use --allocation sensitivity, not {self.allocation}")
        if self.statistics != "dense":
            raise ValueError(f"{option} goes with --statistics dense")
        if (self.layers, self.ratio_of, self.modules) != ("all", "blocks", method.modules):
            raise ValueError(f"{option} makes all layers alike; leave out --layers, --ratio-of and --modules")
        if self.max_perplexity_increase is not None:
            raise ValueError(f"{option} goes with --ratio or a target size, not --max-perplexity-increase")
        return self

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown method; use one of {', '.join(METHODS)}")
        return value

    @field_validator("layers")
    @classmethod
    def _layer_ranges(cls, value: str) -> str:
        if value != "all" and not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", value):
            raise ValueError("use 'all' or numbers and ranges such as 2-29 or 0,4-7")
        if any(first > last for first, last in _ranges(value)):
            raise ValueError("a range ends before it begins")
        return value

    @field_validator("joint_only")
    @classmethod
    def _joint_method(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("method") != "joint-rank-k":
            raise ValueError("only --method joint-rank-k has it")
        return value

    @field_validator("allocation")
    @classmethod
    def _of_the_method(cls, value: Allocation, info: ValidationInfo) -> Allocation:
        method = METHODS[info.data.get("method", DEFAULT_METHOD)]
        if value not in method.allocations:
            usable = ", ".join(f"'{one}'" for one in method.allocations if one != "own")
            instead = f"which can be used with {usable}" if usable else "which has one of its own: leave it out"
            raise ValueError(f"not for --method {method.name}, {instead}")
        return value

    @field_validator("modules", mode="before")
    @classmethod
    def _split_modules(cls, value: object, info: ValidationInfo) -> object:
        if "method" not in info.data:  # which is what is refused
            return ()
        known = METHODS[info.data["method"]].modules
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        if isinstance(value, (tuple, list)):
            unknown = [part for part in value if part not in known]
            if unknown or not value:
                raise ValueError(f"unknown module {', '.join(map(repr, unknown)) or '(none)'}; use {', '.join(known)}")
            return tuple(module for module in known if module in value)
        return value

    @property
    def calibrates(self) -> bool:
        """Whether anything is learnt from text."""
        return _needs_text(self.method, self.allocation)

    def chosen_layers(self, count: int) -> list[int]:
        """Which of ``count`` layers are compressed; raises :class:`InvalidRequest` for others."""
        chosen = {index for first, last in _ranges(self.layers) for index in range(first, last + 1)}
        if chosen and max(chosen) >= count:
            raise InvalidRequest(f"--layers {self.layers}: MODEL has layers 0 to {count - 1}")
        return sorted(chosen) if chosen else list(range(count))

    def base(self, layers: Sequence[LayerGeometry]) -> Base:
        """What the ratio is of, in a model of these ``layers``."""
        if self.ratio_of == "blocks":
            return Base.blocks(layers)
        return Base.touched([layers[index] for index in self.chosen_layers(len(layers))], self.modules)

    def settings(self) -> dict[str, Any]:
        """The options that the result depends on."""
        return self.model_dump(mode="json")

    @classmethod
    def validated(cls, **values: Any) -> Self:
        """Build a config, turning pydantic's report into one :class:`InvalidRequest` line."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            message = problem["msg"].removeprefix("Value error, ")
            option = _option(str(problem["loc"][0])) if problem["loc"] else ""  # or about several
            if not message.startswith(option):
                message = f"{option} {problem['input']!r}: {message[0].lower()}{message[1:]}"
            message += _HINTS.get((option, problem["type"]), "")
            raise InvalidRequest(message) from error


class RunConfig(CompressionConfig):
    """A compression from a model's address to a checkpoint directory."""

    model: str = Field(description="A hub id, a local Hugging Face directory, or a .gguf file (which is dequantised).")
    output: Path = Field(description="Directory for the compressed checkpoint.")
    calibration: str = Field(
        default_factory=_text,
        description=f"Calibration text: {', '.join(map(repr, HUB_DATASETS))} from the hub; a .txt, .txt.gz, .jsonl or "
        ".parquet file; 'self', text sampled from the model; or several, separated by commas, each with its share of "
        "the windows if not equal: text.jsonl:0.75,self:0.25. 'mix' is the mixture "
        f"{mixture.MIXTURES['mix'].replace(',', ', ')}. By default '{mixture.DEFAULT}', or 'none' where method and "
        "allocation use no text.",
    )
    profile_from: Path | None = Field(
        None,
        description="A profile that 'modegpt profile' made of MODEL: its statistics and predictions are used and no "
        "calibration text is read. Nothing is evaluated unless --evaluate names a text.",
    )
    evaluate: str = Field(
        default_factory=lambda given: NONE if given.get("calibration") == NONE else HELD_OUT,
        description="Text for perplexity before and after: 'held-out' (of each calibration text the data set's test "
        "split, or the last tenth of a file, never calibrated on), another data set or file, or 'none'. By default "
        "'held-out', but 'none' without calibration text.",
    )
    evaluation_samples: Annotated[int, Field(ge=1)] = Field(
        8, description="Windows to evaluate on, from the start of each text."
    )
    dtype: Dtype = Field(
        "auto", description="Weight dtype: auto (the checkpoint's; float32 for GGUF), float32, bfloat16 or float16."
    )
    device: str = Field("auto", description="Device: auto, cpu, cuda, cuda:1, ...")
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Processes that share the work on this machine: a number, or 'auto' for one on every GPU. "
        "For several machines, start the same command with torchrun.",
    )
    offload_folder: Path | None = Field(
        None, description="Keep the calibration's hidden states in this folder instead of in memory."
    )
    restart: bool = Field(False, description="Throw away what an interrupted run into the same output has finished.")
    overwrite: bool = Field(False, description="Replace an earlier compressed checkpoint in the output directory.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the MODEL. Off by default.")

    def settings(self) -> dict[str, Any]:
        """All but how the run is carried out and where its result goes."""
        return self.model_dump(mode="json", exclude={"output", "devices", "offload_folder", "restart", "overwrite"})

    @field_validator("model", "output", "calibration", "evaluate")
    @classmethod
    def _usable_name(cls, value: str | Path, info: ValidationInfo) -> str | Path:
        try:
            names = str(value).split(",") if info.field_name == "calibration" else [value]
            too_long = any(len(part.encode()) > 255 for name in names for part in Path(name).parts)
        except UnicodeEncodeError:
            raise ValueError("not valid Unicode; the report could not hold it") from None
        if too_long:
            raise ValueError("too long for a name")
        return value

    @field_validator("calibration")
    @classmethod
    def _calibrated_if_needed(cls, value: str, info: ValidationInfo) -> str:
        if value == NONE and _text(info.data) != NONE:
            raise ValueError("--method and --allocation need text to calibrate on")
        return value

    @field_validator("evaluate")
    @classmethod
    def _held_out_of_something(cls, value: str, info: ValidationInfo) -> str:
        if value == HELD_OUT and info.data.get("calibration") == NONE:
            raise ValueError("there is no calibration text to hold a part of; name a text, or 'none'")
        return value

    @field_validator("device")
    @classmethod
    def _usable_device(cls, value: str) -> str:
        return usable_device(value)


class ProfileConfig(RunConfig):
    """The making of a profile: everything but how much is removed, which is chosen later."""

    output: Path = Field(description="Directory for the profile.")
    allocation: Literal["sensitivity"] = "sensitivity"
    statistics: Literal["dense"] = "dense"
    evaluate: Literal["none"] = "none"

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        return self
