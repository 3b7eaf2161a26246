"""Calibration on several texts: shares, numbers of windows, their order, what is held out, and the way through."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modegpt
from helpers import Outcome, compress_arguments, run_cli
from modegpt import mixture as module
from modegpt.data import HUB_DATASETS, TokenWindows, other_windows, random_windows, split_held_out, tokenize
from modegpt.errors import InvalidRequest
from modegpt.mixture import MIXTURES, Cut, Mixture, interleave, read_mixture
from modegpt.profile import PROBE_TOKENS, probe_shape


def shares(text: str) -> dict[str, float]:
    return {name: round(share, 12) for name, share in Mixture.parse(text).shares.items()}


# What is asked for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wikitext2", {"wikitext2": 1}),
        ("wikitext2,alpaca", {"wikitext2": 0.5, "alpaca": 0.5}),
        ("a.txt:0.5,self:0.5", {"a.txt": 0.5, "self": 0.5}),
        ("a.txt:3, self", {"a.txt": 0.75, "self": 0.25}),
        ("a.txt:7", {"a.txt": 1}),
        (r"C:\a.txt,D:\b.txt:3", {r"C:\a.txt": 0.25, r"D:\b.txt": 0.75}),
    ],
)
def test_shares_are_weights(text: str, expected: dict[str, float]) -> None:
    assert shares(text) == expected


def test_a_file_is_a_file_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,self.txt", "b.txt:2"):
        Path(name).touch()
        assert shares(name) == {name: 1}
    assert shares("b.txt:2:3,self") == {"b.txt:2": 0.75, "self": 0.25}


def test_a_list_longer_than_a_file_name_is_a_list() -> None:
    assert len(shares(",".join(f"text-{number}.txt" for number in range(60)))) == 60


def test_a_named_mixture_is_spelt_out_and_can_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIXTURES", {"both": "c4:3,self"})
    assert shares("both") == {"c4": 0.75, "self": 0.25}
    assert shares("a.txt,both:3") == {"a.txt": 0.25, "c4": 0.5625, "self": 0.1875}


def test_the_named_mixture_holds_nothing_that_models_are_judged_by() -> None:
    sources = set(shares("mix"))
    assert list(MIXTURES) == ["mix"]
    assert sources <= {*HUB_DATASETS, "self"}
    assert not sources & {"wikitext2", "ptb", "alpaca"}


# How many windows


@pytest.mark.parametrize(
    ("text", "windows", "expected"),
    [
        ("a", 7, [7]),
        ("a,b", 7, [4, 3]),
        ("a:0.75,b:0.25", 16, [12, 4]),
        ("a,b,c", 16, [6, 5, 5]),
        ("a:5,b:3,c:1", 10, [6, 3, 1]),  # 5.56, 3.33, 1.11
        ("a:1,b:1,c:4", 9, [2, 1, 6]),  # 1.5, 1.5, 6: the first of equal remainders
        ("a:98,b:1,c:1", 3, [1, 1, 1]),
        ("a:98,b:1,c:1", 128, [126, 1, 1]),
        ("a:0.1,b:0.2,c:0.7", 10, [1, 2, 7]),
    ],
)
def test_windows_are_shared_by_largest_remainder(text: str, windows: int, expected: list[int]) -> None:
    assert list(Mixture.parse(text).counts(windows).values()) == expected


def test_every_source_gives_a_window_and_its_share_within_one() -> None:
    choose = random.Random(0)
    for _ in range(300):
        weights = {
            f"s{n}": choose.choice([0.01, 0.1, 1.0]) * choose.random() + 1e-4 for n in range(choose.randint(1, 5))
        }
        mixture = Mixture.parse(",".join(f"{name}:{weight}" for name, weight in weights.items()))
        windows = choose.randint(len(weights), 40)
        counts = mixture.counts(windows)
        assert sum(counts.values()) == windows
        assert min(counts.values()) >= 1
        forced = sum(share * windows < 1 for share in mixture.shares.values())
        assert all(abs(counts[name] - share * windows) < 1 + forced for name, share in mixture.shares.items())


# In what order


def parts(*sizes: int) -> list[TokenWindows]:
    """Windows of two tokens: the number of their part and their place in it."""
    return [
        TokenWindows(torch.stack((torch.full((size,), number), torch.arange(size)), dim=1))
        for number, size in enumerate(sizes)
    ]


def test_all_windows_are_there_once_and_those_of_a_part_in_order() -> None:
    ids = interleave(parts(5, 3, 9), seed=0).ids
    for number, size in enumerate((5, 3, 9)):
        assert ids[ids[:, 0] == number][:, 1].tolist() == list(range(size))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(8, 8), (96, 32), (40, 40, 40), (61, 2, 1)])
def test_every_prefix_holds_the_shares(sizes: tuple[int, ...], seed: int) -> None:
    ids, total = interleave(parts(*sizes), seed).ids[:, 0], sum(sizes)
    for number, size in enumerate(sizes):
        found = (ids == number).cumsum(0)
        expected = torch.arange(1, total + 1) * size / total
        assert float((found - expected).abs().max()) < 1 + len(sizes) * size / total


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_every_worker_has_every_part(workers: int) -> None:
    """Also where the period of a plain rotation would be that of the workers."""
    ids = interleave(parts(*[32] * workers), seed=0).ids[:, 0]
    for rank in range(workers):
        assert ids[rank::workers].bincount(minlength=workers).min() > 0


def test_the_order_is_decided_by_the_seed() -> None:
    first, again, other = (interleave(parts(20, 20), seed).ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_part_is_left_as_it_is() -> None:
    (part,) = parts(4)
    assert interleave([part], seed=3) is part


# Reading


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def windows_of(*texts: TokenWindows) -> set[tuple[int, ...]]:
    return {tuple(window) for text in texts for window in text.ids.tolist()}


def test_each_text_is_cut_as_if_it_were_alone(
    tokenizer: PreTrainedTokenizerBase, text_file: Path, other_text_file: Path
) -> None:
    mixture = Mixture.parse(f"{text_file}:2,{other_text_file}")
    texts = read_mixture(mixture, tokenizer, Cut(9, 32, seed=4, held_out=3, probe=(6, 20)))
    for name, count, others in ((str(text_file), 6, 4), (str(other_text_file), 3, 2)):
        ids, held_out = split_held_out(tokenize(tokenizer, Path(name).read_text()), 32)
        assert torch.equal(texts.parts[name].ids, random_windows(ids, count, 32, 4, what="").ids)
        assert torch.equal(texts.evaluation[name].ids, held_out[: 3 * 32].view(3, 32))
        unused = other_windows(ids, others, 32, 4, but=count)
        assert unused is not None
        assert torch.equal(texts.probe[name].ids, unused.ids[:, :20])
    assert windows_of(texts.calibration) == windows_of(*texts.parts.values())
    assert len(texts.calibration) == 9
    assert texts.written == {}


def test_what_the_model_writes_is_counted_and_added(tokenizer: PreTrainedTokenizerBase, text_file: Path) -> None:
    texts = read_mixture(Mixture.parse(f"{text_file},self"), tokenizer, Cut(5, 32, seed=0, held_out=2, probe=(2, 16)))
    assert texts.written == {"parts": 2, "evaluation": 0, "probe": 1}
    written = torch.arange(3 * 32).view(3, 32)
    complete = texts.complete(TokenWindows(written))
    assert complete.parts["self"].ids.tolist() == written[:2].tolist()
    assert complete.probe["self"].ids.tolist() == written[2:, :16].tolist()
    assert list(complete.evaluation) == [str(text_file)]
    assert complete.written == {}
    assert complete.hashes()["calibration"] != texts.hashes()["calibration"]


def test_text_of_the_models_own_is_held_out_where_there_is_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = read_mixture(Mixture.parse("self"), tokenizer, Cut(4, 8, seed=0, held_out=2))
    assert texts.written == {"parts": 4, "evaluation": 2, "probe": 0}
    complete = texts.complete(TokenWindows(torch.arange(48).view(6, 8)))
    assert complete.evaluation["self"].ids[:, 0].tolist() == [32, 40]
    assert complete.probe_windows is None


# All the way


@pytest.fixture(scope="module")
def text(text_file: Path, other_text_file: Path) -> str:
    """Two files and text of the model's own."""
    return f"{text_file}:0.5,self:0.2,{other_text_file}:0.3"


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The mixture on the command line."""
    output = tmp_path_factory.mktemp("mixture") / "small"
    options = ("--samples", 10, "--evaluation-samples", 2, "--seed", 3)
    outcome = run_cli(*compress_arguments(tiny_checkpoint, output, text, *options))
    assert outcome.code == 0, outcome.err
    return outcome, output


def report_of(run: tuple[Outcome, Path]) -> Any:
    return json.loads((run[1] / "compression.json").read_text())


def test_the_report_says_how_many_windows_of_each(
    run: tuple[Outcome, Path], text: str, text_file: Path, other_text_file: Path
) -> None:
    report = report_of(run)
    assert report["calibration"]["source"] == text
    assert report["calibration"]["windows"] == 10
    assert report["calibration"]["mixture"] == {str(text_file): 5, "self": 2, str(other_text_file): 3}
    assert report["evaluation"]["mixture"] == {str(text_file): 2, str(other_text_file): 2}


def test_perplexity_is_that_of_each_text_and_of_all(
    run: tuple[Outcome, Path],
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_file: Path,
    other_text_file: Path,
) -> None:
    report = report_of(run)
    held_out = {
        str(path): split_held_out(tokenize(tokenizer, path.read_text()), 32)[1][: 2 * 32].view(2, 32)
        for path in (text_file, other_text_file)
    }
    models = {"dense": dense, "compressed": modegpt.load(run[1])}
    for kind, model in models.items():
        for name, ids in held_out.items():
            assert report["perplexities"][name][kind] == pytest.approx(modegpt.perplexity(model, TokenWindows(ids)))
        everything = TokenWindows(torch.cat(list(held_out.values())))
        assert report["perplexity"][kind] == pytest.approx(modegpt.perplexity(model, everything))


def test_the_summary_has_a_line_for_each_text(
    run: tuple[Outcome, Path], text_file: Path, other_text_file: Path
) -> None:
    report = report_of(run)
    for name in (str(text_file), str(other_text_file)):
        assert f"Perplexity ({name})" in run[0].out
        assert f"{report['perplexities'][name]['compressed']:.3f}" in run[0].out
    assert run_cli("inspect", run[1]).code == 0


def test_in_memory_it_is_the_same_mixture(
    run: tuple[Outcome, Path], dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    options = {"ratio": 0.3, "samples": 10, "sequence_length": 32, "seed": 3}
    report = modegpt.compress(dense, tokenizer, calibration=text, **options).compression_report
    assert report.calibration.mixture == report_of(run)["calibration"]["mixture"]
    with pytest.raises(InvalidRequest, match=r"^calibration 'self:much': a share must be a positive number"):
        Mixture.parse("self:much", option="calibration")
    with pytest.raises(InvalidRequest, match=r"^calibration 'self:0': a share must be"):
        modegpt.compress(dense, tokenizer, calibration="self:0", **options)
    with pytest.raises(InvalidRequest, match=r"^calibration 'missing\.txt': no such file"):
        modegpt.compress(dense, tokenizer, calibration="self,missing.txt", **options)


def test_workers_and_batches_do_not_change_what_is_calibrated_on(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    hashes = set()
    for number, options in enumerate([(), ("--batch-size", 4), ("--devices", 2)]):
        output = tmp_path / str(number)
        command = compress_arguments(tiny_checkpoint, output, f"{text_file},self", "--quiet", *options)
        assert run_cli(*command, "--evaluate", "none").code == 0
        hashes.add(json.loads((output / "compression.json").read_text())["calibration"]["sha256"])
    assert len(hashes) == 1


def test_sensitivities_are_measured_on_windows_of_every_source(
    tiny_checkpoint: Path, text_file: Path, other_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[TokenWindows] = []
    init = modegpt.engine.Engine.__init__

    def spy(self: Any, *arguments: Any, **options: Any) -> None:
        found.append(options["probe"])
        init(self, *arguments, **options)

    monkeypatch.setattr(modegpt.engine.Engine, "__init__", spy)
    text = f"{text_file},self,{other_text_file}"
    command = compress_arguments(tiny_checkpoint, tmp_path / "small", text, "--quiet", "--allocation", "sensitivity")
    assert run_cli(*command, "--evaluate", "none", "--sequence-length", 64, "--samples", 6).code == 0
    (probe,) = found
    assert probe.ids.shape[1] == 64
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    shares = []
    for path in (text_file, other_text_file):
        ids = tokenize(tokenizer, path.read_text())
        own = {tuple(window.tolist()) for window in ids[: len(ids) // 64 * 64].view(-1, 64)}
        shares.append(len(own & windows_of(probe)))
    assert min(shares) > 5
    assert sum(shares) < len(probe)


@pytest.mark.parametrize("length", [512, 2048, 4096])
@pytest.mark.parametrize("text", ["mix", "a:0.95,b:0.05", "a,b,c", ",".join("abcdefghijkl")])
def test_a_source_has_its_share_of_what_sensitivities_are_measured_on(text: str, length: int) -> None:
    mixture = Mixture.parse(text)
    windows, piece = probe_shape(length, len(mixture.shares))
    assert 0.9 * PROBE_TOKENS < windows * piece <= PROBE_TOKENS
    for source, count in mixture.counts(windows).items():
        assert abs(count / windows - mixture.shares[source]) < 1 / windows
