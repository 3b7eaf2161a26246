"""``modegpt report``: one page that needs nothing else, safe with whatever files hold; and ``push``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

import modegpt
from helpers import Outcome, compress_arguments, run_cli
from modegpt import hub, sources
from modegpt.model_card import OLDEST, model_card
from modegpt.page import Checkpoint
from modegpt.results import spectrum_of, thinned
from modegpt.sources import ModelSource

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two compressed models, one with sensitivities and one with scores, and what was measured of them."""
    directory = tmp_path_factory.mktemp("made")
    for name, method, ratio in (("greedy", "greedy", 0.2), ("paper", "modegpt", 0.4)):
        arguments = compress_arguments(tiny_checkpoint, directory / name, text_file, "--method", method, ratio=ratio)
        outcome = run_cli(*arguments, "--quiet")
        assert outcome.code == 0, outcome.err
    models = (tiny_checkpoint, directory / "greedy", directory / "paper")
    texts = ("--perplexity", text_file, "--sequence-length", 32, "--samples", 2)
    assert run_cli("evaluate", *models, *texts, "-o", directory / "evaluation.json").code == 0
    load = ("--batch-sizes", "1,2", "--sequence-length", "8,4", "--new-tokens", 2, "--repeats", 1)
    assert run_cli("bench", *models, *load, "-o", directory / "bench.json").code == 0
    return directory


def page(output: Path, *arguments: object) -> tuple[Outcome, str]:
    outcome = run_cli("report", *arguments, "--output", output)
    assert outcome.code == 0, outcome.err
    return outcome, output.read_text()


class Cells(HTMLParser):
    """The rows of all tables, as text, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def test_all_that_is_known_of_several_models(made: Path, tmp_path: Path) -> None:
    results = ("--evaluation", made / "evaluation.json", "--bench", made / "bench.json")
    outcome, text = page(
        tmp_path / "r.html", made / "greedy", made / "paper", *results, "--figures", tmp_path / "figures"
    )
    assert outcome.code == 0, outcome.err
    cells = Cells(text)
    evaluation = json.loads((made / "evaluation.json").read_text())
    perplexities = [next(iter(one["texts"].values()))["perplexity"] for one in evaluation["models"]]
    assert [f"{value:.2f}" for value in perplexities] in [row[1:] for row in cells.rows]
    bench = json.loads((made / "bench.json").read_text())
    for one in bench["models"]:
        for row in one["rows"]:
            at_once = f"{Path(one['model']).name}, {row['batch_size']} at once, {row['sequence_length']} tokens"
            shown, latencies = [cell for cell in cells.rows if cell[0] == at_once]
            seconds = [row["first_token_seconds"], *row["token_seconds"].values()]
            assert latencies[1:5] == [f"{1000 * second:,.1f}" for second in seconds]
            assert shown[1] == f"{row['prefill_tokens_per_second']:,.0f}"
            assert shown[4].startswith(f"{row['decode_ratio'][0]:.2f} (")
    for name in ("greedy", "paper"):
        report = modegpt.CompressionReport.read(made / name)
        rows = dict(row for row in cells.rows if len(row) == 2)
        assert ["Method", f"{report.options['method']}, allocation {report.options['allocation']}"] in cells.rows
        blocks, size = report.block_parameters, report.bytes
        assert [
            "Decoder-block parameters removed",
            f"{blocks.removed:.1%} ({report.options['ratio']:.1%} aimed at)",
        ] in cells.rows
        assert ["Weights", f"float32, {size.compressed / 1e6:.1f} MB ({size.dense / 1e6:.1f} MB dense)"] in cells.rows
        assert len(report.measured()) == 1
        for text_name, pair in report.measured().items():
            assert [f"Perplexity ({text_name})", f"{pair.compressed:.2f} ({pair.dense:.2f} dense)"] in cells.rows
        assert rows["Peak memory"].endswith(" GB")
        assert report.command.split()[0] in text
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    curves = {f"greedy-curve-{module}" for module in ("mlp", "qk", "vo")}
    curves |= {f"paper-spectrum-{module}" for module in ("mlp", "qk", "vo")}
    own = {"greedy-ranks", "greedy-errors", "greedy-losses", "paper-ranks", "paper-errors", "paper-scores"}
    assert figures == curves | own | {"size", "speed"}
    assert figures == {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert text.count("<svg") == len(figures)


def test_what_a_profile_predicts_is_beside_what_was_measured(
    made: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ("--calibration", text_file, "--samples", 4, "--sequence-length", 32, "--output", tmp_path / "profile")
    assert run_cli("profile", tiny_checkpoint, *arguments, "--quiet").code == 0
    figures = ("--profile", tmp_path / "profile", "--figures", tmp_path / "figures")
    outcome, text = page(tmp_path / "r.html", made / "greedy", *figures)
    assert outcome.code == 0, outcome.err
    drawn = (tmp_path / "figures" / "size.svg").read_text()
    assert "predicted for" in drawn
    assert "stroke-dasharray" in drawn
    assert "see modegpt curve" in text
    no_profile = ("--profile", made / "paper", "--output", tmp_path / "no.html")
    assert run_cli("report", made / "greedy", *no_profile).code == 2
    assert not (tmp_path / "no.html").exists()


def test_the_page_needs_nothing_but_itself(made: Path, tmp_path: Path) -> None:
    """No scripts, and nothing that a browser would fetch."""
    _, text = page(tmp_path / "r.html", made / "greedy", "--bench", made / "bench.json")
    tags = Cells(text).tags
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in tags}
    fetched = [
        value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(value is not None and value.startswith("#") for value in fetched)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_same_page_every_time(made: Path, tmp_path: Path) -> None:
    assert page(tmp_path / "a.html", made / "greedy")[1] == page(tmp_path / "b.html", made / "greedy")[1]


def test_no_two_figures_share_an_id(made: Path, tmp_path: Path) -> None:
    _, text = page(tmp_path / "r.html", made / "greedy", made / "paper")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)
    assert text.count('<svg role="img" aria-label="') == text.count("<svg")
    assert text.count("<style") == 1


def test_no_page_is_overwritten(made: Path, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("precious")
    outcome = run_cli("report", made / "greedy", "--output", tmp_path / "r.html")
    assert (outcome.code, "is there already" in outcome.err) == (2, True)
    assert (tmp_path / "r.html").read_text() == "precious"


def test_what_files_hold_is_text_and_nothing_else(made: Path, tmp_path: Path) -> None:
    evil = "<script>'$x^2$'"  # short, and without a slash, so that names and labels have all of it
    copy = tmp_path / "copy"
    shutil.copytree(made / "paper", copy)
    report = json.loads((copy / "compression.json").read_text())
    report["source"] = report["command"] = report["evaluation"]["source"] = report["options"]["allocation"] = evil
    (copy / "compression.json").write_text(json.dumps(report))
    found = json.loads((made / "evaluation.json").read_text())
    found["command"] = found["models"][0]["model"] = evil
    speeds = json.loads((made / "bench.json").read_text())
    speeds["models"][0]["model"] = speeds["machine"]["device"] = evil
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    (tmp_path / "bench.json").write_text(json.dumps(speeds))
    results = ("--evaluation", tmp_path / "evaluation.json", "--bench", tmp_path / "bench.json")
    outcome, text = page(tmp_path / "r.html", copy, made / "greedy", *results)
    assert outcome.code == 0, outcome.err
    assert "<script" not in text
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert sum("&lt;script&gt;" in figure for figure in figures) >= 2  # of sizes and of speeds
    assert text.count("&lt;script&gt;") > "".join(figures).count("&lt;script&gt;") + 4
    for heading in ("Size", "Quality", "Speed"):
        assert f"<h2>{heading}</h2>" in text


def test_models_that_were_not_evaluated_as_they_were_made_are_by_the_evaluation(made: Path, tmp_path: Path) -> None:
    for name in ("greedy", "paper"):
        shutil.copytree(made / name, tmp_path / name)
        report = json.loads((tmp_path / name / "compression.json").read_text())
        (tmp_path / name / "compression.json").write_text(json.dumps(report | {"perplexity": None, "evaluation": None}))
    models = (tmp_path / "greedy", tmp_path / "paper")
    _, without = page(tmp_path / "without.html", *models)
    _, text = page(tmp_path / "with.html", *models, "--evaluation", made / "evaluation.json")
    scores = json.loads((made / "evaluation.json").read_text())["models"]
    dense, *own = [next(iter(one["texts"].values()))["perplexity"] for one in scores]
    for name, value in zip(("greedy", "paper"), own, strict=True):
        assert [row[0] for row in Cells(text).rows if row[-1] == f"{value:.2f} ({dense:.2f})"] == [name]
        assert [row[-1] for row in Cells(without).rows if row[0] == name and len(row) == 5] == [""]
    count = text.count("<svg") - without.count("<svg")
    assert count == 1, "the curve"


def test_texts_of_another_length_are_another_line(
    made: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    """Whose perplexities compare with nothing of the first."""
    arguments = compress_arguments(tiny_checkpoint, tmp_path / "other", text_file, "--evaluation-samples", 1, ratio=0.2)
    outcome = run_cli(*arguments, "--quiet")
    assert outcome.code == 0, outcome.err
    counts = [
        report.evaluation.windows
        for report in map(modegpt.CompressionReport.read, (made / "paper", tmp_path / "other"))
        if report.evaluation is not None
    ]
    assert len(set(counts)) == 2
    _, both = page(tmp_path / "both.html", made / "paper", tmp_path / "other")
    assert all(f"{count} windows" in both for count in counts)
    _, alone = page(tmp_path / "alone.html", made / "paper", made / "greedy")
    assert f"{counts[0]} windows" not in "".join(re.findall(r"<svg.*?</svg>", alone, re.DOTALL))


# Spectra


def test_curves_are_the_errors_at_every_rank(made: Path) -> None:
    """At the rank that was chosen they give the module's own error, before what is fitted once more there."""
    for layer in modegpt.CompressionReport.read(made / "greedy").layers:
        for module, facts in layer.modules.items():
            assert facts.curve is not None
            ranks = thinned(facts.full)
            assert len(facts.curve) == len(ranks)
            assert facts.curve[0] == pytest.approx(1, abs=0.02)
            assert facts.curve == sorted(facts.curve, reverse=True)
            known = facts.curve[ranks.index(facts.rank)]
            assert facts.relative_error <= known + 1e-4
            if module == "qk":
                assert known == pytest.approx(facts.relative_error, abs=1e-4)


def test_spectra_are_what_the_rank_cuts(made: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    layers = modegpt.CompressionReport.read(made / "paper").layers
    for facts in (facts for layer in layers for facts in layer.modules.values() if facts.rank < facts.full):
        assert facts.curve is None
        assert facts.spectrum is not None
        assert len(facts.spectrum) == facts.full
        assert facts.spectrum == sorted(facts.spectrum, reverse=True)
    assert all(0 < max(layer.modules["mlp"].spectrum or ()) <= 1 for layer in layers)
    for method, ratio, known in (("svd-llm", 0.4, "curve"), ("slicegpt", 0.3, "spectrum")):
        arguments = compress_arguments(tiny_checkpoint, tmp_path / method, text_file, "--method", method, ratio=ratio)
        assert run_cli(*arguments, "--quiet").code == 0
        for layer in modegpt.CompressionReport.read(tmp_path / method).layers:
            assert all(getattr(facts, known) for facts in layer.modules.values())
            for facts in layer.modules.values() if known == "curve" else ():
                at = thinned(facts.full).index(facts.rank)
                assert (facts.curve or ())[at] == pytest.approx(facts.relative_error, abs=1e-5)


def test_thinned_spectra_keep_their_ends() -> None:
    assert spectrum_of(torch.tensor([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]])) == [4.5, 3.5, 2.5]
    found = spectrum_of(torch.arange(1000, dtype=torch.float64))
    assert (len(found), found[0], found[-1]) == (129, 999, 0)
    assert found == [999 - place for place in thinned(999)]
    assert thinned(0) == [0]


def test_spectra_stay_with_a_model_that_is_saved_again(made: Path, tmp_path: Path) -> None:
    assert "curve" not in (made / "greedy" / "compression.json").read_text()
    modegpt.save(modegpt.load(made / "greedy"), tmp_path / "again")
    for name in ("compression.json", "spectra.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made / "greedy" / name).read_bytes()


def changed_spectra(made: Path, copy: Path, change: Callable[[Any], None]) -> None:
    shutil.copytree(made / "greedy", copy)
    spectra = json.loads((copy / "spectra.json").read_text())
    change(spectra)
    (copy / "spectra.json").write_text(json.dumps(spectra))


def test_older_checkpoints_have_no_spectra(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "greedy", tmp_path / "copy")
    (tmp_path / "copy" / "spectra.json").unlink()
    outcome, text = page(tmp_path / "r.html", tmp_path / "copy")
    assert outcome.code == 0, outcome.err
    assert text.count("<svg") == 3


def test_curves_that_do_not_fit_are_left_out(made: Path, tmp_path: Path) -> None:
    def change(spectra: Any) -> None:
        for layer in spectra["layers"]:
            layer["vo"]["curve"] = [1.0] * 1000
            layer["qk"].pop("curve")

    changed_spectra(made, tmp_path / "copy", change)
    outcome, _ = page(tmp_path / "r.html", tmp_path / "copy", "--figures", tmp_path / "figures")
    assert outcome.code == 0, outcome.err
    assert [path.stem for path in (tmp_path / "figures").glob("*-curve-*.png")] == ["copy-curve-mlp"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda spectra: spectra["layers"].pop(), "is not of the layers that compression.json has"),
        (lambda spectra: spectra["layers"][0].pop("vo"), "is not of the layers that compression.json has"),
        (lambda spectra: spectra["layers"][0]["vo"].update(curve=[float("nan")]), "layers.0.vo.curve.0: "),
        (lambda spectra: spectra["layers"][0]["vo"].update(spectrum="<svg>"), "layers.0.vo.spectrum: "),
        (lambda spectra: spectra.update(extra=1), "extra: "),
    ],
)
def test_damaged_spectra_are_refused(made: Path, tmp_path: Path, change: Callable[[Any], None], problem: str) -> None:
    changed_spectra(made, tmp_path / "copy", change)
    outcome = run_cli("report", tmp_path / "copy", "--output", tmp_path / "r.html")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "spectra.json is not" in outcome.err
    assert problem in outcome.err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("nowhere",), "nowhere is no directory"),
        ((".",), "is not compressed by modegpt: it has no compression.json"),
        (("greedy", "--output", "r.txt"), "--output 'r.txt': name a .html file"),
        (("greedy", "--output", "nowhere/r.html"), "--output 'nowhere/r.html': its directory does not exist"),
        (("greedy", "--evaluation", "none.json"), "--evaluation 'none.json' cannot be read"),
        (("greedy", "--evaluation", "bench.json"), "is no file of that command: models.0.texts"),
        (("greedy", "--bench", "evaluation.json"), "is no file of that command: machine"),
        (("greedy", "--figures", "bench.json"), "is a file; name a directory"),
    ],
)
def test_refusals(made: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    words = [made / word if (made / word).exists() else word for word in arguments]
    output = () if "--output" in arguments else ("--output", tmp_path / "r.html")
    outcome = run_cli("report", *words, *output)
    assert (outcome.code, outcome.out) == (2, "")
    assert problem in outcome.err
    assert not any(tmp_path.iterdir())


# Push


@pytest.mark.parametrize(
    ("source", "linked"),
    [("me/model-1.5B", True), ("model", False), ("/me/model", False), ("my.models/a_b", True), ("me/x.gguf", False)],
)
def test_cards_are_linked_to_models_of_the_hub(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, linked: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no such directory
    card = model_card(modegpt.CompressionReport.read(made / "greedy").model_copy(update={"source": source}))
    assert (f"---\nbase_model: {source}\nlibrary_name" in card) == linked
    (tmp_path / source.lstrip("/")).mkdir(parents=True)
    card = model_card(modegpt.CompressionReport.read(made / "greedy").model_copy(update={"source": source}))
    assert "base_model" not in card


def test_cards_say_what_the_code_needs(made: Path) -> None:
    card = model_card(modegpt.CompressionReport.read(made / "greedy"))
    needed = next(line for line in requires("modegpt") or [] if line.startswith("transformers"))
    assert needed == f"transformers>={OLDEST}"
    assert f"Transformers {OLDEST} or newer" in card
    assert "trust_remote_code=True" in card


def test_the_time_of_an_interrupted_run_is_that_of_its_end(made: Path) -> None:
    one = Checkpoint.read(made / "greedy")
    assert one.run is not None
    assert dict(one.facts())["Time"]
    again = replace(one, run=one.run.model_copy(update={"starts": 3}))
    assert dict(again.facts())["Time, since the last of 3 starts"]


class Api:
    """A hub that notes what it is told."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.told: list[Any] = []
        self.there = [".gitattributes"]

    def create_repo(self, repository: str, **options: Any) -> None:
        self.told.append((repository, options))

    def list_repo_files(self, repository: str) -> list[str]:
        return self.there

    def upload_folder(self, **options: Any) -> Any:
        self.told.append(options)
        return type("Done", (), {"commit_url": "https://hub/commit/1"})


def test_a_checkpoint_is_pushed_with_all_that_it_needs(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apis: list[Api] = []
    monkeypatch.setattr(hub, "HfApi", lambda token: (apis.append(Api(token)), apis[-1])[1])
    assert modegpt.push_to_hub(made / "greedy", "me/greedy", private=True, token="t") == "https://hub/commit/1"
    (api,) = apis
    (repository, made_with), upload = api.told
    assert (api.token, repository, made_with) == ("t", "me/greedy", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("me/greedy", made / "greedy")
    assert upload["delete_patterns"] == []
    assert sorted(upload["allow_patterns"]) == sorted(path.name for path in (made / "greedy").iterdir())
    outcome = run_cli("push", made / "greedy", "me/greedy")
    assert outcome == Outcome(0, "Uploaded: https://hub/commit/1\n", "")
    assert apis[1].told[0] == ("me/greedy", {"private": False, "exist_ok": True})


def test_of_what_is_there_a_push_takes_only_an_earlier_checkpoints_files_away(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hub's own rule, in whose patterns a star goes across folders."""
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "modeling_old.py", "merges.txt"]
    stale += ["model.safetensors", "additional_chat_templates/tools.jinja"]  # the first is uploaded anew
    others = [
        "LICENSE",
        "notes.txt",
        "train.py",
        "adapter_model.safetensors",
        "onnx/model.safetensors",
        "runs/log.json",
    ]
    others += ["onnx/modeling_old.py", "results.json", "x/additional_chat_templates/a.jinja", ".gitattributes"]
    api = Api()
    api.there = [*stale, *others]
    monkeypatch.setattr(hub, "HfApi", lambda token: api)
    modegpt.push_to_hub(made / "greedy", "me/greedy")
    patterns = api.told[1]["delete_patterns"]
    assert sorted(filter_repo_objects(api.there, allow_patterns=patterns)) == sorted(stale)


def files_in(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]


def test_nothing_but_the_checkpoint_is_pushed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what lies in folders inside, by the hub's own rule, nor other kinds of files."""
    apis: list[Api] = []
    monkeypatch.setattr(hub, "HfApi", lambda token: (apis.append(Api(token)), apis[-1])[1])
    shutil.copytree(made / "greedy", tmp_path / "mine")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    tokenizer.chat_template = {"default": "{{ one }}", "tools": "{{ two }}"}
    tokenizer.save_pretrained(tmp_path / "mine")
    whole = sorted(files_in(tmp_path / "mine"))
    assert "additional_chat_templates/tools.jinja" in whole
    (tmp_path / "mine" / "runs").mkdir()
    for name in ("runs/secrets.json", "runs/optimizer.safetensors", "training.pt"):
        (tmp_path / "mine" / name).write_text("{}")
    modegpt.push_to_hub(tmp_path / "mine", "me/mine")
    everything = files_in(tmp_path / "mine")
    allowed = apis[0].told[1]["allow_patterns"]
    assert sorted(filter_repo_objects(everything, allow_patterns=allowed)) == whole


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "compression.json", "README.md"])
def test_half_a_checkpoint_is_not_pushed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda token: pytest.fail("the hub was asked"))
    shutil.copytree(made / "greedy", tmp_path / "half")
    (tmp_path / "half" / missing).unlink()
    outcome = run_cli("push", tmp_path / "half", "me/half")
    assert outcome.code == 2
    assert re.search(f"has no .*{re.escape(missing.replace('model.', '*.'))}|{missing} cannot be read", outcome.err)


def test_what_the_hub_refuses_is_one_line(made: Path) -> None:
    outcome = run_cli("push", made / "greedy", "a/b/c")
    assert outcome.code == 2
    assert outcome.err.startswith("modegpt: 'a/b/c' cannot be uploaded to http")
    assert outcome.err.count("\n") == 1


def test_without_a_connection_there_is_one_line_too(made: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    command = [sys.executable, "-m", "modegpt", "push", str(made / "greedy"), "me/greedy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "modegpt: 'me/greedy' cannot be uploaded to http://127.0.0.1:9: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_shard_is_noticed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "greedy", tmp_path / "half")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "half" / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = run_cli("push", tmp_path / "half", "me/half")
    assert outcome.code == 2
    assert "has no model-00002-of-00002.safetensors" in outcome.err


def test_more_models_than_colours_and_several_files_of_speeds(made: Path, tmp_path: Path) -> None:
    speeds = json.loads((made / "bench.json").read_text())
    speeds["models"] = [speeds["models"][0] | {"model": f"_{number}"} for number in range(8)]
    (tmp_path / "many.json").write_text(json.dumps(speeds))
    files = ("--bench", tmp_path / "many.json", "--bench", made / "bench.json")
    _, text = page(tmp_path / "r.html", made / "paper", *files, "--figures", tmp_path / "figures")
    assert {"speed.png", "speed-2.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    figure = (tmp_path / "figures" / "speed.svg").read_text()
    assert all(f" _{number}<" in figure for number in range(8))
    assert text.count("<h2>Speed</h2>") == 2


def test_metrics_that_are_no_share_are_not_percents(made: Path, tmp_path: Path) -> None:
    found = json.loads((made / "evaluation.json").read_text())
    task = {"metrics": {"word_perplexity": 20.5}, "errors": {"word_perplexity": None}, "shown": "word_perplexity"}
    found["models"][0]["tasks"] = {"wikitext": task | {"is_accuracy": False, "items": 3}}
    (tmp_path / "e.json").write_text(json.dumps(found))
    _, text = page(tmp_path / "r.html", made / "paper", "--evaluation", tmp_path / "e.json")
    (row,) = [row for row in Cells(text).rows if row[0] == "wikitext (word_perplexity)"]
    assert row[1:] == ["20.500", "", ""]


def test_models_of_names_that_come_to_one_have_figures_of_their_own(made: Path, tmp_path: Path) -> None:
    for name in ("a b", "a_b"):
        shutil.copytree(made / "paper", tmp_path / name)
    _, text = page(tmp_path / "r.html", tmp_path / "a b", tmp_path / "a_b", "--figures", tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"1-a_b-ranks.png", "2-a_b-ranks.png"} <= names
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len({*ids})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("token_seconds"), "token_seconds"),
        (lambda row: row["token_seconds"].popitem(), "other percentiles"),
        (lambda row: row.clear(), "batch_size"),
    ],
)
def test_damaged_speeds_are_refused(
    made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    speeds = json.loads((made / "bench.json").read_text())
    change(speeds["models"][-1]["rows"][-1])
    (tmp_path / "b.json").write_text(json.dumps(speeds))
    outcome = run_cli("report", made / "paper", "-o", tmp_path / "r.html", "--bench", tmp_path / "b.json")
    assert (outcome.code, outcome.err.count("\n"), words in outcome.err) == (2, 1, True), outcome.err
    speeds["models"][0]["rows"] = []
    (tmp_path / "b.json").write_text(json.dumps(speeds))
    outcome = run_cli("report", made / "paper", "-o", tmp_path / "r.html", "--bench", tmp_path / "b.json")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts["block_parameters"].update(dense=0), "block_parameters.dense"),
        (lambda facts: facts["layers"][0].update(scores=[1.0, float("nan")]), "scores"),
    ],
)
def test_crafted_facts_are_refused(
    made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    shutil.copytree(made / "paper", tmp_path / "crafted")
    facts = json.loads((tmp_path / "crafted" / "compression.json").read_text())
    change(facts)
    (tmp_path / "crafted" / "compression.json").write_text(json.dumps(facts))
    outcome = run_cli("report", tmp_path / "crafted", "-o", tmp_path / "r.html")
    assert (outcome.code, outcome.err.count("\n"), words in outcome.err) == (2, 1, True), outcome.err


@pytest.mark.parametrize("without", [(), ("generation_config.json",)])
def test_what_inference_takes_is_fetched_from_the_hub(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    """File by file into an empty cache, with the settings of generation where there are any."""

    def download(address: str, name: str) -> str:
        assert address == "me/greedy"
        if name in without or not (made / "greedy" / name).is_file():
            raise EntryNotFoundError(name)
        return str(shutil.copy(made / "greedy" / name, tmp_path))

    monkeypatch.setattr(sources, "hf_hub_download", download)
    assert ModelSource("me/greedy").directory() == tmp_path
    wanted = {"model.safetensors", "generation_config.json"} - {*without}
    assert {path.name for path in tmp_path.iterdir()} == wanted


def test_a_pushed_checkpoint_is_opened_by_its_name_on_the_hub(made: Path, tmp_path: Path) -> None:
    """Which needs no code of it: here from the hub's cache, as it lies there once fetched."""
    folder = tmp_path / "hub" / "models--me--greedy"
    shutil.copytree(made / "greedy", folder / "snapshots" / "0123")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "modegpt", "generate", "me/greedy", "the model", "--max-new-tokens", "2"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    command[4] = str(made / "greedy")
    assert done.stdout == subprocess.run(command, env=environment, capture_output=True, check=True).stdout
