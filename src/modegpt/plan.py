"""What a compression will take, before it starts: memory, disk, arithmetic and time, from the config alone.

Memory, disk and arithmetic follow from the shapes; times also from how fast this machine is, see :mod:`modegpt.rates`.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedConfig, PreTrainedModel

from .aims import with_ratio
from .config import HELD_OUT, NONE, ProfileConfig, RunConfig
from .costs import (
    Sizes,
    forward_bytes,
    forward_flops,
    gram_flops,
    head_flops,
    kept_bytes,
    statistics_bytes,
)
from .data import PIECE, SAMPLED_AT_ONCE, SELF
from .errors import InvalidRequest
from .families import model_geometry
from .files import existing_parent
from .journal import left_behind
from .memory import free_memory
from .methods import METHODS
from .mixture import Mixture
from .parallel import processes, processes_here
from .profile import PROBE_LENGTH, PROBE_STEP, PROBE_TOKENS, parts_of, probe_windows
from .rates import Rates, measured_rates
from .runner import HEAD_POSITIONS
from .sources import ModelSource, empty_model
from .tied import check_tied

#: Allowance for what PyTorch's kernels and the allocator hold besides tensors.
OVERHEAD_BYTES = 100_000_000
#: Allowance for a GPU's context and the libraries' workspaces on it.
DEVICE_OVERHEAD_BYTES = 700_000_000
_LITTLE = 0.01


class Part(BaseModel):
    """One entry of a sum of bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int


class PhasePlan(BaseModel):
    """What one phase computes."""

    model_config = ConfigDict(frozen=True)

    name: str
    flops: float
    seconds: float | None
    """None where no time was asked for."""


class Plan(BaseModel):
    """The predicted cost of a compression, for one of its processes."""

    model_config = ConfigDict(frozen=True)

    host: list[Part]
    """Parts of the peak of host memory."""
    device: list[Part]
    """Parts of the peak of GPU memory; empty on a CPU."""
    disk: list[Part]
    """At the output, work in progress included."""
    offload: int
    """Bytes in the offload folder."""
    phases: list[PhasePlan]

    @property
    def host_peak(self) -> int:
        """Peak host memory in bytes."""
        return sum(part.bytes for part in self.host)

    @property
    def device_peak(self) -> int:
        """Peak device memory in bytes."""
        return sum(part.bytes for part in self.device)

    @property
    def disk_peak(self) -> int:
        """Bytes needed on disk at the output."""
        return sum(part.bytes for part in self.disk)

    @property
    def flops(self) -> float:
        """Operations of all phases."""
        return sum(phase.flops for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Predicted time of all phases."""
        return None if not self.phases or self.phases[0].seconds is None else sum(p.seconds or 0 for p in self.phases)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model in numbers of tensors' elements."""

    sizes: Sizes
    layer: int
    """Parameters of one decoder layer."""
    rest: int
    """Parameters outside the layers: embeddings, head and norms, tied ones once."""
    vocabulary: int
    item: int
    """Bytes of a parameter."""

    @property
    def layers(self) -> int:
        """Bytes of all decoder layers."""
        return self.sizes.layers * self.layer * self.item


def shape_of(model: PreTrainedModel, item: int) -> Shape:
    """The shape of a stock model, which may be on the meta device."""
    geometry = model_geometry(model)
    layers = sum(layer.parameters for layer in geometry)
    return Shape(
        sizes=Sizes.of(model),
        layer=max(layer.parameters for layer in geometry),
        rest=sum(parameter.numel() for parameter in model.parameters()) - layers,
        vocabulary=model.config.vocab_size,
        item=item,
    )


def make_plan(
    config: RunConfig, source: ModelSource, model_config: PreTrainedConfig, *, timed: bool
) -> tuple[RunConfig, Plan, Shape]:
    """The plan of ``config`` and the model's shape; ``timed`` plans include times, measured in some seconds.

    The first is ``config`` with the ratio that its target comes to. Raises :class:`InvalidRequest` for a config that
    describes no model, and for a ratio out of reach.
    """
    try:
        model = empty_model(model_config, config.trust_remote_code)
        dtype = source.dtype(config.dtype, model_config) or torch.float32
        shape = shape_of(model, dtype.itemsize)
    except Exception as error:  # a config can be valid by itself and still describe no model
        message = " ".join(str(error).split())
        raise InvalidRequest(f"MODEL {config.model!r}: its config describes no model: {message}") from error
    config = with_ratio(config, model, dtype.itemsize)
    method = METHODS[config.method].from_config(config)
    method.check(model, model_geometry(model, method.geometry), config, config.ratio or 0.0)
    if config.profile != "full":
        check_tied(model.config)
    plan = predict(config, shape)
    if timed:  # after the memory: measuring takes some itself
        rates = measured_rates(config, model, dtype, kept=1 - _ratio(config))
        plan = plan.model_copy(update={"phases": _phases(config, shape, rates)})
    return config, plan, shape


def _profiles(config: RunConfig) -> bool:
    """Whether the run makes a profile."""
    return config.allocation == "sensitivity" and config.profile_from is None


def _ratio(config: RunConfig) -> float:
    """What is removed; where that is chosen on the way, little, which takes most memory and disk."""
    return _LITTLE if config.ratio is None else config.ratio


def predict(config: RunConfig, shape: Shape, *, on_gpu: bool | None = None) -> Plan:
    """The plan of ``config``, without times, for a model of this ``shape``; on its device unless ``on_gpu`` says."""
    on_gpu = torch.device(config.device).type == "cuda" if on_gpu is None else on_gpu
    return Plan(
        host=_host(config, shape, on_gpu),
        device=_device(config, shape) if on_gpu else [],
        disk=_disk(config, shape),
        # Both sides of a layer; where it is run in two parts, also what is between.
        offload=(2 + METHODS[config.method].one_pass) * _states(config, shape) if config.offload_folder else 0,
        phases=_phases(config, shape, None),
    )


def check_plan(plan: Plan, config: RunConfig, shape: Shape) -> None:
    """Refuse what this machine cannot hold, naming the option that would make it fit."""
    problem = _shortage(plan, config)
    if problem is not None:
        raise InvalidRequest(f"{problem}; {_remedy(config, shape)}")
    # What an interrupted run has written already is part of what is needed.
    left = left_behind(config.output)
    wanted = [("--output", config.output, plan.disk_peak, _held(left.directory))]
    if config.offload_folder is not None:
        offload = plan.offload * processes_here(config.devices, config.device)
        wanted.append(("--offload-folder", config.offload_folder, offload, _held(left.states) if left.states else 0))
    for option, folder, size, held in wanted:
        needed = size - held
        room = shutil.disk_usage(folder if folder.is_dir() else existing_parent(folder)).free
        if needed > room:
            raise InvalidRequest(
                f"not enough disk at {option}: about {_gib(needed)} are needed and {_gib(room)} are free; "
                f"use --dtype bfloat16 or another {option}"
            )


def _held(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _shortage(plan: Plan, config: RunConfig) -> str | None:
    """What memory is too small, if any is."""
    free = free_memory()
    needed = processes_here(config.devices, config.device) * plan.host_peak - psutil.Process().memory_info().rss
    if needed > free:
        return f"not enough memory: about {_gib(needed)} are needed and {_gib(free)} are free"
    if plan.device:
        free = torch.cuda.mem_get_info(config.device)[0]
        if plan.device_peak > free:
            return (
                f"not enough memory on {config.device}: about {_gib(plan.device_peak)} are needed and "
                f"{_gib(free)} are free"
            )
    return None


def _remedy(config: RunConfig, shape: Shape) -> str:
    """The first change that would make the run fit."""
    offload: dict[str, Any] = {"offload_folder": config.offload_folder or config.output}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--offload-folder, which keeps the hidden states on disk", offload),
        ("a --batch-size of 1", {"batch_size": 1}),
        ("a calibration text instead of --calibration self", {"calibration": ""}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--devices 1", {"devices": 1}),
        ("--offload-folder and --dtype bfloat16", offload | {"dtype": "bfloat16"}),
        ("--device cpu", {"device": "cpu", "devices": 1}),
        ("--device cpu, --offload-folder and --dtype bfloat16", offload | {"device": "cpu", "dtype": "bfloat16"}),
    ]
    for words, change in changes:
        changed = config.model_copy(update=change)
        item = 2 if changed.dtype == "bfloat16" else shape.item
        if _shortage(predict(changed, replace(shape, item=item)), changed) is None:
            return f"it would fit with {words}"
    return "it takes a machine with more memory, or a smaller model"


def _host(config: RunConfig, shape: Shape, on_gpu: bool) -> list[Part]:
    program = [Part(name="program", bytes=psutil.Process().memory_info().rss + OVERHEAD_BYTES)]
    states = [] if config.offload_folder else [Part(name="hidden states", bytes=_states(config, shape))]
    states += _streams(config, shape)
    if on_gpu:
        return [*program, *states, Part(name="layers being read", bytes=2 * shape.layer * shape.item)]
    return [*program, *_larger(_sampling(config, shape), [*states, *_model_parts(config, shape)])]


def _larger(one: list[Part], other: list[Part]) -> list[Part]:
    """Of what is held at different times, what is more."""
    return max(one, other, key=lambda parts: sum(part.bytes for part in parts))


def _sampling(config: RunConfig, shape: Shape) -> list[Part]:
    """What is held while text is sampled from the model: all of it, beside what is read for the layer loop."""
    if not Mixture.parse(config.calibration).written or not (config.calibrates or config.evaluate == HELD_OUT):
        return []
    whole, sizes = shape.rest * shape.item + shape.layers, shape.sizes
    cached = SAMPLED_AT_ONCE * min(PIECE, config.sequence_length) * sizes.layers
    return [
        Part(name="whole model", bytes=whole),
        Part(name="embeddings and head", bytes=shape.rest * shape.item),
        Part(name="keys and values", bytes=2 * cached * sizes.groups * sizes.head * shape.item),
    ]


def _device(config: RunConfig, shape: Shape) -> list[Part]:
    context = Part(name="context", bytes=DEVICE_OVERHEAD_BYTES)
    return [context, *_larger(_sampling(config, shape), _model_parts(config, shape))]


def _model_parts(config: RunConfig, shape: Shape) -> list[Part]:
    """What is held where the model runs: the rest of the model, layers, and the larger of what is done with one."""
    batch = min(config.batch_size, config.samples) * config.sequence_length
    tokens = config.samples * config.sequence_length
    statistics = statistics_bytes(shape.sizes, METHODS[config.method].statistics, tokens, shape.item)
    forward = statistics + forward_bytes(shape.sizes, batch, shape.item)
    # Where the layers differ, the one that loses least is taken to lose half of the average.
    kept = 1 - _ratio(config) if config.allocation == "uniform" else 1 - _ratio(config) / 2
    method = METHODS[config.method].from_config(config)
    solve = statistics + method.solve_bytes(shape.sizes, tokens, kept)
    logits = 0
    if config.evaluate != NONE:
        logits = config.batch_size * min(HEAD_POSITIONS, config.sequence_length) * shape.vocabulary * (shape.item + 8)
    narrow = round(kept * shape.vocabulary * shape.sizes.hidden) if "stream" in method.modules else 0
    return [
        Part(name="embeddings and head", bytes=(shape.rest + narrow) * shape.item),
        Part(name="two layers", bytes=2 * shape.layer * shape.item),
        Part(name="compressed layer", bytes=round(kept * shape.layer * shape.item)),
        Part(name="layer at work", bytes=max(forward, solve, logits)),
    ]


def _disk(config: RunConfig, shape: Shape) -> list[Part]:
    tokens = config.samples * config.sequence_length
    kept = shape.sizes.layers * kept_bytes(shape.sizes, METHODS[config.method].statistics, tokens, shape.item)
    statistics = [Part(name="statistics", bytes=kept)] if _profiles(config) else []
    if isinstance(config, ProfileConfig):
        return statistics
    rest = shape.rest
    if "stream" in METHODS[config.method].modules:  # embeddings, narrower, and a head, which are tied no longer
        rest = round((2 - _ratio(config)) * shape.vocabulary * shape.sizes.hidden)
    weights = round((1 - _ratio(config)) * shape.layers) + rest * shape.item
    # Finished layers stay until the checkpoint made of them is in its place.
    return [*statistics, Part(name="finished layers", bytes=weights), Part(name="checkpoint", bytes=weights)]


def _states(config: RunConfig, shape: Shape) -> int:
    """Bytes of the hidden states of the process with most of them: of the calibration, or later of the evaluation."""
    evaluated = 0 if config.evaluate == NONE else config.evaluation_samples
    windows = _share(config, max(config.samples if config.calibrates else 0, evaluated))
    return windows * config.sequence_length * shape.sizes.hidden * shape.item


def _streams(config: RunConfig, shape: Shape) -> list[Part]:
    """The hidden states of the probe windows with each module alone compressed, or without each layer."""
    method = METHODS[config.method].from_config(config)
    if not _profiles(config) and method.removal_passes(shape.sizes.layers, _ratio(config)) is None:
        return []
    length = min(PROBE_LENGTH, config.sequence_length)
    windows = _share(config, probe_windows(config.sequence_length))
    count = 1 + len(config.modules) * shape.sizes.layers + len(parts_of(config.modules))
    return [Part(name="streams of probe windows", bytes=count * windows * length * shape.sizes.hidden * shape.item)]


def _share(config: RunConfig, windows: int) -> int:
    """Of so many windows, those of the first process: batches are what is shared."""
    batches = math.ceil(windows / config.batch_size)
    return min(windows, math.ceil(batches / processes(config.devices, config.device)) * config.batch_size)


def _evaluated_texts(config: RunConfig) -> int:
    """How many texts perplexity is measured on: each source's held-out part, or one that is named."""
    if config.evaluate != HELD_OUT:
        return 0 if config.evaluate == NONE else 1
    return max(1, len(Mixture.parse(config.calibration).shares.keys() - {SELF}))


def _sampled_tokens(config: RunConfig) -> int:
    """Calibration tokens that the model is to write."""
    if not config.calibrates:
        return 0
    mixture = Mixture.parse(config.calibration)
    return mixture.counts(max(config.samples, len(mixture.shares))).get(SELF, 0) * config.sequence_length


def _phases(config: RunConfig, shape: Shape, rates: Rates | None) -> list[PhasePlan]:
    sizes, kept = shape.sizes, 1 - _ratio(config)
    window = config.sequence_length
    tokens = _share(config, config.samples) * window
    evaluated = _evaluated_texts(config) * _share(config, config.evaluation_samples) * window
    dense = sizes.layers * forward_flops(sizes, window)
    thin = sizes.layers * forward_flops(sizes, window, kept)
    method = METHODS[config.method].from_config(config)
    parts = {module: sizes.experts if module == "mlp" else 1 for module in method.modules}
    solve = sizes.layers * sum(count * method.solve_flops(module, sizes, kept) for module, count in parts.items())
    known = sizes.layers * sum(count * method.kept_flops(module, sizes) for module, count in parts.items())
    head = 2 * head_flops(sizes.hidden, shape.vocabulary)

    def phase(name: str, **flops: float) -> PhasePlan:
        seconds = None if rates is None else sum(count / getattr(rates, kind) for kind, count in flops.items() if count)
        return PhasePlan(name=name, flops=sum(flops.values()), seconds=seconds)

    profiled = _profiles(config)
    gram = tokens * sizes.layers * gram_flops(sizes, METHODS[config.method].statistics, window)
    phases = []
    if sampled := _sampled_tokens(config):
        one = sizes.layers * forward_flops(sizes, min(PIECE, window)) + head_flops(sizes.hidden, shape.vocabulary)
        phases.append(phase("sample", sample=sampled * one))
    if profiled:
        # Half of the layers' modules, on average, have a stream of probe tokens through each layer, and all parts.
        streams, probe = len(config.modules) * sizes.layers, min(PROBE_TOKENS, probe_windows(window) * window)
        whole = len(parts_of(config.modules))
        forward = (tokens * dense if method.statistics else 0) + probe * dense * (streams / 2 + whole)
        heads = probe / PROBE_STEP * (streams + whole) * head_flops(sizes.hidden, shape.vocabulary)
        phases.append(phase("profile", forward=forward, gram=gram, solve=solve, head=heads))
    elif (passes := method.removal_passes(sizes.layers, _ratio(config))) is not None:
        runs, heads = passes
        probe = min(PROBE_TOKENS, config.samples * window)
        one_head = head_flops(sizes.hidden, shape.vocabulary)
        phases.append(phase("scores", forward=probe * runs * dense / sizes.layers, head=probe * heads * one_head))
    elif config.allocation not in ("uniform", "sensitivity") and not method.one_pass:
        phases.append(phase("scores", forward=tokens * dense))
    if isinstance(config, ProfileConfig):
        return phases
    dense_kept = config.statistics == "dense" and (profiled or config.profile_from)
    if method.statistics and not dense_kept:
        phases.append(phase("calibrate", forward=tokens * dense, gram=gram))
    finish = sizes.layers * method.finish_flops(sizes, config.samples * window, kept)
    phases.append(phase("solve", solve=solve - known if dense_kept else solve, products=finish))
    if method.statistics and config.statistics == "sequential" and not method.one_pass:
        # The last layer's outputs are nobody's inputs.
        phases.append(phase("pass on", forward=tokens * thin * (sizes.layers - 1) / sizes.layers))
    if evaluated:
        phases.append(phase("evaluate", forward=evaluated * (dense + thin), head=evaluated * head))
    return phases


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
