"""Where a model comes from: a hub id, a local Hugging Face directory, or a GGUF file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import CheckpointError, InvalidRequest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelSource:
    """A model's address, with what is needed to read it. ``trust_remote_code`` stays off unless the user says so."""

    address: str
    trust_remote_code: bool = False

    @property
    def is_gguf(self) -> bool:
        """Whether this is a GGUF file, which is dequantised on loading."""
        return self.address.endswith(".gguf")

    def check(self) -> None:
        """Refuse a missing or visibly broken local model, before anything is loaded."""
        path = Path(self.address)
        if self.is_gguf:
            if not path.is_file():
                raise InvalidRequest(f"MODEL {self.address!r}: no such GGUF file")
        elif path.is_dir():
            _check_directory(path)
        elif path.exists():
            raise InvalidRequest(f"MODEL {self.address!r} is neither a directory nor a .gguf file")
        elif path.is_absolute() or self.address.startswith((".", "~")) or self.address.count("/") > 1:
            raise InvalidRequest(f"MODEL {self.address!r}: no such directory")

    def config(self) -> PreTrainedConfig:
        """The model's config."""
        config: PreTrainedConfig = self._read(AutoConfig.from_pretrained, "config")
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._read(AutoTokenizer.from_pretrained, "tokenizer")

    def model(self, dtype: Dtype = "auto", device: str = "cpu") -> PreTrainedModel:
        """The model in eval mode. ``auto`` is the dtype of the checkpoint, and float32 for a GGUF file."""
        chosen: Any = "float32" if dtype == "auto" and self.is_gguf else dtype
        chosen = chosen if chosen == "auto" else getattr(torch, chosen)
        options: dict[str, Any] = {"dtype": chosen} if self.is_gguf else {"dtype": chosen, "use_safetensors": True}

        def load(address: str, **arguments: Any) -> PreTrainedModel:
            model, info = load_causal_lm(address, **options, **arguments)
            problems = {kind: sorted(names)[:3] for kind, names in info.items() if names and kind != "unexpected_keys"}
            if problems:
                raise CheckpointError(f"incomplete weights: {problems}")
            return model

        model = self._read(load, "weights")
        if self.is_gguf:
            _forget_quantization(model)
        model.to(device).eval()  # type: ignore[arg-type]
        return model

    def _read(self, reader: Callable[..., _T], what: str) -> _T:
        """Call a ``from_pretrained`` and turn any failure into one line about this model."""
        try:
            if self.is_gguf:
                path = Path(self.address)
                with redirect_stderr(io.StringIO()):  # the dequantiser's own progress bar
                    return reader(str(path.parent), gguf_file=path.name)
            return reader(self.address, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # readers raise whatever their file format makes them stumble over
            message = " ".join(str(error).split())
            where = "" if Path(self.address).exists() else "no such directory here, and from the hub "
            raise InvalidRequest(f"MODEL {self.address!r}: {where}its {what} cannot be read: {message}") from error


def load_causal_lm(address: str | Path, **arguments: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``AutoModelForCausalLM.from_pretrained`` with its report on missing, unexpected and mismatched tensors."""
    arguments.setdefault("trust_remote_code", False)  # unset, Transformers asks, and a "y" on the input is enough
    loaded: Any = AutoModelForCausalLM.from_pretrained(address, output_loading_info=True, **arguments)
    return loaded[0], loaded[1]


def usable_device(name: str) -> str:
    """``name`` itself, or for ``auto`` the GPU where there is one; refuses a device that cannot compute in float64."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, dtype=torch.float64, device=name).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidRequest(f"--device {name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return name


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise InvalidRequest(
            f"the tokenizer has {len(tokenizer):,} tokens but the model embeds {config.vocab_size:,}: "
            "they do not belong together"
        )


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InvalidRequest(f"MODEL {str(path)!r} has no config.json: not a Hugging Face model directory")
    index = path / "model.safetensors.index.json"
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
        if not all(isinstance(name, str) for name in shards):
            raise TypeError("shard names must be strings")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"{index} is not a safetensors index: {error}") from error
    for name in shards or ["model.safetensors"]:
        file = path / name
        if not file.is_file():
            raise InvalidRequest(f"MODEL {str(path)!r} has no {name}; weights must be safetensors files")
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except Exception as error:
            raise InvalidRequest(f"{file} is not a complete safetensors file: {error}") from error


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a dequantised GGUF model an ordinary one: its weights are plain tensors, only the marks remain."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
    vars(model)["is_quantized"] = False
