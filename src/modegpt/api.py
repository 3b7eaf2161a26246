"""Compression of a model that is already in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import CompressionConfig
from .data import TokenWindows, check_source, random_windows, read_text, tokenize
from .engine import compress_model
from .errors import InvalidRequest
from .families import check_family
from .progress import Progress
from .report import TextFacts, build_report
from .sources import check_vocabulary

Calibration = str | Path | Sequence[str] | torch.Tensor | TokenWindows


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ratio: float,
    calibration: Calibration = "wikitext2",
    progress: Progress | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Remove ``ratio`` of the decoder blocks' parameters of a causal language model, in memory.

    ``calibration`` is a data set's name (``wikitext2``, ``ptb``, ``alpaca``), the path of a text file, a list of
    texts, or token ids (N, T) int64, or :class:`TokenWindows` where windows are padded. ``options`` are the fields
    of :class:`CompressionConfig`: method, allocation, temperature, modules, statistics, align, ridge, samples,
    sequence_length, seed, batch_size. Only text needs a ``tokenizer``.

    Returns a new model of the compressed class; it generates, trains and saves like any other, and carries its
    :class:`CompressionReport` as ``compression_report``. ``model`` is left as it is; what is not compressed
    (embeddings, norms, head) is shared with it, not copied.

    Raises :class:`InvalidRequest` for anything wrong with the request, before any work, and
    :class:`NumericalError` when a layer's activations are not finite.
    """
    config = CompressionConfig.validated(ratio=ratio, **options)
    check_family(model.config)
    windows, source = _windows(calibration, tokenizer, config)
    highest = int(windows.ids.max())
    if highest >= model.config.vocab_size or int(windows.ids.min()) < 0:
        raise InvalidRequest(f"calibration has token id {highest}; the model embeds {model.config.vocab_size}")
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    config = config.model_copy(update={"samples": len(windows), "sequence_length": windows.ids.shape[1]})
    result = compress_model(model, windows, config, progress)
    report = build_report(model, result, config, TextFacts.of(source, windows))
    result.model.compression_report = report  # type: ignore[assignment]
    return result.model


def _windows(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase | None, config: CompressionConfig
) -> tuple[TokenWindows, str]:
    if isinstance(calibration, TokenWindows):
        return calibration, "token windows"
    if isinstance(calibration, torch.Tensor):
        return TokenWindows(calibration), "token windows"
    if tokenizer is None:
        raise InvalidRequest("calibration text needs a tokenizer; give one, or token windows as calibration")
    if isinstance(calibration, (str, Path)):
        check_source(str(calibration), option="calibration")
        text, source = read_text(str(calibration)), str(calibration)
    else:
        text, source = "\n\n".join(calibration), "texts"
    ids = tokenize(tokenizer, text)
    return random_windows(ids, config.samples, config.sequence_length, config.seed, what=source), source
