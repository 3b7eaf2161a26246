"""Exported models in the real llama.cpp: what it generates, and with which probabilities, against Transformers."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modegpt
from family_table import BY_NAME
from helpers import narrow_llama, run_cli, tiny_llama, token_windows
from llama_cpp import LLAMA_CPP, llama_cpp, next_token
from modegpt.address import open_model
from modegpt.exports.gguf_file import TYPES, write_gguf
from modegpt.exports.gguf_tokenizer import tokenizer_fields
from modegpt.exports.plain import PlainDecoder
from modegpt.sources import ModelSource
from test_inference import tiny_model

PROMPTS = ("the model keeps the head of", "a decoder  layer\nreads 12 tokens", "Ünïcode is text, too: \N{SNOWMAN}!")


#: Log-probabilities in llama.cpp are off by this at most, and by so much on average: it rounds on the way, and random
#: weights make much of it.
OFF, MEAN = 0.03, 0.004


def assert_next(found: dict[int, float], model: PreTrainedModel, ids: list[int]) -> tuple[int, list[float]]:
    """Compare with what Transformers says; its likeliest token, and by how much all were off."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    token = int(logprobs.argmax())
    if found:
        first = next(iter(found))
        assert first == token or float(logprobs[token] - logprobs[first]) < OFF
        assert found == pytest.approx({one: float(logprobs[one]) for one in found}, abs=OFF)
    return token, [abs(logprob - float(logprobs[one])) for one, logprob in found.items()]


def assert_goes_on(model: Path, file: Path) -> None:
    """Export ``model`` to ``file`` and compare llama.cpp's tokens and log-probabilities with Transformers'."""
    outcome = run_cli("export", model, "-o", file, "--format", "gguf", "--type", "f32")
    assert outcome.code == 0, outcome.err
    tokenizer, _, open_it = open_model(str(model))
    own, differences = open_it(), []
    with llama_cpp(file) as server:
        for prompt in PROMPTS:
            ids = list(tokenizer(prompt)["input_ids"])
            assert_next(next_token(server, prompt), own, ids)  # that llama.cpp tokenises
            for _ in range(12):
                token, off = assert_next(next_token(server, ids), own, ids)
                differences += off
                ids.append(token)
    assert len(differences) > 100
    assert sum(differences) / len(differences) < MEAN


@LLAMA_CPP
@pytest.mark.parametrize("what", ["dense", "compressed"])
def test_llama_cpp_goes_on_as_transformers_does(
    what: str, engine: str, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint
    if what == "compressed":
        model = tmp_path / "small"
        options = ("--ratio", 0.3, "--calibration", text_file, "--samples", 8, "--sequence-length", 32)
        assert run_cli("compress", tiny_checkpoint, "-o", model, *options).code == 0
    assert_goes_on(model, tmp_path / "x.gguf")


def smaller(name: str, vocabulary: int, **options: Any) -> PreTrainedModel:
    """A family's model, compressed."""
    model = BY_NAME[name].build(vocab_size=vocabulary, intermediate_size=192)
    return modegpt.compress(model, calibration=token_windows(16, 32), **{"ratio": 0.4, **options})


def with_equal_heads(profile: str, vocabulary: int) -> PreTrainedModel:
    """All heads with the same rotary pairs, but not all of them, which takes factors of the rotary frequencies."""
    dense = tiny_llama(head_dim=32, intermediate_size=192, vocab_size=vocabulary)
    model = modegpt.compress(dense, calibration=token_windows(16, 32), ratio=0.5, profile=profile)
    (pairs,) = torch.cat([layer.self_attn.rotary_pairs for layer in model.model.layers]).unique(dim=0)
    assert len(pairs) < 16
    assert pairs.tolist() != list(range(len(pairs)))
    return model


def with_norms(vocabulary: int, tied: bool = True, **options: Any) -> PreTrainedModel:
    """Queries and keys with norms, whose weights are not all ones."""
    sizes = {"vocab_size": vocabulary, "intermediate_size": 192, "tie_word_embeddings": tied, "head_dim": 32}
    model = BY_NAME["qwen3"].build(**sizes)
    return modegpt.compress(model, calibration=token_windows(16, 32), **{"ratio": 0.3, **options})


def inferred(model_type: str, vocabulary: int) -> PreTrainedModel:
    """Of a family that nobody described, compressed."""
    dense = tiny_model(model_type, vocabulary, intermediate_size=192)
    return modegpt.compress(dense, calibration=token_windows(16, 32), ratio=0.4)


#: With the architecture of the file: of layers of several widths ``deci``, with norms of queries and keys ``openelm``.
KINDS: dict[str, tuple[str, Callable[[int], PreTrainedModel]]] = {
    "narrow heads": ("llama", lambda count: narrow_llama(vocab_size=count)),
    "profile gguf": ("deci", partial(with_equal_heads, "gguf")),
    "profile stock": ("llama", partial(with_equal_heads, "stock")),
    "several widths": ("deci", partial(smaller, "llama-gqa")),
    "several numbers of heads": ("deci", partial(smaller, "llama-mha", method="obc", allocation="block-influence")),
    "biases": ("llama", partial(smaller, "llama-biases", allocation="uniform")),
    "biases, several widths": ("deci", partial(smaller, "llama-biases")),
    "qwen2": ("deci", partial(smaller, "qwen2")),
    "phi3": ("deci", partial(smaller, "phi3")),
    "granite": ("deci", partial(smaller, "granite")),
    "qwen3, one width": ("qwen3", partial(with_norms, profile="stock")),
    "qwen3, several widths": ("openelm", partial(with_norms, profile="gguf")),
    "qwen3, another head": ("qwen3", partial(with_norms, profile="gguf", tied=False)),
    "qwen3, several widths, another head": ("qwen3", partial(with_norms, modules="mlp,vo", tied=False)),
    "qwen3, several numbers of heads": ("openelm", partial(with_norms, method="obc", allocation="block-influence")),
    "partial rotary embedding": ("deci", partial(smaller, "phi3-longrope")),
    "helium": ("deci", partial(inferred, "helium")),
    "ernie4_5": ("deci", partial(inferred, "ernie4_5")),
    "cwm": ("deci", partial(inferred, "cwm")),
    "biases for means": ("deci", partial(smaller, "llama-mha", method="flap")),
    "fewer layers": ("llama", partial(smaller, "llama-gqa", method="shortgpt")),
    "llama3's rotary scaling": ("deci", partial(smaller, "llama-llama3")),
    "two thin maps": ("llama", partial(smaller, "llama-gqa", method="svd")),
}


@LLAMA_CPP
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_runs_all_kinds_of_compressed_models(
    kind: str, engine: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    architecture, build = KINDS[kind]
    modegpt.save(build(len(tokenizer)), tmp_path / "small", tokenizer=tokenizer)
    assert_goes_on(tmp_path / "small", tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["general.architecture"].contents() == architecture


QUANTIZER = pytest.mark.skipif(
    shutil.which("llama-quantize") is None, reason="llama.cpp's llama-quantize is not on the PATH"
)


def assert_reads(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """llama.cpp's log-probabilities are those of a ``model`` with the weights of the ``file``.

    But for what it rounds itself: what enters rounded matrices.
    """
    compared = 0
    with llama_cpp(file) as server:
        for prompt in PROMPTS:
            ids = list(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            found = next_token(server, ids)
            assert found == pytest.approx({one: float(logprobs[one]) for one in found}, abs=0.05)
            compared += len(found)
    assert compared > 5


@LLAMA_CPP
@pytest.mark.parametrize("kind", [*TYPES, *(pytest.param(kind, marks=QUANTIZER) for kind in ("q4_k_m", "q6_k"))])
def test_llama_cpp_reads_all_types(engine: str, kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With the weights of the file itself."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, initializer_range=0.05)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    path = tmp_path / "x.gguf"
    outcome = run_cli("export", tmp_path / "wide", "-o", path, "--format", "gguf", "--type", kind)
    assert outcome.code == 0, outcome.err
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()[:4]
    assert_reads(path, ModelSource(str(path)).model(), tokenizer)


@LLAMA_CPP
@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_llama_cpp_reads_rounded_layers_of_several_widths(
    engine: str, kind: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file's numbers stand for in a plain Llama, as benchmarks/quantised.py reads them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    rounded = importlib.import_module("quantised").rounded
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dense = tiny_llama(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, initializer_range=0.05)
    small = modegpt.compress(dense, calibration=token_windows(16, 32), ratio=0.3)
    path, fields = tmp_path / "x.gguf", tokenizer_fields(tokenizer, len(tokenizer))
    write_gguf(path, PlainDecoder(small), kind, fields, "small")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "deci"
    size, own = rounded(small, kind, fields)
    assert size == path.stat().st_size
    assert_reads(path, own, tokenizer)
