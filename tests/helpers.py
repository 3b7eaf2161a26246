"""Small building blocks for the tests: tiny models, reproducible random tensors and text, the command line."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import modegpt
from modegpt import cli
from modegpt.budget import LayerRanks
from modegpt.config import RunConfig
from modegpt.data import TokenWindows
from modegpt.engine import Engine
from modegpt.journal import Journal, work_directory
from modegpt.layered import resident
from modegpt.methods import ModeGPT
from modegpt.pipeline import compress_to_directory
from modegpt.report import CompressionReport
from modegpt.results import Choice


def tiny_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama in float32 and eval mode; ``overrides`` are config values (also ``attn_implementation``).

    Weights are larger than Transformers' defaults, and norms and biases are random too, so that no part
    of a layer is close to the identity or to zero.
    """
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated float64 activations whose columns differ in size by up to a factor of ten."""
    sizes = torch.logspace(0, 1, columns, dtype=torch.float64)
    return randn(rows, columns, seed=seed) @ randn(columns, columns, seed=seed + 1000) * sizes


def squared(x: torch.Tensor) -> float:
    """The squared Frobenius norm."""
    return float(x.square().sum())


def token_windows(count: int = 8, length: int = 16, *, seed: int = 1) -> TokenWindows:
    """Random windows for the tiny models' 128 tokens."""
    return TokenWindows(torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed)))


WORDS = "the a model layer weight small large attends keeps removes channel head value query key of and to in"


def random_text(sentences: int, *, seed: int) -> str:
    """Sentences of twelve random words, one a line."""
    choose, words = random.Random(seed), WORDS.split()
    return "\n".join(" ".join(choose.choices(words, k=12)).capitalize() + "." for _ in range(sentences))


def tiny_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens trained on ``text``; it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Outcome:
    """Run ``modegpt`` with ``arguments`` in this process, its output going to wide files."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["modegpt", *map(str, arguments)]),
        patch.dict(os.environ, COLUMNS="200"),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def process_command(*arguments: object) -> list[str]:
    """The command line that runs ``modegpt`` in a process of its own."""
    return [sys.executable, "-m", "modegpt", *map(str, arguments)]


def run_process(*arguments: object) -> Outcome:
    """Run ``modegpt`` with ``arguments`` as a user does."""
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(process_command(*arguments), env=environment, capture_output=True, text=True)
    return Outcome(result.returncode, result.stdout, result.stderr)


def compress_arguments(
    model: object, output: object, calibration: object, *options: object, ratio: object = 0.3
) -> list[object]:
    """A ``compress`` command by the paper's method on few tokens; ``options`` override what is set here."""
    return [
        *("compress", model, "--ratio", ratio, "--output", output, "--calibration", calibration),
        *("--method", "modegpt"),
        *("--samples", 8, "--sequence-length", 32, *options),
    ]


def snapshot(*directories: Path) -> dict[str, str]:
    """Every path under ``directories``, hidden ones too, with a hash of what files hold."""
    paths = [path for directory in directories for path in sorted(directory.rglob("*"))]
    return {str(path): sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def compress_interrupted(config: RunConfig) -> CompressionReport:
    """Compress a model of three layers, interrupted after the second: no layer is kept twice, and nothing stays."""
    keep_layer, kept = Journal.keep_layer, []

    def keep(self: Journal, index: int, *arguments: Any) -> None:
        keep_layer(self, index, *arguments)
        kept.append(index)
        if kept == [0, 1]:
            raise KeyboardInterrupt

    with patch.object(Journal, "keep_layer", keep):
        with pytest.raises(KeyboardInterrupt):
            compress_to_directory(config)
        assert work_directory(config.output).is_dir()
        report = compress_to_directory(config)
    assert kept == [0, 1, 2]
    assert not work_directory(config.output).exists()
    return report


REMOTE = """
import sys, torch
sys.modules["modegpt"] = None  # as if it were not installed
from transformers import AutoModel, AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    AutoModel.from_pretrained(directory, trust_remote_code=True)
    model.save_pretrained(directory + "-again")
    with torch.no_grad():
        torch.save(model(torch.load(directory + "/ids.pt")).logits, directory + "/logits.pt")
"""


def assert_loads_alone(models: Mapping[str, PreTrainedModel], ids: torch.Tensor, scratch: Path) -> None:
    """Where modegpt is not installed, saved ``models`` give the same logits and can be saved again, complete."""
    for name, model in models.items():
        modegpt.save(model, scratch / name)
        torch.save(ids, scratch / name / "ids.pt")
    environment = os.environ | {"HF_HOME": str(scratch / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(scratch / name) for name in models]
    done = subprocess.run([sys.executable, "-c", REMOTE, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        expected = logits_of(model, ids)
        torch.testing.assert_close(torch.load(scratch / name / "logits.pt"), expected, rtol=1e-6, atol=1e-6, msg=name)
        again = scratch / f"{name}-again"
        assert {path.name for path in again.glob("*.py")} == {path.name for path in (scratch / name).glob("*.py")}
        assert torch.equal(logits_of(modegpt.load(again), ids), expected), name


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits (B, T, vocabulary) of windows without padding."""
    logits = model(input_ids=ids).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def narrow_llama(**settings: Any) -> PreTrainedModel:
    """A compressed Llama all of whose heads keep the rotary pairs 0 and 1 of four, with three different MLPs."""
    dense = tiny_llama(**settings)
    with torch.no_grad():
        for layer in dense.model.layers:
            for name in ("q_proj", "k_proj"):
                getattr(layer.self_attn, name).weight.unflatten(0, (-1, 2, 4))[:, :, 2:] *= 1e-3
    engine = Engine(resident(dense), token_windows(8, 32), 4)
    ranks = [LayerRanks({"mlp": 20 + 4 * index, "qk": 2, "vo": 3}) for index in range(3)]
    with engine.active():
        return engine.compress(ModeGPT(1e-4), Choice(ranks, [{}] * 3), sequential=False).model


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Change or (None) drop tensors in a checkpoint; double underscores stand for dots."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."))
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
