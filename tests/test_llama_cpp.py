"""Exported models in the real llama.cpp: what it generates, and with which probabilities, against Transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import modegpt
from helpers import narrow_llama, run_cli, tiny_llama
from llama_cpp import LLAMA_CPP, llama_cpp, next_token
from modegpt.address import open_model
from modegpt.sources import ModelSource

PROMPTS = ("the model keeps the head of", "a decoder  layer\nreads 12 tokens", "Ünïcode is text, too: \N{SNOWMAN}!")


def assert_next(found: dict[int, float], model: PreTrainedModel, ids: list[int]) -> int:
    """Compare with what Transformers says; its likeliest token."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    token = int(logprobs.argmax())
    if found:
        assert next(iter(found)) == token
        assert found == pytest.approx({one: float(logprobs[one]) for one in found}, abs=0.01)
    return token


@LLAMA_CPP
@pytest.mark.parametrize("what", ["dense", "compressed", "narrow heads"])
def test_llama_cpp_goes_on_as_transformers_does(
    what: str, engine: str, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint
    if what == "compressed":
        model = tmp_path / "small"
        options = ("--ratio", 0.3, "--calibration", text_file, "--samples", 8, "--sequence-length", 32)
        assert run_cli("compress", tiny_checkpoint, "-o", model, *options).code == 0
    if what == "narrow heads":
        model = tmp_path / "narrow"
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
        modegpt.save(narrow_llama(vocab_size=len(tokenizer)), model, tokenizer=tokenizer)
    outcome = run_cli("export", model, "-o", tmp_path / "x.gguf", "--format", "gguf", "--type", "f32")
    assert outcome.code == 0, outcome.err
    tokenizer, _, open_it = open_model(str(model))
    own, compared = open_it(), 0
    with llama_cpp(tmp_path / "x.gguf") as server:
        for prompt in PROMPTS:
            ids = list(tokenizer(prompt)["input_ids"])
            assert_next(next_token(server, prompt), own, ids)  # that llama.cpp tokenises
            for _ in range(12):
                found = next_token(server, ids)
                compared += bool(found)
                ids.append(assert_next(found, own, ids))
    assert compared > 20


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama.cpp's llama-quantize is not on the PATH")
@LLAMA_CPP
@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_llama_cpp_reads_its_own_k_quants(engine: str, kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With the weights of the file itself; llama.cpp rounds what enters these matrices as well."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, initializer_range=0.05)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    path = tmp_path / "x.gguf"
    outcome = run_cli("export", tmp_path / "wide", "-o", path, "--format", "gguf", "--type", kind)
    assert outcome.code == 0, outcome.err
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()[:4]
    own = ModelSource(str(path)).model()
    with llama_cpp(path) as server:
        for prompt in PROMPTS:
            ids = list(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logprobs = own(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            found = next_token(server, ids)
            assert found == pytest.approx({one: float(logprobs[one]) for one in found}, abs=0.05)
