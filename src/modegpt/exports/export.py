"""A model at an address written for other engines, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..address import open_model
from ..errors import InvalidRequest
from ..files import existing_parent
from ..progress import Progress
from .gguf_file import TYPES, write_gguf
from .gguf_tokenizer import tokenizer_fields
from .plain import PlainDecoder, check_plain
from .stock import stock_model

FORMATS = ("gguf", "stock")


@dataclass(frozen=True)
class ExportFacts:
    """What a model has become."""

    parameters: int
    """Of the model itself."""
    exported: int
    """With the zeros that the format asks for."""
    head: int
    """Channels of a head of queries, keys and values."""
    widths: tuple[int, int]
    """Channels of the narrowest and the widest MLP."""
    context: int
    """Tokens up to which it is the same model."""


def export(
    address: str,
    output: Path,
    target: str,
    *,
    kind: str = "f16",
    pre_tokenizer: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportFacts:
    """Write the model at ``address``, dense or compressed, for the ``target`` engines into ``output``.

    ``gguf``: one file with the tokenizer, matrices of one ``kind`` of :data:`TYPES`; ``pre_tokenizer`` is llama.cpp's
    name for how text is split, where it cannot be told. ``stock``: a directory with a plain ``LlamaForCausalLM``. Both
    compute what the model does; where their rules ask for more channels, these are zeros. Raises
    :class:`InvalidRequest` before any weight is read for what cannot be written.
    """
    progress = progress or Progress()
    _check(output, target, kind)
    tokenizer, config, open_it = open_model(address, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    check_plain(config)
    fields = tokenizer_fields(tokenizer, config.vocab_size, pre_tokenizer) if target == "gguf" else None
    with progress.phase("load"):
        model = open_it()
    with progress.phase("export"):
        output.parent.mkdir(parents=True, exist_ok=True)
        if fields is None:
            return _write_stock(model, tokenizer, output)
        plain = PlainDecoder(model)
        exported = write_gguf(output, plain, kind, fields, Path(address).name)
        return _facts(model, plain, exported)


def _check(output: Path, target: str, kind: str) -> None:
    if target not in FORMATS:
        raise InvalidRequest(f"--format {target!r}: use one of {', '.join(FORMATS)}")
    if kind not in TYPES:
        raise InvalidRequest(f"--type {kind!r}: use one of {', '.join(TYPES)}")
    if target != "gguf" and kind != "f16":
        raise InvalidRequest(f"--type {kind} goes with --format gguf; --format {target} keeps the model's dtype")
    if output.exists():
        raise InvalidRequest(f"--output {str(output)!r} is there already; remove it or choose another")
    if not existing_parent(output).is_dir():
        raise InvalidRequest(f"--output {str(output)!r}: {str(existing_parent(output))!r} is a file")


def _write_stock(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> ExportFacts:
    plain = PlainDecoder(model)
    stock = stock_model(plain)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.incomplete-", dir=output.parent))
    try:
        stock.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.chmod(0o755)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _facts(model, plain, sum(parameter.numel() for parameter in stock.parameters()))


def _facts(model: PreTrainedModel, plain: PlainDecoder, exported: int) -> ExportFacts:
    shape = plain.shape
    own = sum(parameter.numel() for parameter in model.parameters())
    return ExportFacts(own, exported, shape.head, (min(shape.widths), max(shape.widths)), shape.context)
