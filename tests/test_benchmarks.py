"""What the benchmarks compute by themselves: rows that are resumed, tables, texts, rounded weights."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import modegpt
from helpers import random_text, tiny_llama, token_windows
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows, first_windows, read_text, split_held_out, tokenize
from modegpt.engine import compress_model
from modegpt.evaluation import perplexity
from modegpt.exports.gguf_tokenizer import tokenizer_fields
from modegpt.exports.plain import PlainDecoder
from modegpt.mixture import Cut, Mixture, read_mixture
from modegpt.report import TextFacts, build_report
from modegpt.results import ModuleProfile, Profile
from modegpt.sources import ModelSource

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Any:
    """Imports a benchmark, which lies beside the package, not in it."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def quality(load: Any) -> ModuleType:
    return load("quality")


@pytest.fixture
def texts(load: Any) -> ModuleType:
    return load("benchmark_texts")


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture
def model(tiny_checkpoint: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


# Quality: rows


OLD = {
    "method": "greedy",
    "allocation": "uniform",
    "temperature": "auto",
    "statistics": "dense",
    "ratio": 0.1,
    "parameters": 1_000_000,
    "perplexity": 21.0,
    "dense_perplexity": 19.0,
}
NEW = OLD | {
    "ratio": 0.3,
    "perplexity": 30.0,
    "dense_forward_passes": 1.5,
    "texts": {"ptb": {"compressed": 80.0, "dense": 50.0}},
}


def test_rows_without_some_of_the_texts_or_without_their_model_are_measured_again(quality: ModuleType) -> None:
    wanted = [quality.setting_of(("greedy", "dense", "uniform", "auto"), ratio) for ratio in (0.1, 0.3)]

    def asked(*texts: str, there: Any = lambda setting: True) -> list[float]:
        return [row["ratio"] for row in quality.missing_settings([OLD, NEW], wanted, texts, there)]

    assert asked() == []
    assert asked("ptb") == [0.1]
    assert asked("ptb", "alpaca") == [0.1, 0.3]
    assert asked(there=lambda setting: setting["ratio"] == 0.3) == [0.1]
    assert list(quality.missing_settings([], wanted, [], lambda setting: True)) == wanted


def test_a_model_is_there_if_it_was_made_so(quality: ModuleType, model: LlamaForCausalLM, tmp_path: Path) -> None:
    setting, windows = quality.setting_of(("modegpt", "dense", "uniform", "auto"), 0.3), token_windows(8, 32)
    facts = TextFacts.of("text", windows)
    there = partial(quality.is_there, tmp_path, facts)
    assert not there(setting)
    config = CompressionConfig.validated(**setting)
    result = compress_model(model, windows, config)
    report = build_report(model, result, config, facts, command="")
    modegpt.save(result.model, tmp_path / quality.checkpoint_name(setting), report=report)
    assert there(setting)
    assert not there(setting | {"ratio": 0.2})
    assert not there(setting | {"allocation": "block-influence"}), "whose model would have the same name"
    assert not quality.is_there(tmp_path, TextFacts.of("text", token_windows(8, 16)), setting)
    assert quality.is_there(None, facts, setting | {"ratio": 0.2})


def test_rows_are_chosen_by_the_beginning_of_their_names(quality: ModuleType) -> None:
    assert quality.settings_named("") == list(quality.SETTINGS)
    assert {setting[0] for setting in quality.settings_named("modegpt")} == {"modegpt"}
    papers = quality.settings_named("modegpt/dense/block-influence/0.03")
    assert papers == [("modegpt", "dense", "block-influence", 0.03)]
    assert quality.settings_named("svd") == [("svd", "dense", "uniform", "auto")], "and not those of svd-llm"


def test_a_row_measured_again_takes_the_place_of_the_old_one(quality: ModuleType) -> None:
    rows = [dict(NEW), dict(OLD)]
    setting = {name: OLD[name] for name in ("method", "allocation", "temperature", "statistics", "ratio")}
    quality.keep(rows, setting, OLD | {"perplexity": 20.5})
    assert [row["perplexity"] for row in rows] == [20.5, 30.0]
    quality.keep(rows, setting | {"ratio": 0.5}, OLD | {"ratio": 0.5})
    assert [row["ratio"] for row in rows] == [0.1, 0.3, 0.5]
    first = dict(zip(quality.KINDS, quality.SETTINGS[0], strict=True)) | {"ratio": 0.2}
    quality.keep(rows, first, OLD | first)
    assert [row["ratio"] for row in rows] == [0.2, 0.1, 0.3, 0.5], "in the order of the settings"


@pytest.fixture
def head(quality: ModuleType, texts: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "model").write_bytes(b"weights")
    words = ["--train", "a/train.txt", "--test", "b/test.txt", "--texts", "ptb=c/ptb.txt", "--samples", "2"]
    arguments = texts.parser_of_texts("", tmp_path / "out").parse_args([*words, "--model", str(tmp_path / "model")])
    windows = TokenWindows(torch.arange(8).view(2, 4))
    return quality.header(arguments, TextFacts.of("train.txt", windows), {"test": windows, "ptb": windows})


def test_a_file_of_its_own_says_which_rows_it_has(quality: ModuleType, tmp_path: Path) -> None:
    found = quality.rows_of([OLD, NEW], tmp_path / "own.json")
    assert found == " --rows greedy/dense/uniform/auto --ratios 0.1 0.3 --output own.json"
    main = quality.RESULTS / ".." / "results" / "quality.json"
    assert quality.rows_of([OLD, NEW], main) == "", "several runs fill it"


@pytest.mark.parametrize("changed", ["model_sha256", "calibration", "test", "ptb"])
def test_rows_of_another_run_are_dropped_and_that_is_said(
    quality: ModuleType, head: Any, tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads(json.dumps(head | {"rows": [OLD]}))
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(old))
    assert quality.previous_rows(path, head) == [OLD]
    if changed == "model_sha256":
        old[changed] = "other"
    else:
        (old["texts"] if changed == "ptb" else old)[changed]["sha256"] = "other"
    path.write_text(json.dumps(old))
    assert capsys.readouterr().out == ""
    assert quality.previous_rows(path, head) == []
    assert capsys.readouterr().out == f"{path}: 1 rows are dropped, of another {changed}\n"
    assert quality.previous_rows(tmp_path / "other.json", head) == []


def test_files_are_named_and_not_located(head: Any) -> None:
    assert head["command"].endswith("--train train.txt --test test.txt --texts ptb=ptb.txt --samples 2")
    assert head["texts"]["ptb"]["source"] == "ptb.txt"


def test_the_tables_have_old_and_new_rows(quality: ModuleType, head: Any, tmp_path: Path) -> None:
    results = head | {"dense_perplexity": 19.0, "rows": [OLD, NEW]}
    quality.write(results, tmp_path / "quality.json")
    parts = (tmp_path / "quality.md").read_text().split("\n\n")
    tables = [part.strip().splitlines()[-1] for part in parts if part.startswith("|")]
    assert tables == [
        "| greedy | dense | uniform |  | 21.00 | 30.00 / 80.00 |",
        "| greedy | dense | uniform |  |  | 80.00 |",
        "| greedy | dense | uniform |  | 30.00 | 80.00 |",
        "| greedy | dense | uniform |  | 1.00 | 1.00 |",
        "| greedy | dense | uniform |  |  | 1.50 |",
    ]
    assert "Perplexity on ptb; dense 50.00." in parts
    papers = OLD | {"method": "modegpt", "perplexity": 25.0}
    others = NEW | {"method": "modegpt", "perplexity": 35.0, "texts": {"ptb": {"compressed": 90.0, "dense": 50.0}}}
    quality.write(results | {"rows": [OLD, NEW, papers]}, tmp_path / "more.json")
    relative = (tmp_path / "more.md").read_text().split("\n\n")[3].splitlines()
    share = math.log(OLD["perplexity"] / 19) / math.log(25 / 19)
    assert relative[-2:] == [
        f"| greedy | dense | uniform |  | {share:.2f} |  |",
        "| modegpt | dense | uniform |  | 1.00 |  |",
    ]
    quality.write(results | {"rows": [NEW, others]}, tmp_path / "more.json")
    relative = (tmp_path / "more.md").read_text().split("\n\n")[7].splitlines()
    assert relative[-2].endswith(f" {math.log(80 / 50) / math.log(90 / 50):.2f} |")
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == [OLD, NEW]


def test_columns_of_texts_do_not_depend_on_the_order_of_a_row(quality: ModuleType) -> None:
    """A row of a later run can name its texts in another order than the first."""
    texts = {"ptb": {"compressed": 80.0, "dense": 50.0}, "novels": {"compressed": 90.0, "dense": 40.0}}
    turned = dict(reversed(texts.items()))
    lines = quality.cross([NEW | {"texts": texts}, NEW | {"texts": turned}]).splitlines()
    assert lines[-1] == lines[-2]
    assert lines[-1].endswith("| 80.00 | 90.00 |")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "greedy", "gredy"], "'gredy' begins none of greedy/dense/sensitivity/auto, "),
        (["--rows", "modegpt", "--checkpoints", "models"], "choose one of each method's --rows"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(
    quality: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", "--train", "a", "--test", "b", *options])
    with pytest.raises(SystemExit) as refusal:
        quality.main()
    assert message in f"{refusal.value}{capsys.readouterr().err}"


def test_rows_are_those_of_models_made_alone(
    quality: ModuleType,
    texts: ModuleType,
    wider: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ratios and rows share profiles, scores and statistics; started again, nothing is measured twice."""
    names = ["greedy/dense/sensitivity", "modegpt/dense/block-influence/0.1", "modegpt/sequential/uniform"]
    options = {"--model": wider, "--train": text_file, "--test": text_file, "--texts": f"ptb={text_file}"}
    options |= {"--samples": 6, "--test-samples": 2, "--sequence-length": 32, "--output": tmp_path / "quality.json"}
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["quality.py", *words, "--ratios", "0.2", "0.3", "--rows", *names])
    quality.main()
    written = (tmp_path / "quality.json").read_text()
    rows = json.loads(written)["rows"]
    assert ["/".join(str(row[kind]) for kind in quality.KINDS) for row in rows[::2]] == [
        f"{name}/auto" if name.count("/") == 2 else name for name in names
    ]
    source = ModelSource(str(wider))
    dense, tokenizer = source.model("float32"), source.tokenizer()
    windows, probe, _ = texts.calibration_windows(str(text_file), dense, tokenizer, 6, 32)
    judged = texts.evaluation_texts({"test": str(text_file), "ptb": str(text_file)}, tokenizer, 2, 32)
    for row in rows:
        config = CompressionConfig.validated(**{name: row[name] for name in (*quality.KINDS, "ratio")})
        alone = compress_model(dense, windows, config, probe=probe)
        assert row["perplexity"] == pytest.approx(perplexity(alone.model, judged["test"]), abs=1e-3)
        assert row["texts"]["ptb"]["compressed"] == pytest.approx(perplexity(alone.model, judged["ptb"]), abs=1e-3)
        assert row["texts"]["ptb"]["dense"] == pytest.approx(perplexity(dense, judged["ptb"]), abs=1e-3)
        assert row["parameters"] == alone.model.num_parameters()
        assert row["predicted_loss"] == pytest.approx(alone.choice.loss)
        assert row["dense_forward_passes"] > 1
    monkeypatch.setattr(quality.Run, "compress", None)
    quality.main()
    assert (tmp_path / "quality.json").read_text() == written


@pytest.mark.parametrize("name", ["quality", "mixture"])
def test_the_published_rows_make_the_published_table(quality: ModuleType, tmp_path: Path, name: str) -> None:
    published = json.loads((BENCHMARKS / f"results/{name}.json").read_text())
    with patch.object(quality, "RESULTS", tmp_path):
        quality.write(published, tmp_path / f"{name}.json")
    for suffix in (".json", ".md"):
        made, known = ((path / f"{name}{suffix}").read_text() for path in (tmp_path, BENCHMARKS / "results"))
        assert made == known


# Quality: texts


def test_texts_are_named_files(texts: ModuleType) -> None:
    assert texts.named_files(["a=b.txt", "c=d=e.txt"]) == {"a": "b.txt", "c": "d=e.txt"}
    for wrong in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(SystemExit, match="NAME=FILE"):
            texts.named_files(wrong)


def test_the_lines_of_penn_treebank_are_joined_by_spaces(
    texts: ModuleType, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "ptb.txt"
    path.write_text(" a model of \n keeps the head \n" * 20)
    joined = tokenize(tokenizer, " ".join(["a model of", "keeps the head"] * 20))
    for name, expected in (("ptb", joined), ("other", tokenize(tokenizer, path.read_text()))):
        windows = texts.evaluation_texts({name: str(path)}, tokenizer, 2, 16)[name]
        assert windows.ids.flatten().tolist() == expected[:32].tolist()


def test_alpaca_is_measured_on_what_a_mixture_does_not_calibrate_on(
    texts: ModuleType, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "alpaca.jsonl.gz"
    rows = [{"instruction": random_text(1, seed=n), "output": random_text(1, seed=-n)} for n in range(1, 60)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    windows = texts.evaluation_texts({"alpaca": str(path)}, tokenizer, 5, 16)["alpaca"]
    ids = tokenize(tokenizer, read_text(str(path)))
    cut = len(ids) - len(ids) // 10
    assert windows.ids.flatten().tolist() == ids[cut : cut + 80].tolist()
    count = cut // 16 - 1  # all but one of those that there are
    train, _, facts = texts.calibration_windows(f"{path}:{count},self:1", model, tokenizer, count + 1, 16)
    assert facts.mixture == {"alpaca.jsonl.gz": count, "self": 1}
    assert facts.source == f"alpaca.jsonl.gz:{count / (count + 1):.4g},self:{1 / (count + 1):.4g}"
    calibrated = {tuple(window) for window in ids[: cut // 16 * 16].view(-1, 16).tolist()}
    assert sum(tuple(window) in calibrated for window in train.ids.tolist()) == count


def test_one_text_calibrates_with_its_first_windows(
    texts: ModuleType, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, text_file: Path
) -> None:
    train, probe, facts = texts.calibration_windows(str(text_file), model, tokenizer, 4, 32)
    ids = tokenize(tokenizer, text_file.read_text())
    assert train.ids.flatten().tolist() == ids[: 4 * 32].tolist()
    rest = {tuple(window) for window in ids[4 * 32 :][: (len(ids) // 32 - 4) * 32].view(-1, 32).tolist()}
    assert len(probe) == min(len(rest), texts.probe_windows(32))
    assert {tuple(window) for window in probe.ids.tolist()} <= rest
    assert (facts.source, facts.mixture) == (text_file.name, None)


def test_a_mixture_calibrates_as_on_the_command_line(
    texts: ModuleType,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text_file: Path,
    other_text_file: Path,
) -> None:
    train = f"{text_file}:3,{other_text_file}"
    windows, probe, facts = texts.calibration_windows(train, model, tokenizer, 8, 32)
    expected = read_mixture(Mixture.parse(train), tokenizer, Cut(8, 32, 0, held_out=1)).calibration
    assert torch.equal(windows.ids, expected.ids)
    assert probe is not None
    assert facts.mixture == {text_file.name: 6, other_text_file.name: 2}


# Gains


def test_gains_are_those_of_the_solvers_named(
    load: Any,
    tiny_checkpoint: Path,
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing of ours is ``modegpt``, all of ours is ``greedy``, and a second run measures nothing again."""
    gains = load("gains")
    lacking = set(gains.LACKS) - set(gains.SIMPLER)
    steps = [step for step in gains.STEPS if step[2] == "uniform" or lacking & set(step[0])]
    monkeypatch.setattr(gains, "STEPS", steps)
    options = {"--train": text_file, "--test": other_text_file, "--model": tiny_checkpoint, "--samples": 8}
    options |= {"--test-samples": 2, "--sequence-length": 64, "--output": tmp_path / "gains.json", "--ratios": 0.3}
    monkeypatch.setattr(sys, "argv", ["gains.py", *(str(word) for option in options.items() for word in option)])
    gains.main()
    written = json.loads((tmp_path / "gains.json").read_text())
    found = {", ".join(row["ours"]): row["perplexity"]["test"] for row in written["rows"]}
    assert len(set(found.values())) == len(found) == 7 + len(lacking)
    for method, ours in (("modegpt", ""), ("greedy", "Type I, Type II, Type III, second fit")):
        model, tokenizer = (kind.from_pretrained(tiny_checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
        train = first_windows(tokenize(tokenizer, text_file.read_text()), 8, 64, what="")
        test = first_windows(tokenize(tokenizer, other_text_file.read_text()), 2, 64, what="")
        config = CompressionConfig.validated(ratio=0.3, method=method, statistics="dense", allocation="uniform")
        assert perplexity(compress_model(model, train, config).model, test) == pytest.approx(found[ours], rel=1e-4)
    text = (tmp_path / "gains.md").read_text()
    loss = math.log(found["Type I"] / written["dense"]["test"])
    assert f"| Type I (ridge 0.01) | uniform | {loss:.3f} |" in text
    capsys.readouterr()
    gains.main()
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "gains.json").read_text()) == written
    sys.argv[-1] = "0.2"  # rows of other ratios stay
    monkeypatch.setattr(gains, "STEPS", gains.STEPS[:1])
    gains.main()
    more = json.loads((tmp_path / "gains.json").read_text())
    assert more["rows"][:-1] == written["rows"]
    assert more["rows"][-1]["ratio"] == 0.2
    assert more["command"].endswith(" --ratios 0.2 0.3")


def test_simpler_profiles_lack_what_they_say(load: Any) -> None:
    """An interplay of c = (5 - 4) / 4^2, and a module without loss at its probed rank, as one with dead channels."""
    gains = load("gains")
    plain, dead = ModuleProfile(2, [2.0, 1.0, 0.0], 1, 4.0), ModuleProfile(2, [2.0, 1e-9, 0.0], 1, 1e-9)
    profile = Profile([{"mlp": plain}, {"mlp": dead}], 10.0, {"mlp": 5.0})
    assert profile.interplay()["mlp"] == pytest.approx(1 / 16)
    assert gains.SIMPLER["losses that add up"](profile).interplay() == {"mlp": 0.0}
    assert profile.losses()[1]["mlp"].tolist() == pytest.approx([8.0, 1e-9, 0.0])
    simpler = gains.SIMPLER["faint losses at their word"](profile)
    assert simpler.losses()[1]["mlp"].tolist() == pytest.approx([2.0, 1e-9, 0.0])
    assert torch.equal(simpler.losses()[0]["mlp"], profile.losses()[0]["mlp"])


# Profiles, quantised files, speed, tasks


def test_times_of_compressions_are_told_by_what_is_done(
    load: Any, tiny_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed, path = load("speed"), tmp_path / "speed.json"
    words = (tiny_checkpoint, text_file, "--samples", 8, "--sequence-length", 32, "--repeats", 1, "--output", path)
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, words)])
    speed.main()
    (found,) = json.loads(path.read_text())["rounds"]
    assert list(found) == ["forward", *speed.SETTINGS, speed.PROFILE, speed.FROM_PROFILE]
    rows = {name: row for name, row in found.items() if name != "forward"}
    for row in rows.values():
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], abs=0.01)
        assert row["parts"].get("other", 0.0) == pytest.approx(0.0, abs=0.01), "everything has a name"
    assert [name for name, row in rows.items() if "predictions" in row["parts"]] == [
        "greedy, dense, sensitivity",
        speed.PROFILE,
    ]
    assert "forward: calibrate" not in rows[speed.FROM_PROFILE]["parts"]
    assert all(name in path.with_suffix(".md").read_text() for name in rows)


@pytest.fixture(scope="module")
def wider(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose MLPs have several multiples of 32 channels."""
    directory = tmp_path_factory.mktemp("wider") / "wider"
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(
    load: Any, wider: Path, text_file: Path, other_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """What ``profiles.py`` writes of a tiny model: the results file and the checkpoints."""
    directory = tmp_path_factory.mktemp("profiles")
    options = {"--train": text_file, "--test": other_text_file, "--texts": f"other={text_file}"}
    options |= {"--model": wider, "--samples": 8, "--test-samples": 2, "--sequence-length": 64}
    options |= {"--ratios": 0.2, "--checkpoints": directory, "--output": directory / "profiles.json"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["profiles.py", *(str(word) for option in options.items() for word in option)])
        load("profiles").main()
    return directory / "profiles.json", directory


def test_profiles_are_measured_on_what_they_write(
    checkpoints: tuple[Path, Path], wider: Path, other_text_file: Path
) -> None:
    results = json.loads(checkpoints[0].read_text())
    names = ["full-20", "full-20-by-8", "gguf-20", "stock-20"]
    for row, name in zip(results["rows"], names, strict=True):
        small = modegpt.load(checkpoints[1] / name)
        windows = first_windows(
            tokenize(AutoTokenizer.from_pretrained(wider), other_text_file.read_text()), 2, 64, what="test"
        )
        assert row["perplexity"]["test"] == pytest.approx(modegpt.perplexity(small, windows), rel=1e-5)
        options = small.compression_report.options
        assert (options["profile"], options["align"]) == (row["profile"], row["align"])
        assert row["parameters"] == small.num_parameters() <= min(row["gguf"], row["stock"])
        if row["profile"] != "full":  # nothing is filled up
            assert row["parameters"] == row[row["profile"]]
    dense = results["dense"]
    assert dense["parameters"] == dense["stock"] == LlamaForCausalLM.from_pretrained(wider).num_parameters()
    table = checkpoints[0].with_suffix(".md").read_text()
    assert f"| gguf | 1 | 20% | {results['rows'][2]['perplexity']['test']:.2f} |" in table
    assert str(checkpoints[1]) not in table + checkpoints[0].read_text()


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-6), ("f16", 1e-3), ("q8_0", 1e-2), ("q4_0", 0.2)])
def test_weights_are_those_of_the_file(
    load: Any, tokenizer: PreTrainedTokenizerBase, checkpoints: tuple[Path, Path], kind: str, most: float
) -> None:
    """Also of a model whose layers are filled up with zeros."""
    fields = tokenizer_fields(tokenizer, len(tokenizer))
    dense = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=90)
    for model in (dense, modegpt.load(checkpoints[1] / "full-20")):
        _, found = load("quantised").rounded(model, kind, fields)
        plain = PlainDecoder(model)
        for index in range(len(plain)):
            for name, wanted in plain.layer(index).items():
                own = found.model.layers[index].get_parameter(name).detach()[tuple(map(slice, wanted.shape))]
                assert float((own - wanted).abs().max() / wanted.abs().max()) < most, name
        ids = token_windows(1, 12).ids
        assert kind != "f32" or torch.allclose(found(ids).logits, model(ids).logits, atol=1e-4)


def test_sizes_and_perplexities_of_rounded_models(
    load: Any,
    checkpoints: tuple[Path, Path],
    wider: Path,
    other_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quantised = load("quantised")
    monkeypatch.setattr(quantised, "KINDS", ("f16", "q8_0"))
    options = {"--compressed": checkpoints[1] / "gguf-20", "--test": other_text_file, "--model": wider}
    options |= {"--test-samples": 2, "--sequence-length": 64, "--output": tmp_path / "quantised.json"}
    monkeypatch.setattr(sys, "argv", ["quantised.py", *(str(word) for option in options.items() for word in option)])
    quantised.main()
    results = json.loads((tmp_path / "quantised.json").read_text())
    assert [(row["model"], row["type"]) for row in results["rows"]] == [
        (model, kind) for model in ("dense", "gguf-20") for kind in ("f16", "q8_0")
    ]
    profiles = json.loads(checkpoints[0].read_text())
    wanted = [profiles["dense"]["perplexity"]["test"], profiles["rows"][2]["perplexity"]["test"]]
    found = [row["perplexity"]["test"] for row in results["rows"] if row["type"] == "f16"]
    assert found == pytest.approx(wanted, rel=1e-2)
    assert found != wanted
    sizes = [row["bytes"] for row in results["rows"]]
    assert sizes[0] > sizes[2]
    assert sizes[0] > sizes[1]
    pairs = (tmp_path / "quantised.md").read_text().split("no larger.")[1].splitlines()[4:6]
    assert [line.split(" | ")[1::3][:2] for line in pairs] == [["f16", "q8_0"], ["q8_0", ""]]
    monkeypatch.setattr(quantised, "KINDS", ("f16", "q4_0"))
    capsys.readouterr()
    quantised.main()
    assert [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()] == ["q4_0", "q4_0"]
    again = json.loads((tmp_path / "quantised.json").read_text())["rows"]
    assert again[:4] == results["rows"]
    assert len(again) == 6
    replaced = with_other_weights(checkpoints[1] / "gguf-20", tmp_path / "gguf-20")
    monkeypatch.setattr(
        sys, "argv", [str(replaced) if word == str(checkpoints[1] / "gguf-20") else word for word in sys.argv]
    )
    quantised.main()
    assert [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()] == ["gguf-20", "gguf-20"]
    changed = json.loads((tmp_path / "quantised.json").read_text())["rows"]
    assert [(row["model"], row["type"]) for row in changed[-2:]] == [("gguf-20", "f16"), ("gguf-20", "q4_0")]
    assert len(changed) == 6


def with_other_weights(checkpoint: Path, copy: Path) -> Path:
    """A ``copy`` of the checkpoint with one weight changed."""
    shutil.copytree(checkpoint, copy)
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    return copy


def test_speed_is_measured_of_all_checkpoints(
    load: Any, checkpoints: tuple[Path, Path], wider: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"--dense": wider, "--compressed": checkpoints[1] / "full-20", "--sequence-length": 8}
    options |= {"--new-tokens": 2, "--repeats": 2, "--threads": 1, "--output": tmp_path / "throughput.json"}
    monkeypatch.setattr(sys, "argv", ["throughput.py", *(str(word) for option in options.items() for word in option)])
    load("throughput").main()
    results = json.loads((tmp_path / "throughput.json").read_text())
    assert [one["model"] for one in results["models"]] == [wider.name, "full-20"]
    weights = (checkpoints[1] / "full-20" / "model.safetensors").read_bytes()
    assert results["models"][1]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    table = (tmp_path / "throughput.md").read_text()
    for row in results["models"][1]["rows"]:
        rate, (median, least, greatest) = row["prefill_tokens_per_second"], row["prefill_ratio"]
        assert f"| {row['batch_size']} | full-20 | {rate:.0f} | {median:.2f} ({least:.2f} to {greatest:.2f}) |" in table
    assert str(tmp_path.parent) not in table + (tmp_path / "throughput.json").read_text()


def test_tasks_are_put_to_all_checkpoints(
    load: Any,
    checkpoints: tuple[Path, Path],
    wider: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (lm-eval) is not installed")
    rows = [{"goal": f"keep {n}", "sol1": "the head", "sol2": "a model of layers", "label": n % 2} for n in range(6)]
    (tmp_path / "piqa_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["tasks.py", "--dense", wider, "--compressed", checkpoints[1] / "full-20", "--tasks", "piqa"]
    command += ["--task-data", tmp_path, "--limit", 4, "--output", tmp_path / "tasks.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    load("tasks").main()
    results = json.loads((tmp_path / "tasks.json").read_text())
    shares = [one["tasks"]["piqa"]["metrics"]["acc_norm"] for one in results["models"]]
    table = (tmp_path / "tasks.md").read_text()
    assert re.search(rf"\| piqa \| acc_norm \| 4 \| {100 * shares[0]:.1f} ± .* \| {100 * shares[1]:.1f} ± ", table)
    assert results["command"].endswith("--compressed DIR/full-20 --task-data DATA")
    command.insert(command.index("--tasks"), checkpoints[1] / "gguf-20")
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    capsys.readouterr()
    load("tasks").main()
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["gguf-20"]
    more = json.loads((tmp_path / "tasks.json").read_text())["models"]
    assert more[:2] == results["models"]
    assert more[2]["model"] == "gguf-20"
    replaced = with_other_weights(checkpoints[1] / "full-20", tmp_path / "full-20")
    command[command.index(checkpoints[1] / "full-20")] = replaced
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    capsys.readouterr()
    load("tasks").main()
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["full-20"]


def test_texts_that_calibrate_against_texts_that_are_evaluated(
    load: Any, wider: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossed, rows = load("crossed"), [{"instruction": random_text(4, seed=n), "output": "the head"} for n in range(60)]
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text("\n".join(map(json.dumps, rows)))
    command = ["crossed.py", "--train", f"one={text_file}", f"alpaca={alpaca}", "--texts", f"alpaca={alpaca}"]
    command += ["--model", wider, "--samples", 5, "--test-samples", 1, "--sequence-length", 32]
    command += ["--output", tmp_path / "crossed.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    crossed.main()
    results = json.loads((tmp_path / "crossed.json").read_text())
    assert [(row["method"], row["statistics"], row["calibration"]) for row in results["rows"]] == [
        (*kind, name)
        for name in ("one", "alpaca", "all")
        for kind in (("greedy", "dense"), ("modegpt", "dense"), ("modegpt", "sequential"))
    ]
    source = ModelSource(str(wider))
    config = CompressionConfig.validated(ratio=0.3, method="modegpt", temperature=0.03)
    ids = tokenize(source.tokenizer(), read_text(str(alpaca)))
    assert len(set(results["calibration_sha256"].values())) == 3
    windows = first_windows(ids, 5, 32, what="alpaca")
    assert results["calibration_sha256"]["alpaca"] == windows.sha256()
    held_out = first_windows(split_held_out(ids, 32)[1], 1, 32, what="alpaca")
    small = compress_model(source.model("float32"), windows, config).model
    assert results["rows"][5]["perplexity"]["alpaca"] == pytest.approx(perplexity(small, held_out), rel=1e-4)
    table = (tmp_path / "crossed.md").read_text()
    assert f"| modegpt | sequential | alpaca | {results['rows'][5]['perplexity']['alpaca']:.2f} |" in table
    assert str(tmp_path) not in table + (tmp_path / "crossed.json").read_text()


def test_no_window_that_calibrates_is_evaluated_or_measures_sensitivities(
    load: Any, wider: Path, text_file: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(wider)
    files = {"one": str(text_file), "ptb": str(text_file), "alpaca": str(text_file)}
    found = load("crossed").calibration_windows(files, tokenizer, 7, 16)
    evaluated = load("benchmark_texts").evaluation_texts({"alpaca": str(text_file)}, tokenizer, 2, 16)["alpaca"]
    for name, (windows, probe) in found.items():
        own, others = ({tuple(row) for row in one.ids.tolist()} for one in (windows, probe))
        assert len(windows) == 7
        assert not own & others
        if name == "alpaca":
            assert not (own | others) & {tuple(row) for row in evaluated.ids.tolist()}
    assert all(
        {tuple(row) for row in found[name][0].ids[:2].tolist()} <= {tuple(row) for row in found["all"][0].ids.tolist()}
        for name in files
    )
