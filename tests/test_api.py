"""Compression in memory, as Python users call it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import modegpt
from helpers import random_text, tiny_llama, tiny_tokenizer
from modegpt.modeling import FAMILIES

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


@pytest.mark.parametrize("tied", [False, True])
def test_the_dense_model_shares_nothing_with_the_compressed_one(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller = modegpt.compress(model, ratio=0.3, calibration=TOKENS)
    assert (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tied
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    smaller(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    smaller.half()
    smaller.generation_config.max_new_tokens = 3
    assert model.generation_config.max_new_tokens != 3
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_every_form_of_calibration_gives_the_same_model(letters: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = "".join(
        chr(32 + int(token) % 90) for token in torch.randint(0, 90, (400,), generator=torch.Generator().manual_seed(5))
    )
    path = tmp_path / "text.txt"
    path.write_text(text)
    windows = torch.tensor([ord(letter) for letter in text])
    windows = windows[: len(windows) // 16 * 16].view(-1, 16)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:8]
    options = {"ratio": 0.3, "samples": 8, "sequence_length": 16, "seed": 3, "allocation": "uniform"}
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
    model.config = FalconConfig()
    with pytest.raises(modegpt.InvalidRequest) as refusal:
        modegpt.compress(model, ratio=0.3, calibration=TOKENS)
    assert all(
        name in str(refusal.value)
        for name in ("'falcon'", "supported", *(name for name, known in FAMILIES.items() if not known.inferred))
    )


class Negated(LlamaForCausalLM):
    """The same weights and config, but another function."""


def quantised(model: LlamaForCausalLM) -> None:
    model.config.quantization_config = {"quant_method": "fp8"}


def wrapped(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)


def in_eight_bits(model: LlamaForCausalLM) -> None:
    model.model.layers[2].self_attn.o_proj.to(torch.float8_e4m3fn)


def of_another_class(model: LlamaForCausalLM) -> None:
    model.__class__ = Negated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantised, "quantised"),
        (wrapped, "layer 1: mlp.up_proj is not a plain linear map"),
        (in_eight_bits, "layer 2: self_attn.o_proj is not a plain linear map"),
        (of_another_class, "the model is a Negated; use a plain LlamaForCausalLM"),
    ],
)
def test_what_only_looks_like_a_stock_model_is_refused(
    change: Callable[[LlamaForCausalLM], None], message: str
) -> None:
    model = tiny_llama()
    change(model)
    with pytest.raises(modegpt.InvalidRequest, match=message):
        modegpt.compress(model, ratio=0.3, calibration=TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_compress_and_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")  # .to(dtype) would round the rotary frequencies as well
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    smaller = modegpt.compress(model, ratio=0.3, calibration=TOKENS, allocation="uniform")
    assert {parameter.dtype for parameter in smaller.parameters()} == {dtype}
    modegpt.save(smaller, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(modegpt.load(tmp_path / "small")(TOKENS).logits, smaller(TOKENS).logits)
    exact = modegpt.compress(tiny_llama(), ratio=0.3, calibration=TOKENS, allocation="uniform").compression_report
    for layer, reference in zip(smaller.compression_report.layers, exact.layers, strict=True):
        for name, module in layer.modules.items():
            assert module.relative_error == pytest.approx(reference.modules[name].relative_error, rel=0.2)


@pytest.mark.parametrize(
    "shape",
    [{"head_dim": 16}, {"num_hidden_layers": 1}, {"num_key_value_heads": 1}, {"head_dim": 6, "num_attention_heads": 2}],
    ids=str,
)
def test_other_shapes_compress_and_come_back(shape: dict[str, int], tmp_path: Path) -> None:
    smaller = modegpt.compress(tiny_llama(**shape), ratio=0.3, calibration=TOKENS, allocation="uniform")
    assert abs(smaller.compression_report.block_parameters.removed - 0.3) < 0.01
    modegpt.save(smaller, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(modegpt.load(tmp_path / "small")(TOKENS).logits, smaller(TOKENS).logits)


def test_the_model_can_be_copied_and_piped() -> None:
    smaller = modegpt.compress(tiny_llama(), ratio=0.3, calibration=TOKENS)
    twin = copy.deepcopy(smaller)
    with torch.no_grad():
        assert torch.equal(twin(TOKENS).logits, smaller(TOKENS).logits)


def test_loaded_and_saved_again_it_keeps_its_report(tmp_path: Path) -> None:
    modegpt.save(modegpt.compress(tiny_llama(), ratio=0.2, calibration=TOKENS), tmp_path / "one")
    loaded = modegpt.load(tmp_path / "one")
    modegpt.save(loaded, tmp_path / "two")
    assert modegpt.CompressionReport.read(tmp_path / "two") == modegpt.CompressionReport.read(tmp_path / "one")


def test_a_dense_model_is_not_saved_as_a_compressed_one(tmp_path: Path) -> None:
    with pytest.raises(modegpt.InvalidRequest, match="not a compressed model"):
        modegpt.save(tiny_llama(), tmp_path / "dense")


def test_self_calibration_samples_the_model() -> None:
    tokenizer = tiny_tokenizer(random_text(20, seed=0))
    options = {"ratio": 0.3, "samples": 4, "sequence_length": 16}
    model = tiny_llama(vocab_size=len(tokenizer))
    report = modegpt.compress(model, tokenizer, calibration="self", **options).compression_report
    assert (report.calibration.source, report.calibration.windows, report.calibration.tokens) == ("self", 4, 64)


def test_compress_to_directory_is_usable_from_python(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"samples": 4, "sequence_length": 32, "allocation": "uniform", "calibration": str(text_file)}
    config = modegpt.RunConfig.validated(model=str(tiny_checkpoint), output=tmp_path / "small", ratio=0.3, **settings)
    report = modegpt.compress_to_directory(config)
    assert modegpt.load(tmp_path / "small").compression_report == report
    assert report.command.startswith("modegpt.compress_to_directory(RunConfig(")


def test_perplexity_is_measured_in_evaluation_mode() -> None:
    model = tiny_llama(attention_dropout=0.5)
    expected = modegpt.perplexity(model, modegpt.TokenWindows(TOKENS))
    assert modegpt.perplexity(model.train(), modegpt.TokenWindows(TOKENS)) == expected
    assert model.training


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
