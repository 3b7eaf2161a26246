"""From a model's address to a compressed checkpoint: refuse early, then load, compress, evaluate, save."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import cast, get_args

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
    check_source,
    first_windows,
    random_windows,
    read_text,
    sample_from_model,
    split_held_out,
    tokenize,
)
from .engine import compress_model
from .errors import InvalidRequest
from .evaluation import perplexity
from .families import COMPRESSED_TYPES, check_family, model_geometry
from .progress import Progress
from .report import CompressionReport, Pair, TextFacts, build_report
from .sources import Dtype, ModelSource, check_vocabulary, usable_device

HELD_OUT, NONE = "held-out", "none"


@dataclass(frozen=True)
class Texts:
    """The windows of a run; None where they can only be made once the model is loaded, or are not wanted."""

    calibration: TokenWindows | None
    evaluation: TokenWindows | None


def compress_to_directory(config: RunConfig, progress: Progress | None = None) -> CompressionReport:
    """Carry out ``config``: everything wrong is refused before any weight is loaded."""
    progress = progress or Progress()
    source = ModelSource(config.model, config.trust_remote_code)
    source.check()
    check_output(config.output, overwrite=config.overwrite, inputs=(config.model,))
    check_source(config.calibration, option="--calibration", allow_self=True)
    if config.evaluate not in (HELD_OUT, NONE):
        check_source(config.evaluate, option="--evaluate")

    model_config = source.config()
    check_family(model_config)
    check_resources(config, model_config)
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model_config)
    with progress.phase("text", 1):
        texts = read_texts(config, tokenizer)
    check_windows(texts, model_config)

    with progress.phase("load", 1):
        model = source.model(config.dtype, config.device)
    if texts.calibration is None:
        with progress.phase("sample", 1):
            texts = sample_texts(config, model, tokenizer)
    assert texts.calibration is not None
    result = compress_model(model, texts.calibration, config, progress)
    report = build_report(
        model,
        result,
        config,
        TextFacts.of(config.calibration, texts.calibration),
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
        if config.evaluate == HELD_OUT and config.calibration in HUB_DATASETS:
            held_out = tokenize(tokenizer, read_text(config.calibration, evaluation=True))
        elif config.evaluate == HELD_OUT:
            calibration_what += " (its last tenth is held out for evaluation)"
            ids, held_out = split_held_out(ids, length)
        calibration = random_windows(ids, config.samples, length, config.seed, what=calibration_what)
    if config.evaluate not in (HELD_OUT, NONE):
        held_out = tokenize(tokenizer, read_text(config.evaluate, evaluation=True))
    if held_out is None:
        return Texts(calibration, None)
    available = max(1, min(count, len(held_out) // length))
    return Texts(calibration, first_windows(held_out, available, length, what=evaluation_what))


def sample_texts(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Calibration windows sampled from the model itself and, for ``held-out``, others sampled after them."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(start, int):
        raise InvalidRequest("--calibration self needs a tokenizer with a beginning- or end-of-text token")
    extra = config.evaluation_samples if config.evaluate == HELD_OUT else 0
    ids = sample_from_model(
        model, start, config.samples + extra, config.sequence_length, config.seed, config.batch_size
    ).ids
    calibration = TokenWindows(ids[: config.samples].contiguous())
    if config.evaluate == HELD_OUT:
        return Texts(calibration, TokenWindows(ids[config.samples :].contiguous()))
    return Texts(calibration, read_texts(config, tokenizer).evaluation)


def check_windows(texts: Texts, config: PreTrainedConfig) -> None:
    """Refuse windows longer than the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    for windows in (texts.calibration, texts.evaluation):
        if windows is not None and limit is not None and windows.ids.shape[1] > limit:
            raise InvalidRequest(f"--sequence-length {windows.ids.shape[1]} exceeds the model's {limit} positions")


def check_resources(config: RunConfig, model_config: PreTrainedConfig) -> None:
    """Refuse a ratio out of reach, and a run that this machine's memory or disk cannot hold.

    Memory is estimated from below, as what must be held at once: the dense and the compressed weights, one layer's
    statistics with the solver's copies of them, and two sets of hidden states.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    layers = model_geometry(model)
    average_sparsity(layers, config.modules, config.ratio, config.align)

    item = _item_size(config, model_config)
    blocks = sum(layer.parameters for layer in layers) * item
    total = sum(parameter.numel() for parameter in model.parameters()) * item
    compressed = total - config.ratio * blocks
    width, hidden = max(layer.modules["mlp"].full for layer in layers), model_config.hidden_size
    states = 2 * config.samples * config.sequence_length * hidden * item
    solve = 8 * (4 * width**2 + 2 * hidden**2)
    weights = total + (1 - config.ratio) * blocks

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
    dtype = getattr(torch, config.dtype, None) if config.dtype != "auto" else getattr(model_config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) and not config.model.endswith(".gguf") else 4


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
    with progress.phase("evaluate", 2):
        for model in (dense, compressed):
            values.append(perplexity(model, windows, config.batch_size))
            progress.advance()
    return Pair(dense=values[0], compressed=values[1])


def _evaluation_facts(config: RunConfig, windows: TokenWindows | None) -> TextFacts | None:
    if windows is None:
        return None
    return TextFacts.of(f"{config.calibration}, held out" if config.evaluate == HELD_OUT else config.evaluate, windows)


def open_model(
    address: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A dense or compressed model with its tokenizer, ready for inference."""
    source = ModelSource(address, trust_remote_code)
    source.check()
    device = usable_device(device)
    if dtype not in get_args(Dtype):
        raise InvalidRequest(f"--dtype {dtype!r}: use one of {', '.join(get_args(Dtype))}")
    if source.config().model_type in COMPRESSED_TYPES:
        return load(address, dtype=dtype, device=device), source.tokenizer()
    return source.model(cast(Dtype, dtype), device), source.tokenizer()


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
    for name, value, least in (
        ("samples", samples, 1),
        ("sequence-length", sequence_length, 2),
        ("batch-size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise InvalidRequest(f"--{name} {value}: must be at least {least}")
    with progress.phase("load", 1):
        model, tokenizer = open_model(address, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    ids = tokenize(tokenizer, read_text(text, evaluation=True))
    count = max(1, len(ids) // sequence_length) if samples is None else samples
    windows = first_windows(ids, count, sequence_length, what=f"--perplexity {text}")
    check_windows(Texts(None, windows), model.config)
    with progress.phase("evaluate", 1):
        return perplexity(model, windows, batch_size), windows
