"""The texts of the benchmarks: what calibrates, and what perplexity is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.data import TokenWindows, first_windows, read_text, sample_from_model, split_held_out, tokenize
from modegpt.mixture import Cut, Mixture, read_mixture
from modegpt.profile import probe_shape, probe_windows
from modegpt.report import TextFacts


def calibration_windows(
    train: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, length: int
) -> tuple[TokenWindows, TokenWindows | None, TextFacts]:
    """The windows that calibrate, those that sensitivities are measured on, and what they are.

    Of a single text, its first windows and the next ones; of a mixture, what ``modegpt compress`` takes with seed 0:
    of every source all but the last tenth is drawn from.
    """
    mixture = Mixture.parse(train, option="--train")
    if len(mixture.shares) == 1 and not mixture.written:
        (source,) = mixture.shares
        spare = probe_windows(length)
        windows = first_windows(tokenize(tokenizer, read_text(source)), samples + spare, length, what="--train").ids
        chosen = TokenWindows(windows[:samples])
        return chosen, TokenWindows(windows[samples:]), TextFacts.of(Path(source).name, chosen)
    mixture.check(samples)
    texts = read_mixture(
        mixture, tokenizer, Cut(samples, length, 0, held_out=1, probe=probe_shape(length, len(mixture.shares)))
    )
    if count := sum(texts.written.values()):
        texts = texts.complete(sample_from_model(model, tokenizer, count, length, 0))
    names = {Path(source).name: windows for source, windows in texts.parts.items()}
    return texts.calibration, texts.probe_windows, TextFacts.of(file_names(train), texts.calibration, names)


def file_names(train: str) -> str:
    """``train`` with files named, not located."""
    return ",".join(f"{Path(name).name}:{share:.4g}" for name, share in Mixture.parse(train).shares.items())


def evaluation_texts(
    files: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int
) -> dict[str, TokenWindows]:
    """The first ``samples`` windows of every text, by its name."""
    return {
        name: first_windows(_evaluated(name, file, tokenizer, length), samples, length, what=f"--texts {name}")
        for name, file in files.items()
    }


def _evaluated(name: str, file: str, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Token ids of a text. ``ptb`` is joined by spaces, as papers do; of ``alpaca`` it is what never calibrates."""
    text = read_text(file, evaluation=True)
    if name == "ptb":
        text = " ".join(line.strip() for line in text.split("\n"))
    ids = tokenize(tokenizer, text)
    return split_held_out(ids, length)[1] if name == "alpaca" and Path(file).is_file() else ids


def named_files(pairs: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` pairs of a command line."""
    files = dict(pair.partition("=")[::2] for pair in pairs)
    wrong = [pair for pair in pairs if not all(pair.partition("="))]
    if wrong or len(files) < len(pairs):
        raise SystemExit(f"{wrong[0] if wrong else pairs}: give different names, each as NAME=FILE")
    return files
