"""Compressed models to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .errors import InvalidRequest
from .report import CompressionReport

#: What a checkpoint consists of: weights, configs, tokenizer, code, report and card.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "README.md")


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
    the one that ``hf auth login`` left where not given. Returns the address. Raises :class:`CheckpointError` and
    :class:`InvalidRequest` for what is no whole checkpoint, and where the hub refuses.
    """
    directory = Path(directory)
    CompressionReport.read(directory)
    missing = [what for what in ("*.safetensors", "config.json", "README.md") if not any(directory.glob(what))]
    if missing:
        raise InvalidRequest(f"{str(directory)!r} is no whole checkpoint of modegpt: it has no {', '.join(missing)}")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=message, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        problem = " ".join(str(error).split())
        raise InvalidRequest(f"{repository!r}: the hub refuses: {problem}") from error
    return str(done.commit_url)
