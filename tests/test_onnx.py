"""Exported graphs in the real ONNX Runtime and the real OpenVINO, token by token against Transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modegpt
from family_table import BY_NAME
from helpers import run_cli, token_windows
from modegpt.address import open_model

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("transformers.exporters", reason="this Transformers does not export")
try:
    import openvino
except ImportError:
    openvino = None

#: What runs a graph: from arrays by name to arrays by name.
Graph = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def in_onnx_runtime(path: Path) -> Graph:
    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def in_openvino(path: Path) -> Graph:
    """In float32 throughout, which is not what it does by itself on every processor."""
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: {one.any_name: array for one, array in model(inputs).items()}


ENGINES = {f"onnxruntime-{onnxruntime.__version__}": in_onnx_runtime}
if openvino is not None:
    ENGINES[f"openvino-{openvino.__version__.partition('-')[0]}"] = in_openvino


def continued(path: Path, engine: str, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Greedily, by the engine and the graph alone."""
    run, inputs = ENGINES[engine](path), onnxruntime.InferenceSession(path).get_inputs()
    names = {one.name for one in inputs}
    cache = {
        one.name: np.zeros((len(ids), int(one.shape[1]), 0, int(one.shape[3])), np.float32)
        for one in inputs
        if one.name.startswith("input.")
    }
    now = ids
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -now.shape[1] :]
        given = {"input_ids": now, "attention_mask": mask, "position_ids": positions}
        found = run({name: tensor.numpy() for name, tensor in given.items() if name in names} | cache)
        cache = {name: found[name.replace("input.", "output.", 1)] for name in cache}
        now = torch.from_numpy(found["logits"][:, -1].argmax(-1, keepdims=True))
        ids, mask = torch.cat((ids, now), dim=1), torch.cat((mask, torch.ones_like(now)), dim=1)
    return ids


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2", "mistral-window", "gemma2", "mixtral"])
def exported(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A compressed model and its graph."""
    small, graph = (tmp_path_factory.mktemp("onnx") / name for name in ("small", "graph"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dense = BY_NAME[request.param].build(vocab_size=len(tokenizer))
    model = modegpt.compress(dense, calibration=token_windows(8, 32), ratio=0.3, method="modegpt")
    modegpt.save(model, small, tokenizer=tokenizer)
    outcome = run_cli("export", small, "-o", graph, "--format", "onnx")
    assert outcome.code == 0, outcome.err
    return small, graph


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_go_on_as_transformers_does(exported: tuple[Path, Path], engine: str) -> None:
    tokenizer, _, open_it = open_model(str(exported[0]))
    tokenizer.padding_side, tokenizer.pad_token = "left", "</s>"
    inputs = tokenizer(["the model keeps", "a decoder layer reads the head of"], return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert not mask.bool().all()
    model = open_it()
    window = getattr(model.config, "sliding_window", None) or 0
    count = max(10, window + 4 - int(mask.sum(1).min()))  # beyond the window, where there is one
    wanted = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert continued(exported[1] / "decode.onnx", engine, ids, mask, count).equal(wanted)


def test_graphs_of_models_in_bfloat16_are_in_float32(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Which ONNX Runtime computes in."""
    dense = AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa"), dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(checkpoint("llama-gqa")).save_pretrained(tmp_path / "dense")
    outcome = run_cli("export", tmp_path / "dense", "-o", tmp_path / "graph", "--format", "onnx")
    assert outcome.code == 0, outcome.err
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
    found = continued(tmp_path / "graph" / "decode.onnx", next(iter(ENGINES)), ids, mask, 5)
    assert found.equal(dense.float().generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_what_cannot_be_traced_is_one_line(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    outcome = run_cli("export", checkpoint("llama-dynamic"), "-o", tmp_path / "graph", "--format", "onnx", "--quiet")
    assert outcome.code == 1
    assert re.fullmatch(r"modegpt: --format onnx: [^\n]*cannot trace this llama: [^\n]+\n", outcome.err)
    assert not list(tmp_path.iterdir())
