"""Joining safetensors files into a checkpoint's shards, byte by byte: no tensor is brought into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from .stored import DTYPES, INDEX_FILE, WEIGHTS_FILE, Slice, slices

SHARD_BYTES = 5_000_000_000
_CHUNK = 1 << 24


def write_shards(sources: Iterable[tuple[Path, str]], directory: Path, limit: int = SHARD_BYTES) -> None:
    """Write the tensors of ``sources``, files with a prefix for their tensors' names, as a checkpoint's weights.

    One ``model.safetensors``, or where that would exceed ``limit`` bytes, shards and their index. A file's tensors
    stay together unless they alone exceed it.
    """
    shards: list[dict[str, Slice]] = [{}]
    for file, prefix in sources:
        tensors = {prefix + name: part for name, part in slices(file).items()}
        if shards[-1] and _total(shards[-1]) + _total(tensors) > limit:
            shards.append({})
        shards[-1] |= tensors
    if len(shards) == 1:
        _write(shards[0], directory / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": sum(map(_total, shards))}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _total(tensors: dict[str, Slice]) -> int:
    return sum(part.bytes for part in tensors.values())


def _write(tensors: dict[str, Slice], path: Path) -> None:
    # Wide items first, so that every tensor begins at a multiple of its item's size, as in any safetensors file.
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        part = tensors[name]
        header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [offset, offset + part.bytes]}
        offset += part.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as target:
        target.write(len(encoded).to_bytes(8, "little"))
        target.write(encoded)
        for name in order:
            with open(tensors[name].file, "rb") as source:
                source.seek(tensors[name].offset)
                _copy(source, target, tensors[name].bytes)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, _CHUNK))
        if not chunk:
            raise OSError("a file is shorter than its header says")
        target.write(chunk)
        count -= len(chunk)
