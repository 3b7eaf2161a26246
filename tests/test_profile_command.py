"""``modegpt profile``, what is compressed from it, and its curve."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

import modegpt
from helpers import Outcome, run_cli, tiny_llama, token_windows
from modegpt.curve import knee, predicted_curve
from modegpt.engine import Engine
from modegpt.profile import Profiler
from modegpt.report import CompressionReport

OPTIONS = ("--method", "greedy", "--samples", 8, "--sequence-length", 32)


@pytest.fixture(scope="module")
def profile(tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profile") / "profile"
    outcome = run_cli("profile", tiny_checkpoint, "-o", directory, "--calibration", text_file, *OPTIONS)
    assert outcome.code == 0, outcome.err
    return directory


def compress(model: Path, output: Path, profile: Path, *options: object) -> Outcome:
    return run_cli("compress", model, "-o", output, "--profile-from", profile, *options)


def test_a_profile_is_one_directory_that_names_no_path_of_its_own(profile: Path) -> None:
    files = {str(path.relative_to(profile)) for path in profile.rglob("*") if path.is_file()}
    layers = {f"statistics/{index:05d}.safetensors" for index in range(3)}
    assert files == {"config.json", "origin.json", "profile.json"} | layers
    assert list(profile.parent.iterdir()) == [profile]


def test_compression_from_a_profile_needs_no_text_and_is_that_without(
    profile: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    no_text = AssertionError("the text was read")
    with patch("modegpt.pipeline.read_mixture", side_effect=no_text), patch.object(Engine, "calibrate", None):
        outcome = compress(tiny_checkpoint, tmp_path / "one", profile, "--ratio", 0.3)
    assert outcome.code == 0, outcome.err
    direct = run_cli(
        *("compress", tiny_checkpoint, "-o", tmp_path / "two", "--ratio", 0.3, "--calibration", text_file),
        *(*OPTIONS, "--allocation", "sensitivity", "--statistics", "dense", "--evaluate", "none"),
    )
    assert direct.code == 0, direct.err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    one, two = (CompressionReport.read(tmp_path / name) for name in ("one", "two"))
    assert (one.layers, one.calibration) == (two.layers, two.calibration)
    assert one.evaluation is None


def test_every_ratio_and_a_text_to_evaluate_on(
    profile: Path, tiny_checkpoint: Path, other_text_file: Path, tmp_path: Path
) -> None:
    for ratio in (0.1, 0.45):
        output = tmp_path / str(ratio)
        assert compress(tiny_checkpoint, output, profile, "--ratio", ratio, "--evaluate", other_text_file).code == 0
        report = CompressionReport.read(output)
        assert report.block_parameters.removed == pytest.approx(ratio, abs=0.01)
        assert report.perplexity is not None
        modegpt.load(output)


def test_the_same_ranks_everywhere_without_predictions(profile: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert compress(tiny_checkpoint, tmp_path / "one", profile, "--ratio", 0.3, "--allocation", "uniform").code == 0
    report = CompressionReport.read(tmp_path / "one")
    assert len({layer.modules["qk"].rank for layer in report.layers}) == 1


def test_targets(profile: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    dense = sum(tensor.numel() for tensor in load_file(tiny_checkpoint / "model.safetensors").values())
    wanted = dense - 5000
    assert compress(tiny_checkpoint, tmp_path / "a", profile, "--target-parameters", wanted).code == 0
    parameters = CompressionReport.read(tmp_path / "a").parameters.compressed
    assert wanted - 200 < parameters <= wanted
    size = (tiny_checkpoint / "model.safetensors").stat().st_size - 20_000
    assert compress(tiny_checkpoint, tmp_path / "b", profile, "--target-size", f"{size / 1000}KB").code == 0
    assert size - 2500 < CompressionReport.read(tmp_path / "b").bytes.compressed <= size
    assert compress(tiny_checkpoint, tmp_path / "c", profile, "--max-perplexity-increase", "8%").code == 0
    report = CompressionReport.read(tmp_path / "c")
    predicted = sum(sum((layer.divergence or {}).values()) for layer in report.layers)
    assert 1.07 < 2.718281828**predicted <= 1.08
    assert report.predicted_loss == pytest.approx(predicted)
    assert 0.1 < report.requested_ratio < 0.35


@pytest.mark.parametrize(
    ("method", "align", "more"),
    [
        ("greedy", 1, {}),
        ("modegpt", 8, {}),
        ("modegpt", 16, {}),
        ("modegpt", 4, {"modules": ("mlp",)}),
        ("modegpt", 1, {"modules": ("mlp",), "layers": "1-2"}),
        ("obc", 16, {}),
        ("joint-rank-k", 1, {"joint_only": True}),
        ("svd", 4, {}),
        ("shortgpt", 1, {}),
        ("sleb", 1, {}),
    ],
)
def test_a_target_is_never_passed(method: str, align: int, more: dict[str, Any]) -> None:
    model = tiny_llama()
    dense = sum(parameter.numel() for parameter in model.parameters())
    for less in (1500, 3000, 5000):
        options = {"target_parameters": dense - less, "method": method, "align": align, **more}
        small = modegpt.compress(tiny_llama(), calibration=token_windows(16).ids, **options)
        assert small.compression_report.parameters.compressed <= dense - less, (method, align, less, more)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ratio 0.3 --samples 9", "--samples 9: the profile was made with 8; leave it out"),
        ("--ratio 0.3 --samples 128", "--samples 128: the profile was made with 8; leave it out"),  # the usual one
        ("--ratio 0.3 --ridge 0.5", "--ridge 0.5: the profile was made with 0.01; leave it out"),
        ("--ratio 0.3 --method obc", "--method obc: the profile was made with greedy; leave it out"),
        ("--max-perplexity-increase 10% --allocation uniform", "needs predictions; use --allocation sensitivity, not"),
        ("--ratio 0.3 --allocation block-influence", "--allocation block-influence needs calibration text"),
        ("--ratio 0.3 --statistics sequential", "--statistics sequential needs calibration text"),
        ("", "give one of --ratio, --target-parameters, --target-size, --max-perplexity-increase; given: none"),
        ("--ratio 0.3 --target-size 1GB", "given: --ratio, --target-size"),
        ("--target-size 1potato", "--target-size '1potato': give a size such as 4GiB or 250MB"),
        ("--target-parameters 1.2.3B", "--target-parameters '1.2.3B': give a number of parameters"),
        ("--target-parameters 1e400", "--target-parameters '1e400': give a number of parameters"),
        ("--target-parameters 5B", "--target-parameters 5,000,000,000: the model has that already"),
        ("--target-size 1KB", "--target-size 1,000: embeddings, head and norms alone take more"),
        ("--max-perplexity-increase inf", "--max-perplexity-increase inf: input should be a finite number"),
        ("--max-perplexity-increase 10", "--max-perplexity-increase '10': is that 10% or 1000%? Give it with the sign"),
        ("--max-perplexity-increase some", "--max-perplexity-increase 'some': give a share such as 10% or 0.1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    profile: Path, tiny_checkpoint: Path, tmp_path: Path, options: str, words: str
) -> None:
    outcome = compress(tiny_checkpoint, tmp_path / "out", profile, *options.split())
    assert outcome.code == 2
    assert outcome.err.strip().count("\n") <= 6  # the plan's and progress lines come before what is found on the way
    assert words in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("made_with", "options", "words"),
    [
        ("--method modegpt", "--ratio 0.3 --profile gguf", "--profile gguf"),
        ("--modules mlp", "--ratio 0.3 --profile stock", "--profile stock"),
        ("--method svd", "--ratio 0.3 --align auto", "--align auto"),
    ],
)
def test_what_the_profile_settles_is_checked_with_what_is_asked_for(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, made_with: str, options: str, words: str
) -> None:
    sizes = ("--samples", 8, "--sequence-length", 32)
    outcome = run_cli(
        "profile", tiny_checkpoint, "-o", tmp_path / "p", "--calibration", text_file, *sizes, *made_with.split()
    )
    assert outcome.code == 0, outcome.err
    outcome = compress(tiny_checkpoint, tmp_path / "out", tmp_path / "p", *options.split(), "--quiet")
    assert (outcome.code, outcome.err.count("\n"), words in outcome.err) == (2, 1, True), outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("changed", ["no dtype in the config", "a profile in bfloat16"])
def test_a_profile_knows_its_model_whatever_dtype_it_was_read_in(
    checkpoint_copy: Path, text_file: Path, tmp_path: Path, changed: str
) -> None:
    model, options = checkpoint_copy, OPTIONS
    if changed == "no dtype in the config":
        facts = json.loads((model / "config.json").read_text())
        del facts["dtype"]
        (model / "config.json").write_text(json.dumps(facts))
    else:
        options = (*OPTIONS, "--dtype", "bfloat16")
    outcome = run_cli("profile", model, "-o", tmp_path / "p", "--calibration", text_file, *options)
    assert outcome.code == 0, outcome.err
    outcome = compress(model, tmp_path / "out", tmp_path / "p", "--ratio", 0.3)
    assert outcome.code == 0, outcome.err
    modegpt.load(tmp_path / "out")


def test_predictions_are_needed_for_a_limit_on_the_perplexity(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--max-perplexity-increase", "10%", "--method", "modegpt")
    outcome = run_cli("compress", tiny_checkpoint, "-o", tmp_path / "out", *options)
    assert outcome.code == 2
    assert (
        "--max-perplexity-increase needs predictions; use --allocation sensitivity, not block-influence" in outcome.err
    )


def test_a_small_part_of_a_model_can_be_compressed_by_prediction(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    """Less than a hundredth of the blocks: no ratio is given, so none is out of reach."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    wide = tiny_llama(vocab_size=len(tokenizer), intermediate_size=1024)
    for part in (wide, tokenizer):
        part.save_pretrained(tmp_path / "wide")
    options = ("compress", tmp_path / "wide", *OPTIONS, "--layers", 1, "--modules", "qk", "--calibration", text_file)
    options = (*options, "--max-perplexity-increase", "300%", "--output")
    outcome = run_cli(*options, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert CompressionReport.read(tmp_path / "out").block_parameters.removed < 0.01
    outcome = run_cli(*options, tmp_path / "none", "--align", 64)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        2,
        "modegpt: nothing can be removed with --modules qk and --align 64: at most 0 of the decoder blocks' parameters "
        "can go; use less, more modules or layers, or a finer alignment",
    )


def test_the_profile_of_another_model_is_refused(profile: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    tiny_llama(seed=5, vocab_size=json.loads((other / "config.json").read_text())["vocab_size"]).save_pretrained(other)
    outcome = compress(other, tmp_path / "out", profile, "--ratio", 0.3)
    assert (outcome.code, "MODEL is not the one that was profiled" in outcome.err) == (2, True)


def _without_seed(origin: Any) -> None:
    del origin["options"]["seed"]


def _other_method(origin: Any) -> None:
    origin["options"]["method"] = "magic"


def _fewer_layers(content: Any) -> None:
    content["layers"].pop()
    content["profile"]["layers"].pop()


def _fewer_errors(content: Any) -> None:
    content["profile"]["layers"][0]["mlp"]["errors"].pop()


def _other_width(content: Any) -> None:
    module = content["profile"]["layers"][0]["mlp"]
    module["full"] -= 1
    module["errors"].pop()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("origin.json", _without_seed, "origin.json is not what modegpt profile writes"),
        ("origin.json", _other_method, "origin.json is not what modegpt profile writes"),
        ("profile.json", _fewer_layers, "the profile is not of a model of this shape"),
        ("profile.json", _fewer_errors, "holds no profile, or a damaged one"),
        ("profile.json", _other_width, "the profile is not of a model of this shape"),
    ],
)
def test_a_damaged_profile_is_refused(
    profile: Path, tiny_checkpoint: Path, tmp_path: Path, name: str, damage: Callable[[Any], None], words: str
) -> None:
    broken = Path(shutil.copytree(profile, tmp_path / "broken"))
    content = json.loads((broken / name).read_text())
    damage(content)
    (broken / name).write_text(json.dumps(content))
    for outcome in (
        compress(tiny_checkpoint, tmp_path / "out", broken, "--ratio", 0.3),
        run_cli("curve", broken),
    ):
        assert outcome.code == 2
        assert words in outcome.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["origin.json", "profile.json", "statistics/00001.safetensors"])
def test_half_a_profile_is_refused(profile: Path, tiny_checkpoint: Path, tmp_path: Path, missing: str) -> None:
    half = Path(shutil.copytree(profile, tmp_path / "half"))
    (half / missing).unlink()
    outcome = compress(tiny_checkpoint, tmp_path / "out", half, "--ratio", 0.3)
    assert outcome.code == 2
    assert "profile" in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_profile_leaves_nothing_under_its_name_and_is_made_again(
    profile: Path, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    arguments = ("profile", tiny_checkpoint, "-o", output, "--calibration", text_file, *OPTIONS)
    with patch.object(Profiler, "_divergences", side_effect=KeyboardInterrupt):
        assert run_cli(*arguments).code == 130
    assert not output.exists()
    assert run_cli(*arguments).code == 0
    assert (output / "profile.json").read_bytes() == (profile / "profile.json").read_bytes()
    assert run_cli(*arguments).code == 2
    assert run_cli(*arguments, "--overwrite").code == 0
    assert list(tmp_path.iterdir()) == [output]
    assert run_cli("profile", tiny_checkpoint, "-o", tiny_checkpoint, "--overwrite").code == 2


def test_the_curve_begins_with_the_dense_model_and_rises(profile: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = predicted_curve(profile)
    dense = sum(tensor.numel() for tensor in load_file(tiny_checkpoint / "model.safetensors").values())
    assert found.points[0].parameters == dense
    heights, sizes = [point.perplexity for point in found.points], [point.parameters for point in found.points]
    assert heights == sorted(heights)
    assert sizes == sorted(sizes, reverse=True)
    assert compress(tiny_checkpoint, tmp_path / "out", profile, "--ratio", 0.3).code == 0
    report = CompressionReport.read(tmp_path / "out")
    point = next(point for point in found.points if point.ratio == 0.3)
    assert point.parameters == report.parameters.compressed
    predicted = sum(sum((layer.divergence or {}).values()) for layer in report.layers)
    assert point.perplexity == pytest.approx(heights[0] * 2.718281828459045**predicted)
    assert report.predicted_loss == pytest.approx(predicted)
    assert f"{point.perplexity / heights[0]:.3f} times" in run_cli("inspect", tmp_path / "out").out
    outcome = run_cli("curve", profile, "--plot", tmp_path / "curve.svg")
    assert outcome.code == 0
    assert len(re.findall("knee", outcome.out)) == 1
    assert re.fullmatch(r"calibrated on 256 tokens of \S*calibration\.txt, measured on [\d,]+ others", found.text)
    assert "".join(found.text.split()) in "".join(outcome.out.split())
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    assert "--plot" in run_cli("curve", profile, "--plot", tmp_path / "curve.mp3").err


def test_what_attention_costs_together_is_in_the_curve_and_the_limit(
    profile: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    dearer = Path(shutil.copytree(profile, tmp_path / "dearer"))
    facts = json.loads((dearer / "profile.json").read_text())
    facts["profile"]["together"]["attention"] += 0.5
    (dearer / "profile.json").write_text(json.dumps(facts))
    assert compress(tiny_checkpoint, tmp_path / "out", dearer, "--max-perplexity-increase", "10%").code == 0
    report = CompressionReport.read(tmp_path / "out")
    alone = sum(layer[name]["divergence"] for layer in facts["profile"]["layers"] for name in ("qk", "vo"))
    attention, mlp = (
        sum(
            loss for layer in report.layers for name, loss in (layer.divergence or {}).items() if (name == "mlp") == own
        )
        for own in (False, True)
    )
    c = (facts["profile"]["together"]["attention"] - alone) / alone**2
    predicted = mlp + attention + c * attention**2
    assert 1.09 < math.exp(predicted) <= 1.1
    plain, found = predicted_curve(profile), predicted_curve(dearer)
    assert found.points[-1].perplexity > plain.points[len(found.points) - 1].perplexity


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (("--method", "modegpt", "--ridge", "1e-3"), ("--method", "modegpt")),
        (("--method", "obc", "--modules", "mlp"), ("--method", "obc")),
        (("--modules", "qk,vo"), ()),
    ],
)
def test_what_a_profile_settles_need_not_be_said_again(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, made: tuple[str, ...], given: tuple[str, ...]
) -> None:
    options = ("--calibration", text_file, "--samples", 8, "--sequence-length", 32)
    outcome = run_cli("profile", tiny_checkpoint, "-o", tmp_path / "p", *options, *made)
    assert outcome.code == 0, outcome.err
    outcome = compress(tiny_checkpoint, tmp_path / "out", tmp_path / "p", "--ratio", 0.05, *given)
    assert outcome.code == 0, outcome.err
    settled = CompressionReport.read(tmp_path / "out").options
    assert all(
        str(settled[name[2:]]) in (value, str(float(value) if name == "--ridge" else value.split(",")))
        for name, value in zip(made[::2], made[1::2], strict=True)
    )


def test_the_curve_of_maps_with_a_shared_factor(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--method", "joint-rank-k", "--joint-only", "--samples", 8, "--sequence-length", 32)
    outcome = run_cli("profile", tiny_checkpoint, "-o", tmp_path / "p", "--calibration", text_file, *options)
    assert outcome.code == 0, outcome.err
    for align in (1, 8):
        heights = [point.perplexity for point in predicted_curve(tmp_path / "p", align).points]
        assert len(heights) > 2
        # In steps of 8 the rest of a budget can fall to a whole map, which loses more than its parameters are worth.
        least = 1.0 if align == 1 else 0.95
        assert all(after >= least * before for before, after in pairwise(heights))


def test_the_knee_is_where_a_curve_bends() -> None:
    assert knee([0.0, 1.0, 2.0, 3.0, 14.0]) == 3
    assert knee([0.0, 0.0, 5.0, 10.0]) == 1
    assert knee([1.0]) == 0
