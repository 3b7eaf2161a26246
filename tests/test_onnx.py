"""Exported graphs in the real ONNX Runtime, token by token against Transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import modegpt
from family_table import BY_NAME
from helpers import run_cli, token_windows
from modegpt.address import open_model

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("transformers.exporters", reason="this Transformers does not export")
ENGINE = pytest.mark.parametrize("engine", [f"onnxruntime-{onnxruntime.__version__}"])


def continued(directory: Path, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Greedily, by ONNX Runtime and the graph in ``directory`` alone."""
    session = onnxruntime.InferenceSession(directory / "decode.onnx")
    names = [one.name for one in session.get_outputs()]
    cache = {
        one.name: np.zeros((len(ids), int(one.shape[1]), 0, int(one.shape[3])), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("input.")
    }
    now = ids
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -now.shape[1] :]
        given = {"input_ids": now, "attention_mask": mask, "position_ids": positions}
        wanted = {one.name for one in session.get_inputs()}
        inputs = {name: tensor.numpy() for name, tensor in given.items() if name in wanted} | cache
        found = dict(zip(names, session.run(None, inputs), strict=True))
        cache = {name: found[name.replace("input.", "output.", 1)] for name in cache}
        now = torch.from_numpy(found["logits"][:, -1].argmax(-1, keepdims=True))
        ids, mask = torch.cat((ids, now), dim=1), torch.cat((mask, torch.ones_like(now)), dim=1)
    return ids


@ENGINE
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_onnx_runtime_goes_on_as_transformers_does(
    name: str, engine: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    dense = BY_NAME[name].build(vocab_size=len(tokenizer))
    small = modegpt.compress(dense, calibration=token_windows(8, 32), ratio=0.3, method="modegpt")
    modegpt.save(small, tmp_path / "small", tokenizer=tokenizer)
    outcome = run_cli("export", tmp_path / "small", "-o", tmp_path / "onnx", "--format", "onnx")
    assert outcome.code == 0, outcome.err
    tokenizer.padding_side, tokenizer.pad_token = "left", "</s>"
    inputs = tokenizer(["the model keeps", "a decoder layer reads the head of"], return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert not mask.bool().all()
    _, _, open_it = open_model(str(tmp_path / "small"))
    wanted = open_it().generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert continued(tmp_path / "onnx", ids, mask, 10).equal(wanted)
