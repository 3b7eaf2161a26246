"""Exported models in the real llama.cpp: what it generates, and with which probabilities, against Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import modegpt
from helpers import narrow_llama, run_cli
from llama_cpp import LLAMA_CPP, llama_cpp, next_token
from modegpt.address import open_model

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
