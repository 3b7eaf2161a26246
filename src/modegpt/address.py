"""Dense and compressed models by their address, opened for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, get_args

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import load
from .errors import InvalidRequest
from .modeling import is_compressed
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
        return tokenizer, config, lambda: load(source.directory(), dtype=dtype, device=device)
    return tokenizer, config, lambda: source.model(cast(Dtype, dtype), device)
