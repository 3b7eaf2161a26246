"""Ranks for engines whose layers are all alike: what they may be, that none is better, and that nothing is padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import modegpt
from family_table import BY_NAME
from helpers import run_cli, tiny_llama, token_windows
from modegpt import tied
from modegpt.config import CompressionConfig
from modegpt.engine import Engine
from modegpt.errors import InvalidRequest
from modegpt.exports.plain import PlainDecoder
from modegpt.exports.stock import stock_model
from modegpt.layered import resident
from modegpt.least_loss import total_loss
from modegpt.report import CompressionReport
from modegpt.results import Choice

SIZES: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}


def compressed(profile: str, ratio: float, align: int = 1, **settings: Any) -> PreTrainedModel:
    model = tiny_llama(**{**SIZES, **settings})
    return modegpt.compress(model, calibration=token_windows(16, 32), ratio=ratio, profile=profile, align=align)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("profile", ["gguf", "stock"])
def test_nothing_is_padded(profile: str, ratio: float) -> None:
    model = compressed(profile, ratio)
    shape = PlainDecoder(model).shape
    blocks = model.compression_report.block_parameters
    # Within half a step of what is finest: 32 channels of one layer, or one channel of all.
    assert abs(blocks.removed - ratio) * blocks.dense <= (16 if profile == "gguf" else 3 / 2) * 3 * 32
    heads = {layer.self_attn.v_head_dim for layer in model.model.layers}
    assert heads == {shape.head}
    assert shape.head % tied.HEAD_MULTIPLE == 0
    assert len(set(shape.widths)) == 1 if profile == "stock" else all(width % 32 == 0 for width in shape.widths)
    pairs = torch.cat([layer.self_attn.rotary_pairs for layer in model.model.layers])
    assert len(pairs.unique(dim=0)) == 1
    if profile == "stock":
        stock = stock_model(PlainDecoder(model))
        own, other = (sum(p.numel() for p in one.parameters()) for one in (model, stock))
        assert own == other
        ids = token_windows(2, 24).ids
        with torch.no_grad():
            torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("profile", ["gguf", "stock"])
def test_heads_with_norms_stay_whole(profile: str, tied_head: bool) -> None:
    dense = BY_NAME["qwen3"].build(**SIZES, tie_word_embeddings=tied_head)
    model = modegpt.compress(dense, calibration=token_windows(16, 32), ratio=0.3, profile=profile)
    blocks = model.compression_report.block_parameters
    alike = profile == "stock" or not tied_head
    step = (3 if alike else 1) * (32 if profile == "gguf" else 1)  # channels: of all MLPs, or of one
    assert abs(blocks.removed - 0.3) * blocks.dense <= step / 2 * 3 * 32
    assert {layer.self_attn.qk_head_dim for layer in model.model.layers} == {32}
    exported = PlainDecoder(model)
    assert exported.shape.head == 32
    assert all(width % (32 if profile == "gguf" else 1) == 0 for width in exported.shape.widths)
    assert (len(set(exported.shape.widths)) == 1) == alike
    if profile == "stock":
        own, other = (sum(p.numel() for p in one.parameters()) for one in (model, stock_model(exported)))
        assert own - other == 3 * 32 * (2 * (4 + 2) - 2), "weights and energies of six heads in place of two weights"


@pytest.mark.parametrize("profile", ["gguf", "stock"])
def test_multipliers_make_no_difference(profile: str) -> None:
    dense = BY_NAME["granite"].build(**SIZES)
    model = modegpt.compress(dense, calibration=token_windows(16, 32), ratio=0.3, profile=profile)
    exported = PlainDecoder(model)
    assert {layer.self_attn.v_head_dim for layer in model.model.layers} == {exported.shape.head}
    ids = token_windows(2, 24).ids
    with torch.no_grad():
        torch.testing.assert_close(stock_model(exported)(ids).logits, model(ids).logits, rtol=1e-4, atol=5e-5)


def test_widths_for_k_quants() -> None:
    model = compressed("gguf", 0.3, intermediate_size=1024, align=256)
    shape = PlainDecoder(model).shape
    assert all(width % 256 == 0 for width in shape.widths)
    assert sum(shape.widths) < 3 * 1024
    assert shape.head == SIZES["head_dim"]


def chosen(profile: str, ratio: float, numbers: list[int] | None = None) -> tuple[Choice, float]:
    """The choice, among so many ``numbers`` of pairs only if given, and the total of its divergences."""
    engine = Engine(resident(tiny_llama(**SIZES)), token_windows(16, 32), 4)
    config = CompressionConfig.validated(ratio=ratio, profile=profile)
    usual = tied._numbers
    with engine.active(), patch.object(tied, "_numbers", lambda *given: numbers or usual(*given)):
        choice = engine.choose_ranks(config)
        assert choice.divergence is not None
        assert choice.loss == pytest.approx(total_loss(choice.divergence, engine.profile(config).interplay()))
        return choice, total_loss(choice.divergence, engine.profile(config).interplay())


@pytest.mark.parametrize("profile", ["gguf", "stock"])
def test_no_other_number_of_pairs_is_predicted_to_lose_less(profile: str) -> None:
    best, least = chosen(profile, 0.4)
    totals = {}
    for number in (4, 8, 12, 16):
        try:
            totals[number] = chosen(profile, 0.4, [number])[1]
        except InvalidRequest:
            continue
    assert len(totals) > 1
    assert least == pytest.approx(min(totals.values()))
    assert best.pairs is not None
    assert totals[len(best.pairs)] == min(totals.values())


def test_the_elimination_of_all_heads_predicts_the_sum_over_layers() -> None:
    """What the elimination adds up for all heads at once is what fits to each layer's own statistics lose."""
    engine = Engine(resident(tiny_llama(**SIZES)), token_windows(16, 32), 4)
    config = CompressionConfig.validated(ratio=0.3, profile="stock")
    with engine.active():
        profile = engine.profile(config)
        heads = tied._heads(engine, profile)
        for number in (4, 8, 12):
            kept = heads.ladder.kept(number)[0].tolist()
            ranks = [{"mlp": 192, "qk": number, "vo": 32} for _ in profile.layers]
            found = tied._divergence(engine, profile, heads, ranks, kept)
            assert sum(one["qk"] for one in found) == pytest.approx(heads.losses()[number], rel=1e-6)
            # Pairs of their own would do at least as well by their own layer's objective, greedy steps aside.
            free = sum(one["qk"] for one in profile.divergence(ranks))
            assert free <= 1.05 * heads.losses()[number]


def test_compression_from_a_profile_and_its_gguf_file(tmp_path: Path, tiny_checkpoint: Path, text_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = tiny_llama(**SIZES, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    texts = ("--calibration", text_file, "--samples", 8, "--sequence-length", 32)
    assert run_cli("profile", tmp_path / "dense", "-o", tmp_path / "profile", *texts).code == 0
    what = ("compress", tmp_path / "dense", "--ratio", 0.3, "--profile", "gguf")
    for name, how in (("a", ("--profile-from", tmp_path / "profile")), ("b", (*texts, "--evaluate", "none"))):
        outcome = run_cli(*what, *how, "-o", tmp_path / name)
        assert outcome.code == 0, outcome.err
    one, other = (CompressionReport.read(tmp_path / name).layers for name in "ab")
    assert one == other
    outcome = run_cli("export", tmp_path / "a", "--format", "gguf", "-o", tmp_path / "a.gguf")
    assert "(+0.0%)" in outcome.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method modegpt", "--profile gguf goes with --method greedy, not modegpt"),
        ("--allocation uniform", "--profile gguf needs predictions; use --allocation sensitivity, not uniform"),
        ("--statistics sequential", "--profile gguf goes with --statistics dense"),
        ("--layers 1-2", "--profile gguf makes all layers alike; leave out --layers"),
        ("--modules mlp", "--profile gguf makes all layers alike; leave out --layers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path, options: str, words: str
) -> None:
    what = ("compress", tiny_checkpoint, "--ratio", 0.3, "--profile", "gguf", "--calibration", text_file)
    outcome = run_cli(*what, "-o", tmp_path / "out", *options.split())
    assert (outcome.code, words in outcome.err) == (2, True), outcome.err
    assert not list(tmp_path.iterdir())


def test_models_that_are_no_llamas_are_refused_before_work_starts(
    checkpoint: Any, text_file: Path, tmp_path: Path
) -> None:
    what = ("--ratio", 0.3, "--profile", "stock", "--calibration", text_file, "-o", tmp_path / "out")
    for name, words in (("gpt2", "MODEL cannot be a plain Llama"), ("phi3-longrope", "a part of every head only")):
        outcome = run_cli("compress", checkpoint(name), *what, "--samples", 8, "--sequence-length", 16)
        assert (outcome.code, words in outcome.err) == (2, True), outcome.err


@pytest.mark.parametrize(("profile", "align"), [("gguf", 1), ("stock", 1), ("stock", 4)])
def test_a_target_is_never_passed(profile: str, align: int) -> None:
    """The finest step is one of a whole MLP or of all MLPs, not one channel of one."""
    options: dict[str, Any] = {**SIZES, "num_hidden_layers": 4}
    dense = sum(parameter.numel() for parameter in tiny_llama(**options).parameters())
    passed = 0.0
    for less in range(16000, 32000, 1600):
        small = modegpt.compress(
            tiny_llama(**options),
            calibration=token_windows(16, 32),
            target_parameters=dense - less,
            profile=profile,
            align=align,
        )
        left = dense - less - small.compression_report.parameters.compressed
        assert left >= 0
        passed = max(passed, left)
    assert passed <= (32 if profile == "gguf" else 4 * align) * 3 * 32  # a step


def test_a_ratio_out_of_reach_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"--ratio 0.95: out of reach with --profile gguf; use a smaller one"):
        compressed("gguf", 0.95)
