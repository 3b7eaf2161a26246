"""Models for other engines: what a plain Llama or a GGUF file computes, against the model that it was made of."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

import modegpt
from family_table import BY_NAME, YARN, rope
from helpers import narrow_llama, rewrite, run_cli, tiny_llama, tiny_tokenizer, token_windows
from modegpt.budget import LayerRanks
from modegpt.engine import Engine
from modegpt.errors import InvalidRequest
from modegpt.exports.gguf_file import TYPES, write_gguf
from modegpt.exports.gguf_tokenizer import tokenizer_fields
from modegpt.exports.plain import LIKE_LLAMA, PlainDecoder, check_plain
from modegpt.exports.stock import stock_model
from modegpt.layered import resident
from modegpt.methods import ModeGPT
from modegpt.results import Choice
from modegpt.sources import ModelSource

PLAIN = [name for name, row in BY_NAME.items() if row.build().config.model_type in LIKE_LLAMA]
NORMED = ("qwen3", "qwen3-biases")
METHODS = ("modegpt", "flap", "svd", "joint-rank-k", "shortgpt")


def smaller(name: str, method: str | None, width: int = 48, **options: Any) -> PreTrainedModel:
    model = BY_NAME[name].build(intermediate_size=width)
    if method is None:
        return model
    return modegpt.compress(model, calibration=token_windows(8, 32), **{"ratio": 0.3, "method": method, **options})


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


# Plain Llamas


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in PLAIN for method in (None, "greedy", "obc")),
        *((name, method) for name in ("llama-gqa", "llama-biases", "phi3", "granite") for method in METHODS),
        *(("qwen3", method) for method in METHODS if method != "flap"),
    ],
)
def test_a_plain_llama_computes_the_same(name: str, method: str | None) -> None:
    """Or a plain Qwen3, whose heads have to be whole."""
    whole: dict[str, dict[str, Any]] = {"greedy": {"profile": "gguf", "width": 192}, "modegpt": {"modules": "mlp,vo"}}
    model = smaller(name, method, **whole.get(method or "", {}) if name in NORMED else {})
    plain = PlainDecoder(model)
    stock = stock_model(plain)
    assert type(stock) is (Qwen3ForCausalLM if name in NORMED else LlamaForCausalLM)
    ids = token_windows(2, min(24, plain.shape.context)).ids
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-4, atol=5e-5)


def test_beyond_its_context_it_is_another_model() -> None:
    """A window of 6 tokens is what the model has and a plain Llama has not."""
    model = smaller("mistral-window", None)
    plain = PlainDecoder(model)
    assert plain.shape.context == 6
    ids = token_windows(1, 24).ids
    assert (logits(stock_model(plain), ids) - logits(model, ids)).abs().max() > 0.1


def test_only_pairs_and_widths_that_some_layer_keeps_are_there() -> None:
    """Layers with pairs in common become heads as narrow as these."""
    model = narrow_llama()
    shape = PlainDecoder(model).shape
    assert (shape.head, shape.widths) == (4, (20, 24, 28))
    assert not shape.usual
    stock = stock_model(PlainDecoder(model))
    assert stock.config.rope_parameters["rope_type"] == "longrope"
    assert (stock.config.head_dim, stock.config.intermediate_size) == (4, 28)
    ids = token_windows(2, 48).ids
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-4, atol=5e-5)


def test_a_granite_stays_tied_and_has_no_multipliers() -> None:
    dense = BY_NAME["granite"].build(tie_word_embeddings=True)
    model = modegpt.compress(dense, calibration=token_windows(8, 32), ratio=0.3)
    plain = PlainDecoder(model)
    stock = stock_model(plain)
    assert stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()
    ids = token_windows(2, 24).ids
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-4, atol=5e-5)


def test_multipliers_change_weights_by_powers_of_two_or_less_than_that() -> None:
    """Granite's own multipliers, of which formats of few bits should see nothing."""
    own = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
    for tied in (True, False):
        model = BY_NAME["granite"].build(tie_word_embeddings=tied, **own)
        plain = PlainDecoder(model)
        assert plain.rest()["model.embed_tokens.weight"].equal(64 * model.model.embed_tokens.weight.detach())
        down = model.model.layers[0].mlp.down_proj.weight.detach().double()
        torch.testing.assert_close(plain.layer(0)["mlp.down_proj.weight"], 64 * 0.22 / 12 * down)
        ids = token_windows(2, 24).ids
        torch.testing.assert_close(logits(stock_model(plain), ids), logits(model, ids), rtol=1e-4, atol=5e-5)


def test_heads_that_lack_channels_of_their_norms_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="compress with --profile gguf or stock, which leave these whole"):
        PlainDecoder(smaller("qwen3", "greedy"))


def test_biases_that_a_plain_qwen3_has_no_place_for_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="a plain Qwen3 has no biases in its MLPs"):
        stock_model(PlainDecoder(smaller("qwen3", "flap")))


@pytest.mark.parametrize("name", ["olmo2", "gpt2", "mixtral", "gemma"])
def test_what_is_no_llama_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="MODEL cannot be a plain Llama: models of type"):
        check_plain(BY_NAME[name].build().config)


def test_widths_that_no_number_of_heads_divides_are_refused() -> None:
    """Which Transformers' config of a Llama forbids, and that of a Mistral does not."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    plain = PlainDecoder(BY_NAME["mistral"].build(**sizes))
    with pytest.raises(InvalidRequest, match="32 channels are no multiple of 3"):
        stock_model(plain)


def test_types_are_spelt_as_llama_cpp_spells_them_too(small: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", small, "-o", tmp_path / "x.gguf", "--format", "gguf", "--type", "Q8_0")
    assert outcome.code == 0, outcome.err
    assert "Q8_0" in {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (rope("yarn", **YARN), "llama.cpp has no 'yarn' rotary factors"),
        ({"attention_bias": True}, "llama.cpp has no biases"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_before_it_is_loaded(
    settings: dict[str, Any], words: str, tmp_path: Path, text_file: Path
) -> None:
    tokenizer = tiny_tokenizer(text_file.read_text())
    model = BY_NAME["qwen3"].build(vocab_size=len(tokenizer), **settings)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = token_windows(2, 24).ids
    torch.testing.assert_close(logits(stock_model(PlainDecoder(model)), ids), logits(model, ids), rtol=1e-4, atol=5e-5)
    with patch.object(ModelSource, "model", side_effect=AssertionError("it was loaded")):
        outcome = run_cli("export", tmp_path / "model", "-o", tmp_path / "x.gguf", "--format", "gguf")
    assert (outcome.code, words in outcome.err) == (2, True), outcome.err


def test_another_activation_and_adapters_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="the activation of its MLP is 'gelu', not 'silu'"):
        check_plain(tiny_llama(hidden_act="gelu").config)
    with pytest.raises(InvalidRequest, match="'slicegpt' has adapters"):
        PlainDecoder(smaller("llama-gqa", "slicegpt"))


# The command


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exports") / "small"
    options = ("--ratio", 0.3, "--calibration", text_file, "--samples", 8, "--sequence-length", 32)
    outcome = run_cli("compress", tiny_checkpoint, "-o", directory, *options)
    assert outcome.code == 0, outcome.err
    return directory


def test_a_stock_directory_needs_no_code_of_ours(small: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", small, "-o", tmp_path / "stock", "--format", "stock")
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "stock/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    stock, tokenizer = (kind.from_pretrained(tmp_path / "stock") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert type(stock) is LlamaForCausalLM
    model, ids = modegpt.load(small), tokenizer("the model keeps", return_tensors="pt")
    torch.testing.assert_close(logits(stock, ids.input_ids), logits(model, ids.input_ids), rtol=1e-4, atol=5e-5)
    texts = [one.generate(**ids, max_new_tokens=12, do_sample=False) for one in (stock, model)]
    assert texts[0].equal(texts[1])
    own, exported = (sum(p.numel() for p in one.parameters()) for one in (model, stock))
    assert f"Exported: {own:,} parameters as {exported:,} ({exported / own - 1:+.1%})" in outcome.out
    assert not [path for path in tmp_path.iterdir() if path.name != "stock"]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


def test_a_gguf_file_of_a_dense_model_is_read_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--format", "gguf", "--type", "f32", "-q")
    assert run_cli("export", tiny_checkpoint, "-o", tmp_path / "tiny.gguf", *options).out == ""
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    again = ModelSource(str(tmp_path / "tiny.gguf")).model()
    ids = token_windows(2, 24).ids
    torch.testing.assert_close(logits(again, ids), logits(dense, ids))
    fields, _ = read_gguf(tmp_path / "tiny.gguf")
    assert (fields["general.architecture"], fields["general.name"]) == ("llama", tiny_checkpoint.name)


@pytest.mark.parametrize("kind", TYPES)
def test_matrices_have_the_type_that_was_asked_for(small: Path, tmp_path: Path, kind: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    tokenizer = AutoTokenizer.from_pretrained(small)
    path, plain = tmp_path / "x.gguf", PlainDecoder(model)
    count = write_gguf(path, plain, kind, tokenizer_fields(tokenizer, 320), "x")
    _, tensors = read_gguf(path)
    assert count == sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    blocked = kind.startswith("q")
    for name, tensor in tensors.items():
        expected = TYPES[kind][0]
        if "norm" in name:
            expected = gguf.GGMLQuantizationType.F32
        elif blocked and name.startswith(("token_embd", "output.")):
            expected = gguf.GGMLQuantizationType.Q8_0
        assert tensor.tensor_type == expected, name
    stored = tensors["blk.0.ffn_up.weight"]
    found = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    wanted = model.model.layers[0].mlp.up_proj.weight.detach()
    bits = {"f32": 23, "f16": 10, "bf16": 7}.get(kind) or int(kind[1]) - 2
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2.0**-bits


@pytest.mark.parametrize(
    ("widths", "written", "architecture", "said"),
    [((40, 70, 100), [64, 96, 128], "deci", "64 to 128"), ((40, 50, 64), [64, 64, 64], "llama", "64")],
)
def test_layers_of_several_widths_are_another_architecture(
    widths: tuple[int, ...], written: list[int], architecture: str, said: str, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(text_file.read_text())
    model = tiny_llama(vocab_size=len(tokenizer), intermediate_size=128, num_hidden_layers=3)
    engine = Engine(resident(model), token_windows(8), 4)
    with engine.active():
        ranks = [LayerRanks(mlp=width, qk=4, vo=8) for width in widths]
        small = engine.compress(ModeGPT(1e-4), Choice(ranks, [{} for _ in ranks]), sequential=False).model
    modegpt.save(small, tmp_path / "small", tokenizer=tokenizer)
    path = tmp_path / "a.gguf"
    outcome = run_cli("export", tmp_path / "small", "-o", path, "--format", "gguf", "--type", "q8_0")
    assert outcome.code == 0, outcome.err
    assert f"MLPs of {said}, " in outcome.out
    fields, tensors = read_gguf(path)
    assert [int(tensors[f"blk.{index}.ffn_down.weight"].shape[0]) for index in range(3)] == written
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.feed_forward_length"] == (written if architecture == "deci" else written[0])


# K-quants


def quantizer(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``llama-quantize`` that is a shell ``script``, the only one on the PATH."""
    directory.mkdir()
    program = directory / "llama-quantize"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def export_k(model: Path, path: Path) -> Any:
    return run_cli("export", model, "-o", path, "--format", "gguf", "--type", "q4_k_m")


def test_a_k_quant_is_made_by_llama_cpp_of_the_whole_numbers(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer(tmp_path / "bin", f'echo "$3" > {tmp_path}/asked; cp "$1" "$2"', monkeypatch)
    (tmp_path / "out").mkdir()
    assert export_k(small, tmp_path / "out" / "x.gguf").code == 0
    assert (tmp_path / "asked").read_text() == "Q4_K_M\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.gguf"]
    f32 = ("--format", "gguf", "--type", "f32")
    assert run_cli("export", small, "-o", tmp_path / "out" / "y.gguf", *f32).code == 0
    assert (tmp_path / "out/x.gguf").read_bytes() == (tmp_path / "out/y.gguf").read_bytes()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo "no room" >&2; echo > "$2"; exit 3', "llama-quantize failed with exit code 3: no room"),
        ("exit 0", "llama-quantize failed with exit code 0: nothing said"),
    ],
)
def test_nothing_is_left_of_a_k_quant_that_failed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    quantizer(tmp_path / "bin", script, monkeypatch)
    (tmp_path / "out").mkdir()
    outcome = export_k(small, tmp_path / "out" / "x.gguf")
    assert (outcome.code, words in outcome.err) == (1, True), outcome.err
    assert not list((tmp_path / "out").iterdir())


def test_k_quants_need_the_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = export_k(tmp_path / "not there", tmp_path / "x.gguf")
    assert (outcome.code, "--type q4_k_m is made by llama.cpp's llama-quantize" in outcome.err) == (2, True)


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--format onnxx", "--format 'onnxx': use one of gguf, stock, onnx"),
        ("--format gguf --type q3", "--type 'q3': use one of f32, f16, bf16, q8_0"),
        ("--format stock --type q8_0", "--type q8_0 goes with --format gguf"),
        ("--format onnx --pre-tokenizer qwen2", "--pre-tokenizer qwen2 goes with --format gguf"),
    ],
)
def test_what_cannot_be_is_refused(small: Path, tmp_path: Path, options: str, words: str) -> None:
    outcome = run_cli("export", small, "-o", tmp_path / "x", *options.split())
    assert (outcome.code, words in outcome.err) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["gguf", "stock"])
def test_a_full_disk_is_one_line_and_leaves_nothing(small: Path, tmp_path: Path, target: str) -> None:
    command = [sys.executable, "-m", "modegpt", "export", str(small), "-o", "x", "--format", target, "--type"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    done = subprocess.run(
        [*command, "f16"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit)),
    )
    assert done.returncode == 1
    assert re.fullmatch(r"modegpt: --output x: [^\n]+; nothing was written\n", done.stderr.splitlines(True)[-1])
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_weights_that_a_type_cannot_hold_are_refused(checkpoint_copy: Path, tmp_path: Path) -> None:
    rewrite(checkpoint_copy, model__layers__0__mlp__up_proj__weight=torch.full((48, 32), 1e5))
    outcome = run_cli("export", checkpoint_copy, "-o", tmp_path / "x.gguf", "--format", "gguf")
    assert outcome.code == 2
    assert "blk.0.ffn_up.weight has weights that float16 cannot hold; use bf16 or f32" in outcome.err
    outcome = run_cli("export", checkpoint_copy, "-o", tmp_path / "x.gguf", "--format", "gguf", "--type", "bf16")
    assert outcome.code == 0, outcome.err


def test_a_file_of_several_widths_is_for_llama_cpp_alone(small: Path, tmp_path: Path) -> None:
    assert run_cli("export", small, "-o", tmp_path / "x.gguf", "--format", "gguf").code == 0
    outcome = run_cli("generate", tmp_path / "x.gguf", "The")
    assert (outcome.code, outcome.err.count("\n"), "pip install" in outcome.err) == (2, 1, False)
    assert "reads no GGUF file of its architecture; give safetensors" in outcome.err


def test_nothing_is_overwritten(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for name, words in (("mine", "is there already"), ("mine/x.gguf", "is a file")):
        outcome = run_cli("export", small, "-o", tmp_path / name, "--format", "gguf")
        assert (outcome.code, words in outcome.err) == (2, True)
    assert (tmp_path / "mine").read_text() == "precious"


def test_models_of_other_types_are_refused_before_they_are_loaded(checkpoint: Any, tmp_path: Path) -> None:
    outcome = run_cli("export", checkpoint("gpt2"), "-o", tmp_path / "x.gguf", "--format", "gguf")
    assert (outcome.code, "models of type 'gpt2' compute something else" in outcome.err) == (2, True)


# Tokenizers


def byte_level(*before: Any, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template="{{ messages }}")


def test_the_name_of_the_splitting_is_told_from_the_tokenizer() -> None:
    from modegpt.exports import gguf_tokenizer

    split = [pre_tokenizers.Split(Regex(one), "isolated") for one in (gguf_tokenizer._LLAMA3, gguf_tokenizer._QWEN2)]
    found = [
        tokenizer_fields(byte_level(use_regex=True), 8).pre,
        tokenizer_fields(byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True), 8).pre,
        tokenizer_fields(byte_level(split[0], use_regex=False), 8).pre,
        tokenizer_fields(byte_level(split[1], use_regex=False), 8).pre,
    ]
    assert found == ["gpt-2", "smollm", "llama-bpe", "qwen2"]
    other = byte_level(pre_tokenizers.Split(Regex("x"), "isolated"), use_regex=False)
    with pytest.raises(InvalidRequest, match="give it with --pre-tokenizer"):
        tokenizer_fields(other, 8)
    assert tokenizer_fields(other, 8, "mine").pre == "mine"


def test_tokens_types_and_merges_of_a_byte_level_tokenizer() -> None:
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_tokens(["word"])
    fields = tokenizer_fields(tokenizer, 6)
    assert fields.model == "gpt2"
    assert fields.tokens == ["a", "b", "ab", "<e>", "word", "[PAD5]"]
    kinds = gguf.TokenType
    assert fields.types == [kinds.NORMAL] * 3 + [kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED]
    assert (fields.merges, fields.scores) == (["a b"], None)
    assert (fields.special, fields.chat_template) == ({"eos": 3}, "{{ messages }}")
    assert fields.adds == {"space": False, "bos": False, "eos": False}


def test_scores_of_a_sentencepiece_tokenizer_are_the_order_of_its_merges() -> None:
    blank = "\N{LOWER ONE EIGHTH BLOCK}"
    tokens = ["<unk>", "<s>", "<0x0A>", blank, "a", "b", "ab", blank + "ab"]
    vocab = {name: number for number, name in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("a", "b"), (blank, "ab")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    tokenizer.decoder = decoders.ByteFallback()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fields = tokenizer_fields(fast, 8)
    kinds = gguf.TokenType
    assert (fields.model, fields.pre, fields.merges) == ("llama", "default", None)
    assert fields.types == [kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE, *[kinds.NORMAL] * 5]
    assert fields.scores is not None
    assert fields.scores[-2:] == [0.0, -1.0]
    assert fields.scores[4] == -2.0
    assert fields.adds == {"space": True, "bos": False, "eos": False}


def test_other_tokenizers_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a")))
    with pytest.raises(InvalidRequest, match="the tokenizer is no byte-pair encoding but 'WordLevel'"):
        tokenizer_fields(tokenizer, 8)


def test_what_is_put_around_text_has_to_be_first_and_last_tokens() -> None:
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_special_tokens({"bos_token": "<b>"})
    tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<b>", "<e>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<b> $A <e>", special_tokens=tokens)
    assert tokenizer_fields(tokenizer, 8).adds == {"space": False, "bos": True, "eos": True}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<e> <b> $A", special_tokens=tokens)
    with pytest.raises(InvalidRequest, match=r"llama.cpp puts no '<e>', '<b>' around text, as this"):
        tokenizer_fields(tokenizer, 8)


def test_tokens_that_take_blanks_away_are_told_of_or_known_by_name(
    checkpoint: Any, checkpoint_copy: Path, tmp_path: Path
) -> None:
    models = [checkpoint_copy, Path(shutil.copytree(checkpoint("phi3"), tmp_path / "small"))]
    for number, model in enumerate(models):
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([AddedToken(tokenizer.convert_ids_to_tokens(9), rstrip=True)])
        tokenizer.save_pretrained(model)
        outcome = run_cli("export", model, "-o", tmp_path / f"{number}.gguf", "--format", "gguf")
        assert outcome.code == 0, outcome.err
        assert ("llama.cpp keeps blanks beside" in outcome.err) == (number == 0)
    fields, _ = read_gguf(tmp_path / "1.gguf")
    assert fields["general.name"] == "small (Phi-3)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "a blank before text that is split"),
        ({"normalizer": normalizers.Lowercase()}, "no tokenizer with 'Lowercase'"),
        ({"normalizer": normalizers.NFD()}, "no tokenizer with 'NFD'"),
        ({"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.NFKD()])}, "no tokenizer with 'NFKD'"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "no tokenizer with 'Whitespace'"),
        ({"pre_tokenizer": None}, "no tokenizer with 'no bytes"),
        ({}, "the tokenizer has token 3, the model 2 embeddings"),
    ],
)
def test_tokenizers_that_change_text_in_other_ways_are_refused(change: dict[str, Any], words: str) -> None:
    tokenizer = byte_level(use_regex=True)
    for name, value in change.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    with pytest.raises(InvalidRequest, match=words):
        tokenizer_fields(tokenizer, 8 if change else 2)


def test_of_several_chat_templates_the_default_is_taken() -> None:
    tokenizer = byte_level(use_regex=True)
    tokenizer.chat_template = {"default": "{{ one }}", "tools": "{{ two }}"}
    assert tokenizer_fields(tokenizer, 8).chat_template == "{{ one }}"
