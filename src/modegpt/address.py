"""Dense and compressed models by their address: opened for inference, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast, get_args

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import load
from .data import TokenWindows, check_length, check_source, first_windows, read_text, tokenize
from .errors import InvalidRequest
from .evaluation import perplexity
from .modeling import is_compressed
from .progress import Progress
from .sources import Dtype, ModelSource, check_vocabulary, usable_device


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
    if is_compressed(config.model_type):
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
