"""A profile and the statistics of all layers, kept until ranks are chosen: in memory, or in a directory.

In the directory: one safetensors file for every layer, and ``profile.json``, written last, with the hashes of
the others. So a directory with it is whole.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from .decompositions import Elimination
from .errors import CheckpointError
from .files import replace_file, sha256_of, storing
from .results import Profile
from .statistics import LayerStatistics, panels

PROFILE_FILE = "profile.json"
#: What else a layer's file holds; names of sums have a panel's number after a dot, or none.
_TOKENS, _RESOLUTION, _EXPERT_TOKENS, _ROWS = "tokens", "resolution", "expert_tokens", "mlp_rows"
#: Of eliminations every field, one line for each: "elimination.order" and so on.
_ELIMINATION = "elimination"


def packed(statistics: LayerStatistics) -> dict[str, torch.Tensor]:
    """``statistics`` as tensors on the host, in the precision they have: float32 where products were.

    Of symmetric sums C (..., n, n) the column panels on and above the diagonal, about half of it.
    """
    dtype = torch.float64 if statistics.resolution < torch.finfo(torch.float32).eps else torch.float32
    result = {
        _TOKENS: torch.tensor(statistics.tokens),
        _RESOLUTION: torch.tensor(statistics.resolution, dtype=torch.float64),
    }
    if statistics.expert_tokens is not None:
        result[_EXPERT_TOKENS] = torch.tensor(statistics.expert_tokens)
    if statistics.rows is not None:
        result[_ROWS] = statistics.rows.cpu()
    for field in fields(Elimination) if statistics.eliminations else ():
        every = [getattr(one, field.name) for one in statistics.eliminations]
        result[f"{_ELIMINATION}.{field.name}"] = torch.stack(every).cpu()
    for name, total in statistics.sums.items():
        if total.dim() < 2 or total.shape[-1] != total.shape[-2] or not torch.equal(total, total.mT):
            result[name] = total.to("cpu", dtype)
            continue
        for number, panel in enumerate(panels(total.shape[-1])):
            result[f"{name}.{number}"] = total[..., panel, panel.start :].to("cpu", dtype).contiguous()
    return result


def unpacked(tensors: dict[str, torch.Tensor]) -> LayerStatistics:
    """The statistics that :func:`packed` made ``tensors`` of, sums in float64, on their device."""
    sums: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        whole, _, number = name.partition(".")
        if whole in (_TOKENS, _RESOLUTION, _EXPERT_TOKENS, _ROWS, _ELIMINATION):
            continue
        if not number:
            sums[whole] = tensor.double()
            continue
        if whole not in sums:
            n = tensors[f"{whole}.0"].shape[-1]
            sums[whole] = torch.empty(*tensor.shape[:-2], n, n, dtype=torch.float64, device=tensor.device)
        panel = panels(sums[whole].shape[-1])[int(number)]
        sums[whole][..., panel, panel.start :] = tensor
        sums[whole][..., panel.start :, panel] = tensor.mT
    routed = tuple(tensors[_EXPERT_TOKENS].tolist()) if _EXPERT_TOKENS in tensors else None
    tokens, resolution, rows = int(tensors[_TOKENS]), float(tensors[_RESOLUTION]), tensors.get(_ROWS)
    named = [tensors[name] for field in fields(Elimination) if (name := f"{_ELIMINATION}.{field.name}") in tensors]
    eliminations = tuple(Elimination(*one) for one in zip(*named, strict=True))
    return LayerStatistics(cast(Any, sums), tokens, resolution, routed, rows, eliminations=eliminations)


class Kept:
    """In memory; ``profile`` is None until it is finished."""

    def __init__(self) -> None:
        self.profile: Profile | None = None
        self._layers: dict[int, dict[str, torch.Tensor]] = {}

    def put(self, index: int, statistics: LayerStatistics) -> None:
        """Keep the statistics of layer ``index``."""
        self._layers[index] = packed(statistics)

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Those of layer ``index``, as :func:`packed` made them."""
        return self._layers[index]

    def finish(self, profile: Profile) -> None:
        """All layers are there, and this is what they are worth."""
        self.profile = profile


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal[2] = 2
    profile: Profile
    layers: list[_File]


class KeptOnDisk(Kept):
    """In ``directory``, where an earlier run may have finished it."""

    def __init__(self, directory: Path, *, whole: bool = True) -> None:
        """Without ``whole`` what is known of the layers' files is not compared with them."""
        super().__init__()
        self._directory = directory
        self._files: dict[int, _File] = {}
        try:
            content = _Content.model_validate_json((directory / PROFILE_FILE).read_bytes())
        except (OSError, ValidationError):
            return
        self._files = dict(enumerate(content.layers))
        if not whole or all(self._intact(index) for index in self._files):
            self.profile = content.profile

    def put(self, index: int, statistics: LayerStatistics) -> None:
        file = self._file(index)
        with storing(str(self._directory)):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, lambda path: save_file(packed(statistics), path))
            self._files[index] = _File(bytes=file.stat().st_size, sha256=sha256_of(file))

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load_file(self._file(index))
        return tensors

    def finish(self, profile: Profile) -> None:
        files = [self._files[index] for index in range(len(profile.layers))]
        text = _Content(profile=profile, layers=files).model_dump_json(indent=1)
        with storing(str(self._directory)):
            replace_file(self._directory / PROFILE_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        super().finish(profile)

    def _file(self, index: int) -> Path:
        return self._directory / "statistics" / f"{index:05d}.safetensors"

    def _intact(self, index: int) -> bool:
        file, record = self._file(index), self._files[index]
        return file.is_file() and file.stat().st_size == record.bytes and sha256_of(file) == record.sha256


def open_kept(directory: Path, *, whole: bool = True) -> KeptOnDisk:
    """The finished profile in ``directory``; raises :class:`CheckpointError` where it is missing or damaged.

    Without ``whole`` the layers' statistics, which can be many gigabytes, are not looked at.
    """
    kept = KeptOnDisk(directory, whole=whole)
    if kept.profile is None:
        raise CheckpointError(
            f"{str(directory)!r} holds no profile, or a damaged one, or one of another version of modegpt; "
            "make it with modegpt profile"
        )
    return kept
