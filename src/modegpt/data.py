"""Text to token windows: where calibration and evaluation text comes from and how it is cut.

A source is a data set on the hub (:data:`HUB_DATASETS`), a local file, or ``self``, text sampled from the model
(several of them: see :mod:`modegpt.mixture`). Text is tokenised once, without special tokens, and cut into consecutive
windows of equal length, so that no window holds padding.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import InvalidRequest, NumericalError

#: The share of a text that is set aside for evaluation when no separate evaluation text is named.
HELD_OUT_SHARE = 0.1

SELF = "self"
#: Text from the model is sampled in pieces of about this many tokens, and so many at once. Fixed, because the pieces of
#: a batch share a stream of random numbers.
PIECE, SAMPLED_AT_ONCE = 256, 64
FILE_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class HubDataset:
    """A public data set: its address on the hub, the splits to calibrate and evaluate on, and how rows join.

    With ``rows``, only so many rows are read, streamed: the first of a split to calibrate on; to evaluate on, the first
    of another split, or those that follow in the same one.
    """

    path: str
    name: str | None
    calibration_split: str
    evaluation_split: str
    separator: str
    revision: str | None = None
    files: Mapping[str, str] | None = None
    """The file of each split, where the splits are not to be looked up."""
    rows: int | None = None


HUB_DATASETS: Mapping[str, HubDataset] = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", "\n\n"),
    # The main branch is a loading script, which datasets no longer runs; the hub keeps a converted copy.
    "ptb": HubDataset("ptb-text-only/ptb_text_only", None, "train", "test", " ", "refs/convert/parquet"),
    # Alpaca has one split: the last tenth of its rows is the evaluation part.
    "alpaca": HubDataset("tatsu-lab/alpaca", None, "train[:90%]", "train[90%:]", "\n\n"),
    # The following are far too large to download; so many rows are some two million tokens each. No test reaches the
    # hub: that these addresses are right is known from their pages and from others' code.
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "train", "\n\n", rows=2000),
    "c4": HubDataset(
        *("allenai/c4", None, "train", "validation", "\n\n"),
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        rows=5000,
    ),
    "ultrachat": HubDataset("HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft", "\n\n", rows=2000),
    "codeparrot": HubDataset("codeparrot/codeparrot-clean-valid", None, "train", "train", "\n\n", rows=1000),
}


@dataclass(frozen=True)
class TokenWindows:
    """Token ids (N, T) int64 and, where windows are padded, a mask (N, T) that is true on real tokens."""

    ids: torch.Tensor
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64 or self.ids.numel() == 0:
            raise InvalidRequest(f"token windows must be a non-empty (N, T) int64 tensor, got {describe(self.ids)}")
        object.__setattr__(self, "ids", self.ids.cpu())
        if self.mask is None:
            return
        if self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise InvalidRequest(f"the mask must be bool and shaped like the ids, got {describe(self.mask)}")
        if not bool(self.mask.any()):
            raise InvalidRequest("the mask leaves no token")
        object.__setattr__(self, "mask", None if bool(self.mask.all()) else self.mask.cpu())

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.ids.numel() if self.mask is None else self.mask.sum())

    def sha256(self) -> str:
        """Hash of the shape, the little-endian int64 ids and the mask: equal hashes mean equal windows."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        if self.mask is not None:
            digest.update(self.mask.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def pieces(self, tokens: int, length: int) -> TokenWindows:
        """About ``tokens`` of the first positions: the first ``length`` of as many windows as that takes."""
        length = min(length, self.ids.shape[1])
        count = max(1, min(len(self), tokens // length))
        return TokenWindows(self.ids[:count, :length], None if self.mask is None else self.mask[:count, :length])

    def batches(self, size: int) -> Iterable[TokenWindows]:
        """Consecutive batches of at most ``size`` windows."""
        for start in range(0, len(self), size):
            mask = None if self.mask is None else self.mask[start : start + size]
            yield TokenWindows(self.ids[start : start + size], mask)


def describe(tensor: torch.Tensor) -> str:
    """Shape and dtype, for error messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_source(source: str, *, option: str, allow_self: bool = False, also: Iterable[str] = ()) -> None:
    """Refuse a ``source`` that names neither a known data set nor an existing file of a known kind.

    ``also`` are other names to propose.
    """
    names = [*HUB_DATASETS, *([SELF] if allow_self else [])]
    if source in names:
        return
    if os.path.isfile(source) and source.endswith(FILE_SUFFIXES):
        return
    names += also
    problem = "no such file" if not os.path.exists(source) else "not a file of a known kind"
    raise InvalidRequest(
        f"{option} {source!r}: {problem}; use one of {', '.join(names)} or a file ending in {', '.join(FILE_SUFFIXES)}"
    )


def read_text(source: str, *, evaluation: bool = False) -> str:
    """The text of a data set or local file; ``evaluation`` selects the data set's evaluation split."""
    if source in HUB_DATASETS:
        return _hub_text(HUB_DATASETS[source], evaluation)
    return _file_text(Path(source))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids (n,) of ``text`` without special tokens."""
    # verbose=False: a text longer than the model's context is cut into windows later, not fed whole.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def first_windows(ids: torch.Tensor, count: int, length: int, stride: int | None = None, *, what: str) -> TokenWindows:
    """The first ``count`` windows of ``length`` tokens; refuses when there are too few tokens.

    Each begins ``stride`` tokens after the one before; without, where that one ends.
    """
    stride = stride or length
    needed = (count - 1) * stride + length
    _require(len(ids), needed, f"{what}: {count} windows of {length} tokens")
    return TokenWindows(ids[:needed].unfold(0, length, stride))


def random_windows(
    ids: torch.Tensor, count: int, length: int, seed: int, *, what: str, reserved: int = 0
) -> TokenWindows:
    """``count`` different windows of a text cut into consecutive windows of ``length``, drawn with ``seed``.

    ``reserved`` is the number of the text's tokens that were set aside before, for the message of a refusal.
    """
    held_out = f" and {reserved} held-out tokens" if reserved else ""
    _require(len(ids), count * length, f"{what}: {count} samples of {length} tokens{held_out}", reserved)
    return _windows(ids, _order(ids, length, seed)[:count], length)


def other_windows(ids: torch.Tensor, count: int, length: int, seed: int, *, but: int) -> TokenWindows | None:
    """At most ``count`` windows other than the first ``but`` that :func:`random_windows` draws; None where all are."""
    chosen = _order(ids, length, seed)[but : but + count]
    return _windows(ids, chosen, length) if len(chosen) else None


def _order(ids: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    return torch.randperm(len(ids) // length, generator=torch.Generator().manual_seed(seed))


def _windows(ids: torch.Tensor, chosen: torch.Tensor, length: int) -> TokenWindows:
    available = len(ids) // length
    return TokenWindows(ids[: available * length].view(available, length)[chosen].contiguous())


def split_held_out(ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut ``ids`` into a calibration part and a held-out tail of a tenth, at least one window of ``length``."""
    held_out = max(length, int(len(ids) * HELD_OUT_SHARE))
    cut = max(0, len(ids) - held_out)
    return ids[:cut], ids[cut:]


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
) -> TokenWindows:
    """``count`` windows of ``length`` tokens written by ``model`` itself, sampled at temperature 1.

    A window is a row of pieces of at most :data:`PIECE` tokens, each begun with a token drawn uniformly from the
    vocabulary: short pieces are sampled in a fraction of the time, many at once, and are on more subjects. An
    end-of-text token does not end a piece. The model's own generation settings are left out of it.
    """
    pieces = math.ceil(length / PIECE)
    size, first, ordinary = math.ceil(length / pieces), _first_tokens(tokenizer), _ordinary_tokens(tokenizer)
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=size - 1, pad_token_id=int(ordinary[0]))
    own, model.generation_config = model.generation_config, settings
    device, rows = model.device, []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            starts = ordinary[torch.randint(len(ordinary), (count * pieces, 1))]
            for batch in starts.split(SAMPLED_AT_ONCE):
                prompt = torch.cat((first.expand(len(batch), -1), batch), dim=1).to(device)
                sampled = model.generate(prompt, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]
                rows.append(sampled[:, len(first) :].cpu())
    except RuntimeError as error:  # how torch.multinomial reports NaN
        raise NumericalError(f"sampling text from the model failed: {' '.join(str(error).split())}") from error
    finally:
        model.generation_config = own
    return TokenWindows(torch.cat(rows).view(count, pieces * size)[:, :length].contiguous())


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The beginning-of-text token (1,) where the tokenizer puts it before every text; else none, (0,)."""
    ids = tokenizer("")["input_ids"]
    known = tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]
    return torch.tensor(ids[:1] if known else [], dtype=torch.int64)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All tokens but special ones: (n,), ascending."""
    return torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))


def check_length(length: int, config: PreTrainedConfig, what: str | None = None) -> None:
    """Refuse windows longer than the model's positions; ``what`` says where they come from."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        what = what or f"--sequence-length {length}"
        raise InvalidRequest(f"{what} exceeds the model's {limit} positions; use at most that")


def _require(available: int, needed: int, purpose: str, reserved: int = 0) -> None:
    if available < needed:
        raise InvalidRequest(
            f"{purpose} need {needed + reserved:,} tokens, but the text has {available + reserved:,}; "
            "give a longer text or fewer or shorter samples"
        )


def _hub_text(dataset: HubDataset, evaluation: bool) -> str:
    from datasets import load_dataset  # a slow import that local files do not need

    split = dataset.evaluation_split if evaluation else dataset.calibration_split
    options: dict[str, Any] = {"split": split, "revision": dataset.revision}
    if dataset.files:
        options["data_files"] = {split: dataset.files[split]}
    try:
        if dataset.rows is None:
            rows = load_dataset(dataset.path, dataset.name, **options)
        else:
            rows = load_dataset(dataset.path, dataset.name, streaming=True, **options)
            following = evaluation and split == dataset.calibration_split
            rows = list((rows.skip(dataset.rows) if following else rows).take(dataset.rows))
    except Exception as error:
        message = " ".join(str(error).split())
        instead = "a file" if evaluation else "files and text that the model writes: --calibration FILE,self"
        raise InvalidRequest(
            f"data set {dataset.path} could not be loaded from the hub: {message}; without it, give {instead}"
        ) from error
    return dataset.separator.join(row_text(row) for row in rows)


def _file_text(path: Path) -> str:
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
            return "\n\n".join(row_text(row) for row in rows)
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        text = raw.decode("utf-8")
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            return "\n\n".join(row_text(json.loads(line)) for line in text.split("\n") if line.strip())
        return text
    except InvalidRequest:
        raise
    except Exception as error:  # a damaged archive, broken JSON, another encoding, ...
        message = " ".join(str(error).split())
        raise InvalidRequest(f"{path} could not be read as text: {message}") from error


def row_text(row: Any) -> str:
    """The text of one record.

    That is its ``text``, ``sentence`` or ``content`` field, an instruction in Alpaca's prompt form, the ``messages`` of
    a chat, or the ``passage`` or ``context`` that a task asks about.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        for field in ("text", "sentence", "content"):
            if isinstance(row.get(field), str):
                return str(row[field])
        if "instruction" in row and "output" in row:
            given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
            return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n{row['output']}"
        messages = row.get("messages")
        if isinstance(messages, list) and all(isinstance(each, Mapping) and "content" in each for each in messages):
            return "\n\n".join(f"{str(each.get('role')).capitalize()}: {each['content']}" for each in messages)
        for field in ("passage", "context"):
            if isinstance(row.get(field), str) and "instruction" not in row:
                return str(row[field])
    raise InvalidRequest(
        "a record needs a 'text', 'sentence', 'content', 'messages', 'passage' or 'context' field, or Alpaca's fields: "
        f"{str(row)[:80]!r}"
    )
