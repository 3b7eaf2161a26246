"""Speed of models side by side in one process: prompts, single tokens, memory, arithmetic.

Every repeat measures each model in turn, so that what slows the machine down for a while slows all of them down, and
ratios are taken within a repeat.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .address import open_model
from .data import check_length
from .errors import InvalidRequest
from .memory import free_memory
from .progress import Progress

#: Kernels like widths that are multiples of it.
KIND = 8
#: Lengths of the prompts whose arithmetic is counted.
_COUNTED = (8, 16)
#: Of the latencies of single tokens.
PERCENTILES = (50, 90, 99)
#: What compiles, and how many variants of a model's code it may make: a prompt, its first token, further ones, each for
#: one sequence or several, by model.
COMPILER, GRAPHS = "inductor", 256


@dataclass(frozen=True)
class Load:
    """What is asked of every model: prompts of random tokens, and tokens that follow one by one, greedily.

    Raises :class:`InvalidRequest` for what cannot be.
    """

    batch_sizes: Sequence[int] = (1, 8)
    sequence_lengths: Sequence[int] = (256,)
    new_tokens: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        least = {
            "batch-sizes": (min(self.batch_sizes, default=0), 1),
            "sequence-length": (min(self.sequence_lengths, default=0), 1),
            "new-tokens": (self.new_tokens, 1),
            "repeats": (self.repeats, 1),
        }
        for option, (value, smallest) in least.items():
            if value < smallest:
                raise InvalidRequest(f"--{option} {value}: must be at least {smallest}")

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence in all."""
        return max(self.sequence_lengths) + self.new_tokens


@dataclass
class Timing:
    """Seconds of one model with sequences of one number and length, a value for every repeat."""

    batch_size: int
    sequence_length: int
    """Of the prompts."""
    prefill: list[float] = field(default_factory=list)
    """Until the first token."""
    steps: list[list[float]] = field(default_factory=list)
    """Of every further token."""
    cache_bytes: int = 0
    """Of the keys and values at the end."""
    peak_bytes: int = 0
    """Weights, cache and everything else that was allocated at once."""

    @property
    def decode(self) -> list[float]:
        """All further tokens together."""
        return [sum(steps) for steps in self.steps]

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return statistics.median(self.prefill)

    def speeds(self, load: Load) -> tuple[float, float]:
        """Tokens of prompts, and new ones, in a second."""
        prompt, further = self.batch_size * self.sequence_length, self.batch_size * load.new_tokens
        return prompt / self.first_token, further / statistics.median(self.decode)

    def latencies(self) -> list[float]:
        """Seconds within which so many percent of single tokens came: :data:`PERCENTILES`."""
        every = sorted(second for steps in self.steps for second in steps)
        return [every[min(len(every) - 1, len(every) * percent // 100)] for percent in PERCENTILES]


@dataclass(frozen=True)
class Speed:
    """What one model does with a load."""

    model: str
    parameters: int
    weight_bytes: int
    macs_per_token: float
    """Multiplications of matrix products and attention for each token of the longest prompt."""
    dtype: str
    odd: float
    """The share of the linear maps' parameters in maps with a width that is no multiple of :data:`KIND`."""
    device: torch.device
    timings: list[Timing]

    def facts(self, load: Load, first: Speed) -> dict[str, Any]:
        """For a results file, with ratios to the ``first`` model."""
        rows = []
        for own, other in zip(self.timings, first.timings, strict=True):
            prompt, further = own.speeds(load)
            rows.append(
                {
                    "batch_size": own.batch_size,
                    "sequence_length": own.sequence_length,
                    "prefill_tokens_per_second": prompt,
                    "prefill_ratio": Ratio.of(own.prefill, other.prefill).facts(),
                    "decode_tokens_per_second": further,
                    "decode_ratio": Ratio.of(own.decode, other.decode).facts(),
                    "first_token_seconds": own.first_token,
                    "token_seconds": dict(zip(map(str, PERCENTILES), own.latencies(), strict=True)),
                    "cache_bytes": own.cache_bytes,
                    "peak_bytes": own.peak_bytes,
                    "seconds": {"prefill": own.prefill, "steps": own.steps},
                }
            )
        names = ("model", "parameters", "weight_bytes", "macs_per_token", "dtype", "odd")
        return {name: getattr(self, name) for name in names} | {"rows": rows}


@dataclass(frozen=True)
class Ratio:
    """How many times faster than another: the median over repeats, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, own: Sequence[float], other: Sequence[float]) -> Ratio:
        """From the seconds that both took, repeat by repeat."""
        ratios = [theirs / ours for ours, theirs in zip(own, other, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def facts(self) -> list[float]:
        """The three of them."""
        return [self.median, self.least, self.greatest]


def facts_of(speeds: Sequence[Speed], load: Load) -> dict[str, Any]:
    """All ``speeds`` for a results file, with the machine."""
    device = speeds[0].device
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    return {"machine": machine, "models": [speed.facts(load, speeds[0]) for speed in speeds]}


def _processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def measure(
    addresses: Sequence[str],
    load: Load,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    compiled: bool = False,
    progress: Progress | None = None,
) -> list[Speed]:
    """The speed of every model, ``compiled`` by PyTorch or not.

    All are checked before the first is loaded, and all are in memory at once. Numbers of sequences that do not fit
    beside them are left out.

    Raises :class:`InvalidRequest` for models that cannot be opened or compiled, take no sequences of this length, or
    where none of the numbers fits.
    """
    progress = progress or Progress()
    opened = [open_model(one, dtype=dtype, device=device, trust_remote_code=trust_remote_code) for one in addresses]
    configs: list[PreTrainedConfig] = [config for _, config, _ in opened]
    for config in configs:
        check_length(load.positions, config, what=f"--sequence-length and --new-tokens: {load.positions} tokens")
    with progress.phase("load", len(opened)):
        models: list[PreTrainedModel] = []
        for _, _, open_it in opened:
            try:
                models.append(open_it().eval())
            except torch.OutOfMemoryError as error:
                why = f"the models do not fit together: {_too_much(error)}; measure fewer at once"
                raise InvalidRequest(why) from error
            progress.advance()
    arithmetic = [macs_per_token(model, max(load.sequence_lengths)) for model in models]
    with _compiled(models) if compiled else nullcontext():
        timings = _timings(models, configs, load, progress)
    return [
        Speed(
            address,
            model.num_parameters(),
            weight_bytes(model),
            macs,
            str(model.dtype).removeprefix("torch."),
            odd_share(model),
            model.device,
            own,
        )
        for address, model, macs, own in zip(addresses, models, arithmetic, timings, strict=True)
    ]


@contextmanager
def _compiled(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Let ``models`` run compiled; raises :class:`InvalidRequest` where that fails on the way."""
    # Models of one family share code, and how often a piece of code is compiled is limited: beyond that, they would run
    # as if not compiled.
    limits = {"recompile_limit": GRAPHS, "fail_on_recompile_limit_hit": True}
    try:
        with torch._dynamo.config.patch(limits):
            for model in models:
                model.compile(backend=COMPILER, dynamic=True)
            yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        raise InvalidRequest(f"--compile: {' '.join(str(error).splitlines()[:2])}; leave it out") from error


def _timings(
    models: Sequence[PreTrainedModel], configs: Sequence[PreTrainedConfig], load: Load, progress: Progress
) -> list[list[Timing]]:
    """Of every model, for each length and number of sequences that fits."""
    found: list[list[Timing]] = []
    with progress.phase("bench", len(load.sequence_lengths) * len(load.batch_sizes) * (load.repeats + 1)):
        for length in load.sequence_lengths:
            progress.detail(f"memory of one sequence of {length}")
            try:
                alone = max(_memory(model, _prompts(configs, 1, length), load)[1] for model in models)
            except (MemoryError, torch.OutOfMemoryError) as error:
                tokens = length + load.new_tokens
                raise InvalidRequest(f"one sequence of {tokens} tokens does not fit: {_too_much(error)}") from error
            for batch_size in load.batch_sizes:
                progress.detail(f"batches of {batch_size}")
                try:
                    _check_memory(batch_size * alone, models[0].device)
                    found.append(_in_turn(models, _prompts(configs, batch_size, length), load, progress))
                except (MemoryError, torch.OutOfMemoryError) as error:
                    progress.note(f"Batches of {batch_size} x {length} tokens are left out: {_too_much(error)}")
    if not found:
        raise InvalidRequest(f"--batch-sizes {','.join(map(str, load.batch_sizes))}: none fits in memory; use less")
    return [list(timings) for timings in zip(*found, strict=True)]


def _too_much(error: Exception) -> str:
    """What was asked for, without what PyTorch then says of the GPU."""
    return str(error).partition(". GPU")[0]


def _check_memory(needed: int, device: torch.device) -> None:
    """Raise ``MemoryError`` where that many bytes are not free: Linux would end the process instead."""
    free = free_memory()
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved
    if needed > free:
        raise MemoryError(f"about {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free")


def _prompts(configs: Sequence[PreTrainedConfig], batch_size: int, length: int) -> torch.Tensor:
    """The same random tokens for all models: (B, T)."""
    vocabulary = min(config.get_text_config().vocab_size for config in configs)
    return torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))


def _in_turn(models: Sequence[PreTrainedModel], ids: torch.Tensor, load: Load, progress: Progress) -> list[Timing]:
    timings = [Timing(*ids.shape) for _ in models]
    for model, timing in zip(models, timings, strict=True):  # not timed: warms up, and finds out about memory
        timing.cache_bytes, working = _memory(model, ids, load)
        timing.peak_bytes = weight_bytes(model) + working
    progress.advance()
    turn = list(zip(models, timings, strict=True))
    for repeat in range(load.repeats):
        for model, timing in turn if repeat % 2 == 0 else reversed(turn):  # a steady drift cancels
            seconds, _ = _run(model, ids, load.new_tokens)
            timing.prefill.append(seconds[0])
            timing.steps.append(seconds[1:])
        progress.advance()
    return timings


@torch.inference_mode()
def _run(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[list[float], DynamicCache]:
    """The seconds to the first token and to each of ``new_tokens`` further ones, and the cache at the end."""
    cache, following = DynamicCache(config=model.config), ids.to(model.device, copy=True)
    seconds = []
    for _ in range(new_tokens + 1):
        started = _now(model.device)
        logits = model(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        following = logits[:, -1:].argmax(-1)
        seconds.append(_now(model.device) - started)
    return seconds, cache


def _now(device: torch.device) -> float:
    """Seconds, once ``device`` has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(model: PreTrainedModel, ids: torch.Tensor, load: Load) -> tuple[int, int]:
    """Bytes of the cache at the end, and the most that was allocated at once, weights left out."""
    _run(model, ids, load.new_tokens)  # what compiling takes is not counted
    held = 0

    def work() -> None:  # nothing of it stays
        nonlocal held
        _, cache = _run(model, ids, load.new_tokens)
        tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    peak = _peak_of(work, model.device)
    return held, peak


def _peak_of(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``work`` has at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [one for one in json.loads(path.read_bytes())["traceEvents"] if one["name"] == "[memory]"]
    changes = [event["args"] for event in sorted(events, key=lambda one: float(one["ts"]))]
    if not changes:
        return 0
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]  # what earlier profiles saw made and not freed
    return int(max(change["Total Allocated"] for change in changes) - before)


def weight_bytes(model: PreTrainedModel) -> int:
    """What the parameters take, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def odd_share(model: PreTrainedModel) -> float:
    """Of the linear maps' parameters, those in maps with a width that is no multiple of :data:`KIND`.

    The maps of all experts of a layer are one parameter, of which the number of experts is no width.
    """
    maps = [one.weight.shape for one in model.modules() if isinstance(one, (nn.Linear, Conv1D))]
    sizes = [*maps, *(one.shape[1:] for one in model.parameters() if one.dim() == 3 for _ in range(len(one)))]
    odd = [size for size in sizes if any(width % KIND for width in size)]
    return sum(map(math.prod, odd)) / max(1, sum(map(math.prod, sizes)))


def macs_per_token(model: PreTrainedModel, length: int) -> float:
    """Multiplications of matrix products for each token of a prompt of ``length``, logits included.

    Attention counts as full products, though the causal half suffices. So a prompt of T tokens takes a T + b T^2, and
    two short ones tell what a long one takes, whose scores and logits may not fit.
    """
    short, double = _COUNTED
    first, second = (_macs(model, count) / count for count in _COUNTED)
    slope = (second - first) / (double - short)
    return first + slope * (length - short)


@torch.inference_mode()
def _macs(model: PreTrainedModel, length: int) -> float:
    """Those of a whole prompt."""
    own, experts = model.config._attn_implementation, model.get_experts_implementation()
    model.set_attn_implementation("eager")  # fused and grouped kernels are not counted
    model.set_experts_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, length, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(own)
        model.set_experts_implementation(experts)
    return float(counter.get_total_flops()) / 2
