"""Compression of a model that is already in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import NONE, CompressionConfig
from .data import (
    SELF,
    TokenWindows,
    check_length,
    check_source,
    other_windows,
    random_windows,
    read_text,
    sample_from_model,
    start_token,
    tokenize,
)
from .engine import compress_model
from .errors import InvalidRequest
from .families import check_model, model_geometry
from .methods import METHODS
from .profile import probe_windows
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

    ``calibration`` is a data set's name (``wikitext2``, ``ptb``, ``alpaca``), the path of a text file, ``self`` for
    text sampled from the model, a list of texts, token ids (N, T) int64, or :class:`TokenWindows` where windows are
    padded; it is not read where method and allocation use no text. ``options`` are the fields of
    :class:`CompressionConfig`: method, allocation, temperature, modules, layers, ratio_of, statistics, align, ridge,
    joint_only, samples, sequence_length, seed, batch_size. Only text needs a ``tokenizer``.

    Returns a new model of the compressed class; it generates, trains and saves like any other, and carries its
    :class:`CompressionReport` as ``compression_report``. ``model`` is left as it is and shares nothing with it.

    Raises :class:`InvalidRequest` for anything wrong with the request, before any work, and
    :class:`NumericalError` when a layer's activations are not finite.
    """
    config = CompressionConfig.validated(ratio=ratio, **options)
    check_model(model)
    config.chosen_layers(model.config.num_hidden_layers)
    model_geometry(model, METHODS[config.method].from_config(config).geometry)  # refuses what the method cannot do
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    windows, probe, source = None, None, NONE
    if config.calibrates:
        windows, probe, source = _windows(model, tokenizer, calibration, config)
    if windows is not None:
        highest = int(windows.ids.max())
        if highest >= model.config.vocab_size or int(windows.ids.min()) < 0:
            raise InvalidRequest(f"calibration has token id {highest}; the model embeds {model.config.vocab_size}")
        check_length(windows.ids.shape[1], model.config)
        config = config.model_copy(update={"samples": len(windows), "sequence_length": windows.ids.shape[1]})
    result = compress_model(model, windows, config, progress, probe=probe)
    settings = ", ".join(f"{name}={value!r}" for name, value in {"ratio": ratio, **options}.items())
    command = f"modegpt.compress(model, tokenizer, calibration={source!r}, {settings})"
    report = build_report(model, result, config, TextFacts.of(source, windows), command=command)
    vars(result.model)["compression_report"] = report
    return result.model


def _windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration,
    config: CompressionConfig,
) -> tuple[TokenWindows, TokenWindows | None, str]:
    """The calibration windows, of a text others that sensitivities can be measured on, and where they come from."""
    if isinstance(calibration, TokenWindows):
        return calibration, None, "token windows"
    if isinstance(calibration, torch.Tensor):
        return TokenWindows(calibration), None, "token windows"
    if tokenizer is None:
        raise InvalidRequest("calibration text needs a tokenizer; give one, or token windows as calibration")
    samples, length, seed = config.samples, config.sequence_length, config.seed
    check_length(length, model.config)
    if calibration == SELF:
        return sample_from_model(model, start_token(tokenizer), samples, length, seed), None, SELF
    if isinstance(calibration, (str, Path)):
        check_source(str(calibration), option="calibration", allow_self=True)
        text, source = read_text(str(calibration)), str(calibration)
    else:
        text, source = "\n\n".join(calibration), "texts"
    ids = tokenize(tokenizer, text)
    windows = random_windows(ids, samples, length, seed, what=source)
    return windows, other_windows(ids, probe_windows(length), length, seed, but=samples), source
