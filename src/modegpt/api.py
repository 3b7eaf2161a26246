"""Compression of a model that is already in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .aims import with_ratio
from .config import NONE, CompressionConfig
from .data import TokenWindows, check_length, other_windows, random_windows, sample_from_model, tokenize
from .engine import compress_model
from .errors import InvalidRequest
from .families import check_model, model_geometry
from .methods import METHODS
from .mixture import DEFAULT, Cut, Mixture, Texts, read_mixture
from .profile import probe_shape, probe_windows
from .progress import Progress
from .report import TextFacts, build_report
from .sources import check_vocabulary

Calibration = str | Path | Sequence[str] | torch.Tensor | TokenWindows


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ratio: float | None = None,
    calibration: Calibration = DEFAULT,
    progress: Progress | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Remove ``ratio`` of the decoder blocks' parameters of a causal language model, in memory.

    In place of ``ratio`` there can be ``target_parameters`` ("5.5B"), ``target_size`` ("4GiB") or, with the
    ``sensitivity`` allocation, ``max_perplexity_increase`` ("10%").

    ``calibration`` is a data set's name (such as ``wikitext2``), the path of a text file, ``self`` for text sampled
    from the model, several of these with shares as on the command line (``wikitext2:0.75,self:0.25``), a list of
    texts, token ids (N, T) int64, or :class:`TokenWindows` where windows are padded; it is not read where method and
    allocation use no text. ``options`` are the fields of :class:`CompressionConfig`: method, allocation, temperature,
    modules, layers, ratio_of, statistics, align, ridge, joint_only, samples, sequence_length, seed, batch_size. Only
    text needs a ``tokenizer``.

    Returns a new model of the compressed class; it generates, trains and saves like any other, and carries its
    :class:`CompressionReport` as ``compression_report``. ``model`` is left as it is and shares nothing with it.

    Raises :class:`InvalidRequest` for anything wrong with the request, before any work, and
    :class:`NumericalError` when a layer's activations are not finite.
    """
    config = CompressionConfig.validated(ratio=ratio, **options)
    check_model(model)
    config.chosen_layers(model.config.num_hidden_layers)
    model_geometry(model, METHODS[config.method].from_config(config).geometry)  # refuses what the method cannot do
    config = with_ratio(config, model, model.dtype.itemsize)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    texts, source, windows = Texts(config.seed), NONE, None
    if config.calibrates:
        texts, source = _texts(model, tokenizer, calibration, config)
        windows = texts.calibration
        assert windows is not None
        highest = int(windows.ids.max())
        if highest >= model.config.vocab_size or int(windows.ids.min()) < 0:
            raise InvalidRequest(f"calibration has token id {highest}; the model embeds {model.config.vocab_size}")
        check_length(windows.ids.shape[1], model.config)
        config = config.model_copy(update={"samples": len(windows), "sequence_length": windows.ids.shape[1]})
    result = compress_model(model, windows, config, progress, probe=texts.probe_windows)
    given = {**({} if ratio is None else {"ratio": ratio}), **options}
    settings = ", ".join(f"{name}={value!r}" for name, value in given.items())
    command = f"modegpt.compress(model, tokenizer, calibration={source!r}, {settings})"
    report = build_report(model, result, config, TextFacts.of(source, windows, texts.parts), command=command)
    vars(result.model)["compression_report"] = report
    return result.model


def _texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration,
    config: CompressionConfig,
) -> tuple[Texts, str]:
    """The windows, of a text also others that sensitivities can be measured on, and where they come from."""
    seed = config.seed
    if isinstance(calibration, (TokenWindows, torch.Tensor)):
        windows = calibration if isinstance(calibration, TokenWindows) else TokenWindows(calibration)
        return Texts(seed, {"token windows": windows}), "token windows"
    if tokenizer is None:
        raise InvalidRequest("calibration text needs a tokenizer; give one, or token windows as calibration")
    samples, length = config.samples, config.sequence_length
    check_length(length, model.config)
    if not isinstance(calibration, (str, Path)):
        ids = tokenize(tokenizer, "\n\n".join(calibration))
        parts = {"texts": random_windows(ids, samples, length, seed, what="texts")}
        others = other_windows(ids, probe_windows(length), length, seed, but=samples)
        return Texts(seed, parts, probe={} if others is None else {"texts": others}), "texts"
    mixture = Mixture.parse(str(calibration), option="calibration")
    mixture.check(samples)
    probe = probe_shape(length, len(mixture.shares)) if config.allocation == "sensitivity" else None
    texts = read_mixture(mixture, tokenizer, Cut(samples, length, seed, probe=probe))
    if texts.written:
        count = sum(texts.written.values())
        texts = texts.complete(sample_from_model(model, tokenizer, count, length, seed))
    return texts, str(calibration)
