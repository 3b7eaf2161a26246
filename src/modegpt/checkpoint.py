"""Compressed checkpoints on disk: written whole or not at all, and checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import CheckpointError, InvalidRequest
from .files import existing_parent, sha256_of, storing, sync
from .journal import REPLACED, Journal, left_behind, put_back
from .layered import LayeredModel
from .layout import rotary_channels
from .model_card import model_card
from .modeling import CompactAttention, is_compressed, layer_sizes, recognise
from .origin import ORIGIN_FILE, Origin
from .report import REPORT_FILE, CompressionReport, RunFacts
from .shards import SHARD_BYTES, write_shards
from .sources import load_causal_lm, usable_device
from .stored import WEIGHTS_FILE

_STAGING = "checkpoint"


def check_output(directory: Path, *, overwrite: bool, inputs: Iterable[str] = (), profile: bool = False) -> None:
    """Refuse an output directory that cannot be written, or that holds something that must not be lost.

    ``inputs`` are the paths (or hub names) that the run reads. What may be overwritten is a compressed checkpoint, or
    a ``profile``.
    """
    given, resolved = f"--output {str(directory)!r}", directory.resolve()
    paths = [Path(name).resolve() for name in inputs if Path(name).exists()]
    if directory.exists() and not directory.is_dir():
        raise InvalidRequest(f"{given} is a file; choose a directory")
    if resolved in paths:
        raise InvalidRequest(f"{given} is the model's own directory; choose another")
    if resolved == Path.cwd() or os.path.ismount(resolved):
        raise InvalidRequest(f"{given} is the current directory or a mount point; choose a directory inside it")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise InvalidRequest(f"{given} is not empty; choose another or give --overwrite")
        if not ((directory / ORIGIN_FILE).is_file() if profile else _is_compressed(directory)):
            kind = "profile" if profile else "compressed checkpoint"
            raise InvalidRequest(f"{given} holds something other than a {kind}; --overwrite replaces only those")
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
        return is_compressed(json.loads((directory / "config.json").read_bytes()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return False


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
    if not is_compressed(model.config.model_type):
        raise InvalidRequest(f"a {type(model).__name__} is not a compressed model; save it with save_pretrained")
    check_output(directory, overwrite=overwrite)
    report = report or getattr(model, "compression_report", None)
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.incomplete-", dir=target.parent))
    try:
        with _staged(target, work, overwrite) as staging:
            model.save_pretrained(staging, max_shard_size=SHARD_BYTES)
            _write_facts(staging, tokenizer, report)
    finally:
        put_back(work, target)
        shutil.rmtree(work, ignore_errors=True)


def publish(
    journal: Journal,
    thin: LayeredModel,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    report: CompressionReport,
    run: RunFacts,
    overwrite: bool,
) -> None:
    """Make a checkpoint of a compression whose layers are in ``journal``, which is then removed.

    It is the one that :func:`save` makes of the same model in memory, up to the order of its tensors.
    """
    model, layers = thin.model, thin.family.description.layers
    prefix = f"{model.base_model_prefix}.{layers}."
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    journal.announce(None)
    with storing(str(journal.directory)), _staged(directory.resolve(), journal.directory, overwrite) as staging:
        model.save_pretrained(staging, state_dict=rest, max_shard_size=2**62)
        rest_file = journal.directory / "rest.safetensors"
        os.replace(staging / WEIGHTS_FILE, rest_file)
        kept = [(journal.file(source), f"{prefix}{index}.") for index, source in enumerate(thin.sources)]
        write_shards([(rest_file, ""), *kept], staging)
        _write_facts(staging, tokenizer, report)
        run.write(staging)
        journal.announce(sha256_of(staging / REPORT_FILE))
    journal.remove()


def publish_profile(
    journal: Journal, directory: Path, origin: Origin, config: PreTrainedConfig, overwrite: bool
) -> None:
    """Give the finished profile in ``journal``, which is then removed, its own place."""
    with storing(str(journal.directory)), _staged(directory.resolve(), journal.directory, overwrite) as staging:
        for path in journal.profile.iterdir():
            os.rename(path, staging / path.name)
        config.save_pretrained(staging)
        origin.write(staging)
    journal.remove()


def published(output: Path) -> bool:
    """Whether the checkpoint of an interrupted run into ``output`` is in its place: only tidying up is left to do."""
    left, report = left_behind(output), output / REPORT_FILE
    staged = left.directory / _STAGING
    return (
        left.announced is not None and not staged.exists() and report.is_file() and sha256_of(report) == left.announced
    )


def _write_facts(directory: Path, tokenizer: PreTrainedTokenizerBase | None, report: CompressionReport | None) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if report is not None:
        report.write(directory)
        (directory / "README.md").write_text(model_card(report), encoding="utf-8")


def load(directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a compressed checkpoint for inference.

    As ``AutoModelForCausalLM.from_pretrained`` after ``import modegpt``, but it knows the families that were inferred,
    and it trusts nothing: no code from the directory runs, sizes, tensors and kept pairs are checked, and anything
    missing or left over raises :class:`CheckpointError`. A ``compression.json`` beside the weights comes along as
    ``compression_report``.
    """
    device = usable_device(device)
    try:
        recognise(json.loads((Path(directory) / "config.json").read_bytes()).get("model_type"))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if not is_compressed(config.model_type):
            raise CheckpointError(f"model type {config.model_type!r} is not a compressed model's")
        layer_sizes(config)
        model, info = load_causal_lm(directory, config=config, dtype=dtype, use_safetensors=True)
        problems = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
        if problems:
            raise CheckpointError(f"weights and config disagree: {problems}")
        for name, module in model.named_modules():
            if isinstance(module, CompactAttention) and module.rotary_pairs is not None:
                family: Any = type(model).family_of(config)  # type: ignore[attr-defined]
                rotary = rotary_channels(config, family, module.rope_head_dim)
                if not _valid_pairs(module.rotary_pairs, rotary, module.rope_head_dim):
                    raise CheckpointError(f"{name}.rotary_pairs are not ascending pairs of {rotary} channels")
        if (Path(directory) / REPORT_FILE).is_file():
            vars(model)["compression_report"] = CompressionReport.read(Path(directory))
    except Exception as error:  # an untrusted directory can fail anywhere
        message = " ".join(str(error).split())
        raise CheckpointError(f"{str(directory)!r} is not a usable compressed checkpoint: {message}") from error
    model.to(device).eval()  # type: ignore[arg-type]
    return model


def _valid_pairs(pairs: torch.Tensor, rotary: int, head: int) -> bool:
    """Whether every row ascends and has each pair once; that of still channels as often as there are two of them."""
    still = rotary // 2
    inside = bool((pairs >= 0).all()) and bool((pairs <= still).all())
    ascending = bool(((pairs.diff(dim=-1) > 0) | (pairs[..., 1:] == still)).all())
    return inside and ascending and bool(((pairs == still).sum(-1) <= (head - rotary) // 2).all())


@contextmanager
def _staged(target: Path, work: Path, overwrite: bool) -> Iterator[Path]:
    """A directory in ``work`` that becomes ``target`` when the block ends well.

    ``work`` is beside ``target``. What is killed on the way leaves ``target`` as it was or, in the middle of the
    exchange, in ``work``; never half of anything.
    """
    staging, replaced = work / _STAGING, work / REPLACED
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    yield staging
    umask = os.umask(0)
    os.umask(umask)
    for path in [*staging.rglob("*"), staging]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # temporary files are made private
        sync(path)
    if overwrite and target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    elif target.exists():
        target.rmdir()  # fails, and loses nothing, if somebody has put something there meanwhile
    try:
        os.rename(staging, target)
    except BaseException:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    sync(target.parent)
