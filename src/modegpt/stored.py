"""The tensors of a checkpoint on disk, read a few at a time: safetensors directories and GGUF files.

Nothing stays mapped or cached between two reads, so memory holds only what the caller keeps.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from .errors import InvalidRequest

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
#: Others store some tensors otherwise than Transformers has them.
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SAMPLE_BYTES, _SAMPLES = 4096, 4096


class StoredTensors(ABC):
    """Named tensors in files."""

    files: list[Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    """That of the first floating-point tensor."""

    @abstractmethod
    def read(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Copies of the tensors called ``names``, floating-point ones cast to ``dtype``."""


@dataclass(frozen=True)
class Slice:
    """Where a safetensors file has a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


#: How safetensors files call the dtypes of plain models.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def slices(file: Path) -> dict[str, Slice]:
    """The tensors of a safetensors file, none of which is read.

    The file begins with the length of its header (8 bytes, little-endian) and the header (JSON); the library checks
    that it is whole and consistent.
    """
    with safetensors.safe_open(file, framework="pt"), open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    result = {}
    for name, facts in header.items():
        start, stop = facts["data_offsets"]
        result[name] = Slice(file, facts["dtype"], tuple(facts["shape"]), 8 + length + start, stop - start)
    return result


class SafetensorsDirectory(StoredTensors):
    """A Hugging Face directory's ``model.safetensors``, or its shards by their index.

    Tensors of types that plain models do not have (8 bits and less) do not count. Tensors are read, not mapped:
    mapped pages count as this process's memory as long as their file is open.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / INDEX_FILE
        one_file = (directory / WEIGHTS_FILE).is_file() or not index.is_file()
        names = [WEIGHTS_FILE] if one_file else shard_names(index)
        self.files = [directory / name for name in names]
        self._slices: dict[str, Slice] = {}
        for file in self.files:
            if not file.is_file():
                raise InvalidRequest(f"MODEL {str(directory)!r} has no {file.name}; weights must be safetensors files")
            try:
                found = slices(file)
            except Exception as error:
                raise InvalidRequest(f"{file} is not a complete safetensors file: {error}") from error
            self._slices |= {name: part for name, part in found.items() if part.dtype in DTYPES}
        self.shapes = {name: part.shape for name, part in self._slices.items()}
        floating = [DTYPES[part.dtype] for part in self._slices.values()]
        self.dtype = next((dtype for dtype in floating if dtype.is_floating_point), torch.float32)

    def read(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        result = {}
        for name in names:
            part = self._slices[name]
            raw = np.fromfile(part.file, dtype=np.uint8, count=part.bytes, offset=part.offset)
            tensor = torch.from_numpy(raw).view(DTYPES[part.dtype]).view(part.shape)
            result[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return result


class JoinedTensors(StoredTensors):
    """Another reader's tensors, some put together from several: experts stacked, gate and up concatenated."""

    def __init__(self, stored: StoredTensors, names: Iterable[str], aliases: Mapping[str, tuple[str, ...]]) -> None:
        """``names`` are those of the model's state dict; ``aliases`` as :attr:`modegpt.modeling.Family.stored_as`."""
        self._stored, self.files, self.dtype = stored, stored.files, stored.dtype
        self._pieces: dict[str, list[list[str]]] = {}
        shapes = dict(stored.shapes)
        for name in names:
            for ending, patterns in aliases.items():
                stem = name.removesuffix(ending)
                if stem == name or name in stored.shapes:
                    continue
                for place in (stem, stem.partition(".")[2]):  # with and without the base model's name
                    pieces = [self._matches(place + pattern) for pattern in patterns]
                    if all(pieces) and len({len(found) for found in pieces}) == 1:
                        shapes[name] = self._joined_shape(pieces, "*" in patterns[0])
                        self._pieces[name] = pieces
                        break
        self.shapes = shapes
        self._stacked = {name for name in self._pieces if len(shapes[name]) == 3}

    def _matches(self, pattern: str) -> list[str]:
        """The stored names that a pattern stands for, by the number in place of its ``*``."""
        if "*" not in pattern:
            return [pattern] if pattern in self._stored.shapes else []
        found: list[str] = []
        while (name := pattern.replace("*", str(len(found)))) in self._stored.shapes:
            found.append(name)
        return found

    def _joined_shape(self, pieces: list[list[str]], stacked: bool) -> tuple[int, ...]:
        shapes = [self._stored.shapes[found[0]] for found in pieces]
        rows = sum(shape[0] for shape in shapes)
        return (len(pieces[0]), rows, *shapes[0][1:]) if stacked else (rows, *shapes[0][1:])

    def read(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors ``names``, put together from their pieces."""
        result: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in self._pieces:
                result |= self._stored.read([name], dtype, device)
                continue
            # Each expert goes to its place at once: the joined tensor is the only copy of its size.
            joined = torch.empty(self.shapes[name], dtype=dtype, device=device)
            for number, parts in enumerate(zip(*self._pieces[name], strict=True)):
                place = joined[number] if name in self._stacked else joined
                torch.cat(list(self._stored.read(parts, dtype, device).values()), out=place)
            result[name] = joined
        return result


@dataclass(frozen=True)
class _Block:
    """Where a GGUF tensor lies, and how it is encoded."""

    offset: int
    bytes: int
    encoding: Any


class GGUFFile(StoredTensors):
    """A GGUF file's tensors, dequantised, under the names that Transformers gives them."""

    def __init__(self, path: Path, names: Iterable[str], config: Any) -> None:
        """``names`` are those of the model's state dict: GGUF has a vocabulary of its own."""
        import gguf

        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if architecture not in GGUF_ARCHITECTURES:
            raise InvalidRequest(
                f"GGUF files of architecture {architecture!r} are not supported, only {', '.join(GGUF_ARCHITECTURES)}; "
                "use the model's safetensors files"
            )
        table = gguf.get_tensor_name_map(
            next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture),
            config.num_hidden_layers,
        )
        self._path, self.files, self.dtype = path, [path], torch.float32
        self._blocks: dict[str, _Block] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            stem, _, kind = name.rpartition(".")
            tensor = tensors.get(f"{table.get_name(stem)}.{kind}")
            if tensor is not None:
                shapes[name] = tuple(int(size) for size in reversed(tensor.shape))
                self._blocks[name] = _Block(int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type)
        self.shapes = shapes
        self._heads = {}
        if architecture == "llama":  # its converter reorders the rotary channels of queries and keys
            self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def read(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors ``names``, dequantised."""
        import gguf

        result = {}
        for name in names:
            block = self._blocks[name]
            raw = np.fromfile(self._path, dtype=np.uint8, count=block.bytes, offset=block.offset)
            shape = self.shapes[name]
            values = gguf.dequantize(raw.reshape(gguf.quant_shape_to_byte_shape(shape, block.encoding)), block.encoding)
            tensor = torch.from_numpy(values.astype(np.float32, copy=False)).view(shape)
            heads = self._heads.get(name.split(".")[-2])
            if heads is not None:
                tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(shape)
            result[name] = tensor.to(device, dtype)
        return result


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of every file's size and of blocks spread evenly over it.

    Reading all of a large model for this would take longer than it is worth: another model, revision or
    fine-tuning differs everywhere.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for number in range(_SAMPLES):
                file.seek(size * number // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def shard_names(index: Path) -> list[str]:
    """The files that an index names; refuses one that is not an index."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise TypeError("shard names must be plain file names")
        return names
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"{index} is not a safetensors index: {error}") from error
