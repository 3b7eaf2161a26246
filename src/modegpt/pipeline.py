"""From a model's address to a compressed checkpoint: refuse early, then load, compress, evaluate, save."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .budget import average_sparsity
from .checkpoint import check_output, existing_parent, load, save
from .config import RunConfig
from .data import (
    HUB_DATASETS,
    SELF,
    TokenWindows,
    check_length,
    check_source,
    first_windows,
    random_windows,
    read_text,
    sample_from_model,
    split_held_out,
    start_token,
    tokenize,
)
from .engine import compress_model
from .errors import InvalidRequest
from .evaluation import perplexity
from .families import COMPRESSED_TYPES, check_family, check_model, model_geometry
from .progress import Progress
from .report import CompressionReport, Pair, TextFacts, build_report
from .sources import Dtype, ModelSource, check_vocabulary, usable_device

HELD_OUT, NONE = "held-out", "none"


@dataclass(frozen=True)
class Texts:
    """The windows of a run; None where they can only be made once the model is loaded, or are not wanted."""

    calibration: TokenWindows | None
    evaluation: TokenWindows | None


def compress_to_directory(
    config: RunConfig, progress: Progress | None = None, *, command: str | None = None
) -> CompressionReport:
    """Carry out ``config``: everything wrong is refused before any weight is loaded.

    ``command`` is what the report says to repeat it with; without, this call.
    """
    progress = progress or Progress()
    source = ModelSource(config.model, config.trust_remote_code)
    source.check()
    texts_read = [name for name in (config.calibration, config.evaluate) if Path(name).is_file()]
    check_output(config.output, overwrite=config.overwrite, inputs=[config.model, *texts_read])
    check_source(config.calibration, option="--calibration", allow_self=True)
    if config.evaluate not in (HELD_OUT, NONE):
        check_source(config.evaluate, option="--evaluate")
    if len(texts_read) == 2 and Path(config.evaluate).samefile(config.calibration):
        raise InvalidRequest(
            f"--evaluate {config.evaluate!r} is the calibration text; use 'held-out' to keep a part of it"
        )

    model_config = source.config()
    check_family(model_config)
    check_resources(config, model_config)
    check_length(config.sequence_length, model_config)
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model_config)
    if config.calibration == SELF:
        start_token(tokenizer)
    with progress.phase("text"):
        texts = read_texts(config, tokenizer)

    with progress.phase("load"):
        model = source.model(config.dtype, config.device)
    check_model(model)
    if texts.calibration is None:
        with progress.phase("sample"):
            texts = sample_texts(config, model, tokenizer, texts.evaluation)
    assert texts.calibration is not None
    result = compress_model(model, texts.calibration, config, progress)
    report = build_report(
        model,
        result,
        config,
        TextFacts.of(config.calibration, texts.calibration),
        command=command or f"modegpt.compress_to_directory({config!r})",
        source=config.model,
        evaluation=_evaluation_facts(config, texts.evaluation),
        perplexity=_perplexities(config, model, result.model, texts.evaluation, progress),
    )
    save(result.model, config.output, tokenizer=tokenizer, report=report, overwrite=config.overwrite)
    return report


def read_texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Calibration and evaluation windows. Held-out windows never overlap calibration windows."""
    length, count = config.sequence_length, config.evaluation_samples
    calibration_what, evaluation_what = f"--calibration {config.calibration}", f"--evaluate {config.evaluate}"
    held_out: torch.Tensor | None = None
    calibration: TokenWindows | None = None
    if config.calibration != SELF:
        ids = tokenize(tokenizer, read_text(config.calibration))
        reserved = 0
        if config.evaluate == HELD_OUT and config.calibration in HUB_DATASETS:
            held_out = tokenize(tokenizer, read_text(config.calibration, evaluation=True))
        elif config.evaluate == HELD_OUT:
            ids, held_out = split_held_out(ids, length)
            reserved = len(held_out)
        calibration = random_windows(ids, config.samples, length, config.seed, what=calibration_what, reserved=reserved)
    if config.evaluate not in (HELD_OUT, NONE):
        held_out = tokenize(tokenizer, read_text(config.evaluate, evaluation=True))
    if held_out is None:
        return Texts(calibration, None)
    available = max(1, min(count, len(held_out) // length))
    return Texts(calibration, first_windows(held_out, available, length, what=evaluation_what))


def sample_texts(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: TokenWindows | None
) -> Texts:
    """Calibration windows sampled from the model itself and, for ``held-out``, others sampled after them."""
    extra = config.evaluation_samples if config.evaluate == HELD_OUT else 0
    count = config.samples + extra
    ids = sample_from_model(model, start_token(tokenizer), count, config.sequence_length, config.seed).ids
    calibration = TokenWindows(ids[: config.samples].contiguous())
    return Texts(calibration, TokenWindows(ids[config.samples :].contiguous()) if extra else evaluation)


def check_resources(config: RunConfig, model_config: PreTrainedConfig) -> None:
    """Refuse a ratio out of reach, and a run that this machine's memory or disk cannot hold.

    Memory is estimated as what is held at once: the dense and the compressed weights, one layer's
    statistics with the solver's copies of them, and two sets of hidden states.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        layers = model_geometry(model)
        width, hidden = max(layer.modules["mlp"].full for layer in layers), model_config.hidden_size
    except Exception as error:  # a config can be valid by itself and still describe no model
        message = " ".join(str(error).split())
        raise InvalidRequest(f"MODEL {config.model!r}: its config describes no model: {message}") from error
    average_sparsity(layers, config.modules, config.ratio, config.align)

    item = _item_size(config, model_config)
    blocks = sum(layer.parameters for layer in layers) * item
    total = sum(parameter.numel() for parameter in model.parameters()) * item
    compressed = total - config.ratio * blocks
    states = 2 * config.samples * config.sequence_length * hidden * item
    solve = 8 * (4 * width**2 + 2 * hidden**2)
    weights = total + compressed

    available = psutil.virtual_memory().available
    needed = states + solve + weights if torch.device(config.device).type == "cpu" else states + total
    if needed > available:
        raise InvalidRequest(
            f"not enough memory: about {needed / 2**30:.1f} GiB are needed and {available / 2**30:.1f} GiB are free; "
            "use a smaller --samples or --sequence-length, or --dtype bfloat16"
        )
    if torch.device(config.device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(config.device)
        if solve + weights > free:
            raise InvalidRequest(
                f"not enough memory on {config.device}: about {(solve + weights) / 2**30:.1f} GiB are needed and "
                f"{free / 2**30:.1f} GiB are free; use --dtype bfloat16 or --device cpu"
            )
    free_disk = shutil.disk_usage(existing_parent(config.output)).free
    if compressed > free_disk:
        raise InvalidRequest(
            f"not enough disk at --output: the checkpoint takes about {compressed / 2**30:.2f} GiB and "
            f"{free_disk / 2**30:.2f} GiB are free; use --dtype bfloat16 or another --output"
        )


def _item_size(config: RunConfig, model_config: PreTrainedConfig) -> int:
    """Bytes of a weight once loaded."""
    name: Any = config.dtype
    if name == "auto":
        name = "float32" if config.model.endswith(".gguf") else getattr(model_config, "dtype", None)
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def _perplexities(
    config: RunConfig,
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    windows: TokenWindows | None,
    progress: Progress,
) -> Pair | None:
    if windows is None:
        return None
    values = []
    with progress.phase("evaluate", 2 * math.ceil(len(windows) / config.batch_size)):
        for model in (dense, compressed):
            values.append(perplexity(model, windows, config.batch_size, progress))
    return Pair(dense=values[0], compressed=values[1])


def _evaluation_facts(config: RunConfig, windows: TokenWindows | None) -> TextFacts | None:
    if windows is None:
        return None
    return TextFacts.of(f"{config.calibration}, held out" if config.evaluate == HELD_OUT else config.evaluate, windows)


def open_model(
    address: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, Callable[[], PreTrainedModel]]:
    """A dense or compressed model's tokenizer, its config, and how to load it for inference, once all is checked."""
    source = ModelSource(address, trust_remote_code)
    source.check()
    device = usable_device(device)
    if dtype not in get_args(Dtype):
        raise InvalidRequest(f"--dtype {dtype!r}: use one of {', '.join(get_args(Dtype))}")
    config, tokenizer = source.config(), source.tokenizer()
    check_vocabulary(tokenizer, config)
    if config.model_type in COMPRESSED_TYPES:
        return tokenizer, config, lambda: load(address, dtype=dtype, device=device)
    return tokenizer, config, lambda: source.model(cast(Dtype, dtype), device)


def evaluate_perplexity(
    address: str,
    text: str,
    *,
    samples: int | None = None,
    sequence_length: int = 2048,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[float, TokenWindows]:
    """Perplexity of the model at ``address`` on the first ``samples`` windows of ``text`` (all where None)."""
    progress = progress or Progress()
    check_source(text, option="--perplexity")
    least = {"samples": (samples, 1), "sequence-length": (sequence_length, 2), "batch-size": (batch_size, 1)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise InvalidRequest(f"--{name} {value}: must be at least {smallest}")
    tokenizer, config, open_it = open_model(address, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_length(sequence_length, config)
    with progress.phase("text"):
        ids = tokenize(tokenizer, read_text(text, evaluation=True))
    count = max(1, len(ids) // sequence_length) if samples is None else samples
    windows = first_windows(ids, count, sequence_length, what=f"--perplexity {text}")
    with progress.phase("load"):
        model = open_it()
    with progress.phase("evaluate", math.ceil(len(windows) / batch_size)):
        return perplexity(model, windows, batch_size, progress), windows
