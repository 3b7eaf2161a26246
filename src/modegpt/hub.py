"""Compressed models to the Hugging Face hub."""

from __future__ import annotations

import glob
import json
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from .errors import CheckpointError, InvalidRequest
from .report import CompressionReport

#: Of an earlier checkpoint in the same place, what could be taken for a part of another one. All else there stays.
STALE = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "modeling_*.py",
    "spectra.json",
    "chat_template.jinja",
    f"{CHAT_TEMPLATE_DIR}/*.jinja",
    *("added_tokens.json", "special_tokens_map.json", "merges.txt", "vocab.json", "vocab.txt", "tokenizer.model"),
)
#: What a checkpoint is: weights, configs, tokenizer with its named chat templates, code, report, card, licence.
FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    f"{CHAT_TEMPLATE_DIR}/*.jinja",
    "*.model",
    "*.txt",
    "*.py",
    "README.md",
    "LICENSE*",
)


def push_to_hub(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Compressed with modegpt",
) -> str:
    """Upload the compressed checkpoint in ``directory`` to ``repository`` ("name/model"), which is made if need be.

    With its modeling code, so that it loads there by ``trust_remote_code=True`` alone, and its model card. ``token`` is
    the one that ``hf auth login`` left where not given. Of an earlier checkpoint there, weights, code and tokenizer
    files that this one has not are deleted; all else stays. Returns the address. Raises :class:`CheckpointError` and
    :class:`InvalidRequest` for what is no whole checkpoint, and where the hub refuses.
    """
    directory = Path(directory)
    CompressionReport.read(directory)
    missing = [what for what in ("*.safetensors", "config.json", "README.md") if not any(directory.glob(what))]
    missing += [name for name in _shards(directory) if not (directory / name).is_file()]
    if missing:
        raise InvalidRequest(f"{str(directory)!r} is no whole checkpoint of modegpt: it has no {', '.join(missing)}")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.list_repo_files(repository)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message=message,
            allow_patterns=_files(directory),
            delete_patterns=[glob.escape(name) for name in there if _is_stale(name)],  # but for what is uploaded
        )
    except Exception as error:  # the hub, the network and the client each have errors of their own
        problem = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequest(f"{repository!r} cannot be uploaded to {api.endpoint}: {problem}") from error
    return str(done.commit_url)


def _files(directory: Path) -> list[str]:
    """The names that are uploaded: none from other folders inside, which the hub's patterns would reach too."""
    found = {path for pattern in FILES for path in directory.glob(pattern) if path.is_file()}
    return [glob.escape(path.relative_to(directory).as_posix()) for path in sorted(found)]


def _is_stale(name: str) -> bool:
    """Whether the file ``name`` of a repository is one of :data:`STALE`, in the very folder that these name."""
    return any(name.count("/") == one.count("/") and fnmatchcase(name, one) for one in STALE)


def _shards(directory: Path) -> list[str]:
    """The files that hold the weights, where an index names several."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights") from error
