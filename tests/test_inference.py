"""Families that nobody described: taken for known only where their code is a described one's, else refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import modegpt
from helpers import run_cli, tiny_tokenizer, token_windows
from modegpt.engine import Engine
from modegpt.exports.plain import PlainDecoder, check_plain
from modegpt.exports.stock import stock_model
from modegpt.families import check_family
from modegpt.inference import infer_family
from modegpt.layered import resident
from modegpt.methods import SliceGPT
from modegpt.modeling import FAMILIES
from modegpt.results import Choice

INFERRED = {
    "glm": {"rotary": "neighbours", "partial_rotary": True, "mlp_inputs": ("mlp.gate_up_proj",)},
    "helium": {"rotary": "neighbours"},
    "ernie4_5": {"rotary": "neighbours"},
    "cwm": {},
}


def tiny_config(model_type: str, vocabulary: int = 128, **settings: Any) -> PreTrainedConfig:
    """A config of two layers, four heads and two groups."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return AutoConfig.for_model(model_type, **(sizes | settings))


def tiny_model(model_type: str, vocabulary: int = 128, **settings: Any) -> PreTrainedModel:
    """A random model of :func:`tiny_config`, whose family is inferred."""
    config = tiny_config(model_type, vocabulary, **settings)
    check_family(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize("model_type", INFERRED)
def test_a_family_written_like_described_ones_is_put_together_from_them(model_type: str) -> None:
    family = infer_family(AutoConfig.for_model(model_type))  # at its default, full sizes
    assert family is not None
    assert family.inferred
    assert family.description.differences() == INFERRED[model_type]
    assert FAMILIES[model_type] is family


@pytest.mark.parametrize("model_type", ["falcon", "gptj", "olmo", "qwen2_moe", "bloom", "mamba", "granitemoe"])
def test_what_is_written_otherwise_is_refused_with_what_would_work(model_type: str) -> None:
    """OLMo differs from Llama by a clamp of queries, keys and values that its config may never use."""
    with pytest.raises(modegpt.InvalidRequest, match=rf"'{model_type}' is not supported.*llama.*docs/families.md"):
        check_family(AutoConfig.for_model(model_type))
    assert model_type not in FAMILIES


def test_a_model_that_also_reads_images_is_refused_with_the_family_that_would_work() -> None:
    with pytest.raises(modegpt.InvalidRequest, match=r"'gemma3'.*text-only checkpoint.*'gemma3_text'"):
        check_family(AutoConfig.for_model("gemma3"))


def test_code_that_differs_in_one_line_is_not_taken_for_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.helium import modeling_helium

    mlp = modeling_helium.HeliumMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1e9, 1e9)
        return down_proj

    monkeypatch.setattr(mlp, "forward", forward)
    assert infer_family(tiny_config("helium")) is None
    assert "helium" not in FAMILIES


@pytest.mark.parametrize(("model_type", "option"), [("ernie4_5", "use_bias"), ("helium", "mlp_bias")])
def test_biases_are_no_reason_to_refuse(model_type: str, option: str) -> None:
    assert infer_family(tiny_config(model_type, **{option: True})) is not None


def test_every_config_of_an_undescribed_family_is_looked_at() -> None:
    """Qwen2-MoE without experts is written like Qwen2, with them like nothing described."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    plain, mixed = (tiny_config("qwen2_moe", mlp_only_layers=layers, **moe) for layers in ([0, 1], [0]))
    for _ in range(2):
        check_family(plain)
        with pytest.raises(modegpt.InvalidRequest, match="not supported") as caught:
            check_family(mixed)
        assert "qwen2_moe" not in str(caught.value).split("supported ones")[1]


def test_a_config_from_elsewhere_is_not_inferred() -> None:
    class OtherConfig(PreTrainedConfig):
        model_type = "other"

    assert infer_family(OtherConfig()) is None


@pytest.mark.parametrize("model_type", INFERRED)
def test_checkpoints_of_inferred_families_load_in_other_processes(
    model_type: str, tmp_path: Path, text_file: Path
) -> None:
    tokenizer = tiny_tokenizer(text_file.read_text())
    dense, output = tmp_path / "dense", tmp_path / "small"
    tiny_model(model_type, len(tokenizer)).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    options = ("--calibration", text_file, "--samples", 8, "--sequence-length", 32, "--quiet")
    outcome = run_cli("compress", dense, "--ratio", 0.3, "--output", output, *options)
    assert outcome.code == 0, outcome.err

    assert run_cli("generate", output, "the model", "--max-new-tokens", 3).code == 0
    assert "already compressed" in run_cli("compress", output, "--ratio", 0.3, "--output", tmp_path / "x", *options).err

    ids = torch.arange(20)[None] % len(tokenizer)
    with torch.no_grad():
        expected = modegpt.load(output)(ids).logits
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import sys, torch
{}
ids = torch.arange(20)[None] % model.config.vocab_size
with torch.no_grad():
    torch.testing.assert_close(model.eval()(ids).logits, torch.load(sys.argv[2], weights_only=True))
"""
    ours = "import modegpt; model = modegpt.load(sys.argv[1])"
    theirs = (
        "sys.modules['modegpt'] = None; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    for loading in (ours, theirs):
        subprocess.run(
            [sys.executable, "-c", script.format(loading), str(output), str(tmp_path / "expected.pt")], check=True
        )


def test_a_checkpoint_with_a_made_up_description_is_refused(tmp_path: Path, text_file: Path) -> None:
    """What ``compressed_family`` says is data from outside: it can name only what the stock model has."""
    tokenizer = tiny_tokenizer(text_file.read_text())
    model = tiny_model("helium", len(tokenizer))
    small = modegpt.compress(model, tokenizer, ratio=0.3, calibration=str(text_file), samples=8, sequence_length=32)
    modegpt.save(small, tmp_path / "small", tokenizer=tokenizer)
    file = tmp_path / "small" / "config.json"
    text = file.read_text()
    assert '"rotary": "neighbours"' in text
    for other in ('"attention": "nowhere"', '"mlp_output": 7', '"layers": "norm"'):
        file.write_text(text.replace('"rotary": "neighbours"', other))
        with pytest.raises(modegpt.CheckpointError):
            modegpt.load(tmp_path / "small")


@pytest.mark.parametrize("model_type", INFERRED)
def test_what_is_written_like_a_llama_can_be_exported_as_one(model_type: str) -> None:
    dense = tiny_model(model_type)
    for model in (dense, modegpt.compress(dense, calibration=token_windows(8, 32), ratio=0.3)):
        check_plain(model.config)
        ids = token_windows(2, 24).ids
        with torch.no_grad():
            logits = stock_model(PlainDecoder(model))(ids).logits
            torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("model_type", INFERRED)
def test_what_is_written_like_a_llama_can_be_sliced(model_type: str) -> None:
    dense, ids = tiny_model(model_type), token_windows(2, 24).ids
    engine = Engine(resident(dense), token_windows(16), 4)
    with engine.active(), torch.no_grad():
        whole, narrow = (
            engine.compress(SliceGPT(), Choice([{"stream": width}] * 2, [{}] * 2), sequential=True).model(ids).logits
            for width in (32, 20)
        )
        torch.testing.assert_close(whole, dense(ids).logits, rtol=1e-4, atol=5e-5)
        assert (narrow - whole).abs().max() > 1e-2


def test_what_is_around_the_layers_has_to_be_a_llamas_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.ernie4_5 import modeling_ernie4_5

    config = tiny_config("ernie4_5")
    check_family(config)
    check_plain(config)
    base = modeling_ernie4_5.Ernie4_5Model
    monkeypatch.setattr(base, "forward", transformers.GemmaModel.forward)
    with pytest.raises(modegpt.InvalidRequest, match="models of type 'ernie4_5' compute something else"):
        check_plain(config)
