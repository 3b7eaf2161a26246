"""Compression in memory, as Python users call it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import modegpt
from helpers import tiny_llama

TOKENS = torch.randint(0, 128, (6, 16), generator=torch.Generator().manual_seed(1))


class Letters:
    """A stand-in tokenizer: one token a letter."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    def __len__(self) -> int:
        return 128


@pytest.fixture
def letters() -> PreTrainedTokenizerBase:
    return Letters()  # type: ignore[return-value]


def test_compress_returns_a_model_that_generates_and_carries_its_report() -> None:
    model = tiny_llama()
    smaller = modegpt.compress(model, ratio=0.3, calibration=TOKENS, allocation="uniform", batch_size=3)
    assert smaller.generate(TOKENS[:1], max_new_tokens=4, do_sample=False).shape == (1, 20)
    report = smaller.compression_report
    assert report.requested_ratio == 0.3
    assert report.options["allocation"] == "uniform"
    assert report.parameters.compressed == smaller.num_parameters()
    assert report.calibration.sha256 == modegpt.TokenWindows(TOKENS).sha256()
    assert not smaller.training


def test_uncompressed_parts_are_shared_not_copied() -> None:
    model = tiny_llama()
    smaller = modegpt.compress(model, ratio=0.3, calibration=TOKENS)
    assert smaller.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert smaller.lm_head.weight is model.lm_head.weight


def test_every_form_of_calibration_gives_the_same_model(letters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = "".join(
        chr(32 + int(token) % 90) for token in torch.randint(0, 90, (400,), generator=torch.Generator().manual_seed(5))
    )
    path = tmp_path / "text.txt"
    path.write_text(text)
    windows = torch.tensor([ord(letter) for letter in text])
    windows = windows[: len(windows) // 16 * 16].view(-1, 16)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:8]
    options = {"ratio": 0.3, "samples": 8, "sequence_length": 16, "seed": 3}
    forms = [path, str(path), [text], windows[order], modegpt.TokenWindows(windows[order])]
    reports = [
        modegpt.compress(tiny_llama(), letters, calibration=form, **options).compression_report for form in forms
    ]
    assert len({report.calibration.sha256 for report in reports}) == 1
    assert all(report.layers == reports[0].layers for report in reports)


def test_saved_with_its_report(tmp_path: Path) -> None:
    smaller = modegpt.compress(tiny_llama(), ratio=0.2, calibration=TOKENS)
    modegpt.save(smaller, tmp_path / "out")
    assert modegpt.CompressionReport.read(tmp_path / "out") == smaller.compression_report
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{smaller.compression_report.block_parameters.removed:.1%}" in card
    with pytest.raises(modegpt.InvalidRequest, match="not empty"):
        modegpt.save(smaller, tmp_path / "out")
    modegpt.save(smaller, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.3, "calibration": "text.txt"}, "needs a tokenizer"),
        ({"ratio": 1.2}, "--ratio 1.2"),
        ({"ratio": 0.3, "modules": ("mlp", "heads")}, "'heads'"),
        ({"ratio": 0.3, "method": "magic"}, "--method 'magic'"),
        ({"ratio": 0.3, "surprise": 1}, "--surprise"),
        ({"ratio": 0.3, "calibration": ["text without a tokenizer"]}, "needs a tokenizer"),
        ({"ratio": 0.3, "calibration": TOKENS + 100}, "token id"),
        ({"ratio": 0.3, "calibration": TOKENS.float()}, "int64"),
        ({"ratio": 0.3, "calibration": TOKENS[0]}, r"\(N, T\)"),
    ],
)
def test_wrong_requests_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(modegpt.InvalidRequest, match=message):
        modegpt.compress(tiny_llama(), **{"calibration": TOKENS} | options)


def test_an_unsupported_family_is_named() -> None:
    model = tiny_llama()
    model.config.__class__.model_type, original = "mystery", model.config.__class__.model_type
    try:
        with pytest.raises(modegpt.InvalidRequest, match="'mystery' is not supported; supported families: llama"):
            modegpt.compress(model, ratio=0.3, calibration=TOKENS)
    finally:
        model.config.__class__.model_type = original


def test_perplexity_counts_predicted_real_tokens_only() -> None:
    model = tiny_llama()
    with torch.no_grad():
        logits = model(TOKENS).logits[:, :-1].flatten(0, 1)
        expected = float(torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).exp())
    assert modegpt.perplexity(model, modegpt.TokenWindows(TOKENS), batch_size=4) == pytest.approx(expected, rel=1e-5)

    padded = torch.cat((TOKENS, torch.zeros(6, 5, dtype=torch.int64)), dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, 16:] = False
    assert modegpt.perplexity(model, modegpt.TokenWindows(padded, mask)) == pytest.approx(expected, rel=1e-5)
