"""Joining safetensors files into a checkpoint's shards, byte by byte: no tensor is brought into memory.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
offsets of every tensor), and the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .stored import INDEX_FILE, WEIGHTS_FILE

SHARD_BYTES = 5_000_000_000
_CHUNK = 1 << 24
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class _Entry:
    """One tensor of one of the joined files."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    bytes: int


def write_shards(sources: Iterable[tuple[Path, str]], directory: Path, limit: int = SHARD_BYTES) -> None:
    """Write the tensors of ``sources``, files with a prefix for their tensors' names, as a checkpoint's weights.

    One ``model.safetensors``, or where that would exceed ``limit`` bytes, shards and their index. A file's tensors
    stay together unless they alone exceed it.
    """
    shards: list[list[_Entry]] = [[]]
    for file, prefix in sources:
        entries = list(_entries(file, prefix))
        if shards[-1] and _total(shards[-1]) + _total(entries) > limit:
            shards.append([])
        shards[-1] += entries
    if len(shards) == 1:
        _write(shards[0], directory / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(entries, directory / name)
        weight_map |= {entry.name: name for entry in entries}
    index = {"metadata": {"total_size": sum(map(_total, shards))}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _entries(file: Path, prefix: str) -> Iterator[_Entry]:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: Mapping[str, Any] = json.loads(opened.read(length))
    for name, facts in header.items():
        if name != "__metadata__":
            start, stop = facts["data_offsets"]
            yield _Entry(prefix + name, facts["dtype"], facts["shape"], file, 8 + length + start, stop - start)


def _total(entries: Iterable[_Entry]) -> int:
    return sum(entry.bytes for entry in entries)


def _write(entries: list[_Entry], path: Path) -> None:
    # Wide items first, so that every tensor begins at a multiple of its item's size, as in any safetensors file.
    entries = sorted(entries, key=lambda entry: (-_ITEM_BYTES[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as target:
        target.write(len(encoded).to_bytes(8, "little"))
        target.write(encoded)
        for entry in entries:
            with open(entry.file, "rb") as source:
                source.seek(entry.start)
                _copy(source, target, entry.bytes)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, _CHUNK))
        target.write(chunk)
        count -= len(chunk)
