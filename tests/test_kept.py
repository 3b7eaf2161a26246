"""Kept statistics come back as they were, and a compression from them is the one that calibrates again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from family_table import BY_NAME
from helpers import tiny_llama
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows
from modegpt.decompositions import elimination, greedy_elimination, regularised
from modegpt.engine import Engine
from modegpt.errors import CheckpointError
from modegpt.kept import PROFILE_FILE, KeptOnDisk, open_kept, packed, unpacked
from modegpt.layered import resident
from modegpt.methods import METHODS
from modegpt.results import ModuleProfile, Profile
from modegpt.statistics import LayerStatistics

PROFILE = Profile([{"mlp": ModuleProfile(4, [2.0, 1.0, 0.5, 0.1, 0.0], 2, 0.25)}] * 2, 12.5)


def statistics(n: int, *, single: bool, experts: tuple[int, ...] | None = None) -> LayerStatistics:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(3, 50, n, generator=draw, dtype=torch.float64)
    if single:
        x = x.float().double()
    gram = x.mT @ x
    gram = (gram + gram.mT) / 2
    resolution = float(torch.finfo(torch.float32 if single else torch.float64).eps)
    return LayerStatistics({"mlp": gram[0], "query": gram, "key": gram[:, :2, :]}, 50, resolution, experts)  # type: ignore


@pytest.mark.parametrize("n", [5, 384, 385, 900])
@pytest.mark.parametrize("single", [True, False])
def test_statistics_come_back_in_their_own_precision(n: int, single: bool) -> None:
    rows = torch.randn(n, n, dtype=torch.float32 if single else torch.float64)
    given = replace(statistics(n, single=single, experts=(3, 0, 7)), rows=rows)
    found = unpacked(packed(given))
    assert (found.tokens, found.resolution, found.expert_tokens) == (50, given.resolution, (3, 0, 7))
    assert found.rows is not None
    assert found.rows.dtype == rows.dtype
    assert torch.equal(found.rows, rows)
    assert found.sums.keys() == given.sums.keys()
    for name, total in given.sums.items():
        expected = total.float().double() if single else total
        assert torch.equal(found.sums[name], expected)


def test_symmetric_sums_take_little_more_than_half() -> None:
    given = statistics(2000, single=True)
    held = sum(tensor.nbytes for name, tensor in packed(given).items() if name.startswith("mlp"))
    assert held < 0.6 * 4 * 2000**2


def test_a_directory_is_a_profile_once_it_is_finished_and_as_long_as_it_is_whole(tmp_path: Path) -> None:
    kept = KeptOnDisk(tmp_path)
    with pytest.raises(CheckpointError, match="no profile"):
        open_kept(tmp_path)
    for index in range(2):
        kept.put(index, statistics(6 + index, single=True))
    assert KeptOnDisk(tmp_path).profile is None
    kept.finish(PROFILE)
    found = open_kept(tmp_path)
    assert found.profile == PROFILE
    assert torch.equal(unpacked(found.tensors(1))["mlp"], unpacked(kept.tensors(1))["mlp"])
    file = next((tmp_path / "statistics").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        open_kept(tmp_path)
    assert open_kept(tmp_path, whole=False).profile == PROFILE
    file.write_bytes(content)
    (tmp_path / PROFILE_FILE).write_text((tmp_path / PROFILE_FILE).read_text()[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        open_kept(tmp_path)


@pytest.mark.parametrize("method", ["greedy", "modegpt"])
def test_compression_from_kept_statistics_is_that_which_calibrates_again(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    windows = TokenWindows(torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(1)))
    config = CompressionConfig.validated(ratio=0.3, method=method, allocation="sensitivity", statistics="dense")
    engine = Engine(resident(model), windows, 3)
    with engine.active():
        profile = engine.profile(config)
        with patch.object(Engine, "calibrate", side_effect=AssertionError("the statistics were kept")):
            from_memory = engine.run(config)
    on_disk = KeptOnDisk(tmp_path)
    for index in range(len(profile.layers)):
        on_disk.put(index, unpacked(engine.kept.tensors(index)))
    on_disk.finish(profile)
    without_text = Engine(resident(model), None, 3, kept=open_kept(tmp_path))
    with without_text.active():
        from_disk = without_text.run(config)
    again = Engine(resident(model), windows, 3)
    with again.active():
        choice = again.choose_ranks(config, profile=profile)
        fresh = again.compress(METHODS[method].from_config(config), choice, sequential=False)
    assert from_memory.choice.ranks == from_disk.choice.ranks == fresh.choice.ranks
    for name, tensor in from_memory.model.state_dict().items():
        assert torch.equal(tensor, from_disk.model.state_dict()[name])
        torch.testing.assert_close(tensor, fresh.model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_eliminations_come_back_and_are_known_again_by_their_matrix() -> None:
    given = statistics(40, single=True)
    output = torch.randn(40, 8, dtype=torch.float64)
    matrix = regularised(given["mlp"], 1e-2)
    every = (greedy_elimination(matrix, output), greedy_elimination(2 * matrix, output))
    found = unpacked(packed(replace(given, eliminations=every)))
    assert found.sums.keys() == given.sums.keys()
    for mine, theirs in zip(every, found.eliminations, strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in vars(mine))
    rounded = regularised(found["mlp"], 1e-2)
    assert [one.is_of(rounded) for one in found.eliminations] == [True, False]
    assert not found.eliminations[0].is_of(regularised(found["mlp"], 1.1e-2))
    assert not found.eliminations[0].is_of(rounded[:-1, :-1])
    assert unpacked(packed(given)).eliminations == ()


@pytest.mark.parametrize("method", ["greedy", "obc"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_channels_are_eliminated_once(method: str, family: str) -> None:
    """The choice of ranks and the compression share it; another ridge has one of its own."""
    model = BY_NAME[family].build()
    windows = TokenWindows(torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(1)))
    options = {"ratio": 0.3, "method": method, "allocation": "sensitivity", "statistics": "dense"}
    config = CompressionConfig.validated(**options, modules=("mlp",))
    eliminate, sizes = elimination.greedy_elimination, []

    def counted(matrix: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if named["width"] == 1:  # not of heads
            sizes.append(len(matrix))
        return eliminate(matrix, *arguments, **named)

    with patch.object(elimination, "greedy_elimination", counted):
        engine = Engine(resident(model), windows, 3)
        with engine.active():
            once = engine.run(config)
            modules = model.config.num_hidden_layers * getattr(model.config, "num_local_experts", 1)
            assert len(sizes) == modules
            with patch.object(elimination.Elimination, "is_of", return_value=False):
                twice = engine.run(config)
            assert len(sizes) == 2 * modules
            engine.run(config.model_copy(update={"ridge": 2 * config.ridge}))
            assert len(sizes) == 3 * modules
    for name, tensor in once.model.state_dict().items():
        torch.testing.assert_close(tensor, twice.model.state_dict()[name], rtol=1e-4, atol=1e-6)
