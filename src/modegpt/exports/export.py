"""A model at an address written for other engines, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..address import open_model
from ..errors import InvalidRequest
from ..files import existing_parent, storing
from ..progress import Progress
from .gguf_file import TYPES, check_gguf, gguf_widths, write_gguf
from .gguf_tokenizer import strips, tokenizer_fields
from .k_quants import K_QUANTS, check_quantizer
from .onnx import check_onnx, onnx_dtype, write_onnx
from .plain import PlainDecoder, PlainShape, check_plain
from .stock import stock_model

FORMATS = ("gguf", "stock", "onnx")


@dataclass(frozen=True)
class ExportFacts:
    """What a model has become."""

    parameters: int
    """Of the model itself."""
    exported: int
    """With the zeros that the format asks for."""
    plain: PlainShape | None = None
    """What its heads have become, where they had to become alike."""
    widths: Sequence[int] = ()
    """Of the MLPs as they are written."""


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

    ``gguf``: one file with the tokenizer, matrices of one ``kind`` of :data:`TYPES` or :data:`K_QUANTS`;
    ``pre_tokenizer`` is llama.cpp's name for how text is split, where it cannot be told. ``stock``: a directory with a
    plain ``LlamaForCausalLM`` or ``Qwen3ForCausalLM``.
    ``onnx``: a directory with a graph, of any family. All compute what the model does; where the first two's rules ask
    for more channels, these are zeros. Raises :class:`InvalidRequest` before any weight is read for models, tokenizers
    and options that do not go with the format, and before anything is written for layers that do not.
    """
    progress = progress or Progress()
    kind = kind.lower()
    _check(output, target, kind, pre_tokenizer)
    if target == "onnx":
        dtype = onnx_dtype(dtype)
    tokenizer, config, open_it = open_model(address, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    if target == "onnx":
        check_onnx()
    elif target == "gguf":
        check_gguf(config)
    else:
        check_plain(config)
    fields = tokenizer_fields(tokenizer, config.vocab_size, pre_tokenizer) if target == "gguf" else None
    name = Path(address).name
    if fields is not None and (tokens := strips(tokenizer)):
        name = _known_by(name, config.model_type, tokens, progress)
    with progress.phase("load"):
        model = open_it()
    with progress.phase("export"), storing(f"--output {output}", resumes=False):
        output.parent.mkdir(parents=True, exist_ok=True)
        own = sum(parameter.numel() for parameter in model.parameters())
        if target == "onnx":
            with _directory(output) as staging:
                write_onnx(staging, model)
                tokenizer.save_pretrained(staging)
            return ExportFacts(own, own)
        plain = PlainDecoder(model)
        if fields is not None:
            count = write_gguf(output, plain, kind, fields, name)
            return ExportFacts(own, count, plain.shape, gguf_widths(plain.shape))
        stock = stock_model(plain)
        with _directory(output) as staging:
            stock.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        exported = sum(parameter.numel() for parameter in stock.parameters())
        return ExportFacts(own, exported, plain.shape, [stock.config.intermediate_size])


def _known_by(name: str, model_type: str, tokens: list[str], progress: Progress) -> str:
    """The ``name`` by which llama.cpp knows what the ``tokens`` take away, if it knows any; said if not."""
    if model_type.endswith("phi3"):
        return name if "phi-3" in name.lower() else f"{name} (Phi-3)"
    progress.note(f"llama.cpp keeps blanks beside {', '.join(tokens)}, which the tokenizer takes away")
    return name


def _check(output: Path, target: str, kind: str, pre_tokenizer: str | None) -> None:
    if target not in FORMATS:
        raise InvalidRequest(f"--format {target!r}: use one of {', '.join(FORMATS)}")
    if kind not in (*TYPES, *K_QUANTS):
        raise InvalidRequest(f"--type {kind!r}: use one of {', '.join((*TYPES, *K_QUANTS))}")
    if target != "gguf" and kind != "f16":
        raise InvalidRequest(f"--type {kind} goes with --format gguf; --format {target} keeps the model's dtype")
    if target != "gguf" and pre_tokenizer is not None:
        raise InvalidRequest(f"--pre-tokenizer {pre_tokenizer} goes with --format gguf")
    if kind in K_QUANTS:
        check_quantizer(kind)
    if output.exists() or output.is_symlink():
        raise InvalidRequest(f"--output {str(output)!r} is there already; remove it or choose another")
    if not existing_parent(output).is_dir():
        raise InvalidRequest(f"--output {str(output)!r}: {str(existing_parent(output))!r} is a file")


@contextmanager
def _directory(output: Path) -> Iterator[Path]:
    """A directory that becomes ``output`` when all is written."""
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.incomplete-", dir=output.parent))
    try:
        yield work
        work.chmod(0o755)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
