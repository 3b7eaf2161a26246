"""Compressed checkpoints on disk: written whole or not at all, and checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import CheckpointError, InvalidRequest
from .families import COMPRESSED_TYPES
from .model_card import model_card
from .modeling import CompactAttention, layer_sizes, stock_config
from .report import REPORT_FILE, CompressionReport
from .sources import load_causal_lm, usable_device


def check_output(directory: Path, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Refuse an output directory that cannot be written, or that holds something that must not be lost.

    ``inputs`` are the paths (or hub names) that the run reads.
    """
    given, resolved = f"--output {str(directory)!r}", directory.resolve()
    paths = [Path(name).resolve() for name in inputs if Path(name).exists()]
    if resolved in paths:
        raise InvalidRequest(f"{given} is the model's own directory; choose another")
    if directory.exists() and not directory.is_dir():
        raise InvalidRequest(f"{given} is a file; choose a directory")
    if resolved == Path.cwd() or os.path.ismount(resolved):
        raise InvalidRequest(f"{given} is the current directory or a mount point; choose a directory inside it")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise InvalidRequest(f"{given} is not empty; choose another or give --overwrite")
        if not _is_compressed(directory):
            raise InvalidRequest(
                f"{given} holds something other than a compressed checkpoint; --overwrite replaces only those"
            )
        if any(path.is_relative_to(resolved) for path in paths):
            raise InvalidRequest(f"{given} holds what this run reads; choose another")
    parent = existing_parent(resolved)
    if not parent.is_dir():
        raise InvalidRequest(f"{given}: {str(parent)!r} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidRequest(f"{given}: {str(parent)!r} is not writable")


def _is_compressed(directory: Path) -> bool:
    """Whether a directory is a compressed checkpoint, by its report or its model type."""
    if (directory / REPORT_FILE).is_file():
        return True
    try:
        return json.loads((directory / "config.json").read_bytes()).get("model_type") in COMPRESSED_TYPES
    except (OSError, ValueError, AttributeError):
        return False


def existing_parent(path: Path) -> Path:
    """The closest directory above ``path`` that exists."""
    return next(parent for parent in path.resolve().parents if parent.exists())


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: CompressionReport | None = None,
    overwrite: bool = False,
) -> None:
    """Write a compressed model as a Hugging Face directory with its code, tokenizer, report and card.

    Everything is written and synced beside ``directory`` and renamed into place at the end, so that what has
    this name is always a whole checkpoint. ``report`` defaults to the one :func:`modegpt.compress` left on
    the model. Raises :class:`InvalidRequest` for an unusable directory.
    """
    directory = Path(directory)
    if model.config.model_type not in COMPRESSED_TYPES:
        raise InvalidRequest(f"a {type(model).__name__} is not a compressed model; save it with save_pretrained")
    check_output(directory, overwrite=overwrite)
    report = report or getattr(model, "compression_report", None)
    with _staged(directory, overwrite) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if report is not None:
            report.write(staging)
            (staging / "README.md").write_text(model_card(report), encoding="utf-8")


def load(directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a compressed checkpoint for inference.

    The same as ``AutoModelForCausalLM.from_pretrained`` after ``import modegpt``, but it trusts nothing: no code
    from the directory runs, sizes, tensors and kept pairs are checked, and anything missing or left over raises
    :class:`CheckpointError`. A ``compression.json`` beside the weights comes along as ``compression_report``.
    """
    device = usable_device(device)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if config.model_type not in COMPRESSED_TYPES:
            raise CheckpointError(f"model type {config.model_type!r} is not a compressed model's")
        layer_sizes(config)
        limit = stock_config(config).head_dim // 2
        model, info = load_causal_lm(directory, config=config, dtype=dtype, use_safetensors=True)
        problems = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
        if problems:
            raise CheckpointError(f"weights and config disagree: {problems}")
        for name, module in model.named_modules():
            if isinstance(module, CompactAttention) and not _valid_pairs(module.rotary_pairs, limit):
                raise CheckpointError(f"{name}.rotary_pairs are not ascending pairs below {limit}")
        if (Path(directory) / REPORT_FILE).is_file():
            vars(model)["compression_report"] = CompressionReport.read(Path(directory))
    except Exception as error:  # an untrusted directory can fail anywhere
        message = " ".join(str(error).split())
        raise CheckpointError(f"{str(directory)!r} is not a usable compressed checkpoint: {message}") from error
    model.to(device).eval()  # type: ignore[arg-type]
    return model


def _valid_pairs(pairs: torch.Tensor, limit: int) -> bool:
    inside = bool((pairs >= 0).all()) and bool((pairs < limit).all())
    return inside and bool((pairs.diff(dim=-1) > 0).all())


@contextmanager
def _staged(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside ``directory`` that takes its place when the block ends well and vanishes when it does not."""
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.incomplete-", dir=target.parent))
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        for path in [*staging.rglob("*"), staging]:
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # temporary files are made private
            _sync(path)
        if overwrite and target.exists():
            _replace(target, staging)
        else:
            if target.exists():
                target.rmdir()  # fails, and loses nothing, if somebody has put something there meanwhile
            os.rename(staging, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(target: Path, staging: Path) -> None:
    """Put ``staging`` in the place of ``target``, which comes back if that fails."""
    replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    os.rename(target, replaced)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(replaced, target)
        raise
    _sync(target.parent)
    shutil.rmtree(replaced)


def _sync(path: Path) -> None:
    """Have the operating system put ``path`` on disk (directories cannot be opened everywhere)."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
