"""Where a model comes from: a hub id, a local Hugging Face directory, or a GGUF file."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from .errors import CheckpointError, InvalidRequest
from .families import decoder_layers, family_of, is_capped
from .layered import LayeredModel
from .modeling import FAMILIES, recognise
from .stored import (
    INDEX_FILE,
    WEIGHTS_FILE,
    GGUFFile,
    JoinedTensors,
    SafetensorsDirectory,
    StoredTensors,
    fingerprint,
    shard_names,
)
from .weights import set_tensor

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
            if not (path / "config.json").is_file():
                raise InvalidRequest(f"MODEL {str(path)!r} has no config.json: not a Hugging Face model directory")
            SafetensorsDirectory(path)
        elif path.exists():
            raise InvalidRequest(f"MODEL {self.address!r} is neither a directory nor a .gguf file")
        elif path.is_absolute() or self.address.startswith((".", "~")) or self.address.count("/") > 1:
            raise InvalidRequest(f"MODEL {self.address!r}: no such directory")

    def config(self) -> PreTrainedConfig:
        """The model's config."""

        def read(address: str, **options: Any) -> PreTrainedConfig:
            if not self.is_gguf:
                recognise(PreTrainedConfig.get_config_dict(address)[0].get("model_type"))
            config: PreTrainedConfig = AutoConfig.from_pretrained(address, **options)
            return config

        return self._read(read, "config")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._read(AutoTokenizer.from_pretrained, "tokenizer")

    def streamed(
        self, config: PreTrainedConfig | None = None, dtype: Dtype = "auto", device: str = "cpu"
    ) -> LayeredModel:
        """The model with its decoder layers left on disk, to be read one at a time; ``config`` if known already."""
        config = config or self.config()
        return self._read(lambda *_, **__: self._streamed(config, dtype, torch.device(device)), "weights")

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
        if is_capped(model):
            model.set_attn_implementation("eager")
        model.to(device).eval()  # type: ignore[arg-type]
        return model

    def stored(self, names: Iterable[str], config: PreTrainedConfig) -> StoredTensors:
        """The checkpoint's tensors, for a model whose state dict has these ``names``."""
        if self.is_gguf:
            return GGUFFile(Path(self.address), names, config)
        stored = SafetensorsDirectory(self._directory())
        aliases = FAMILIES[config.model_type].description.stored_as
        return JoinedTensors(stored, names, aliases) if aliases else stored

    def fingerprint(self) -> str:
        """A hash that tells the weights from others."""
        if self.is_gguf:
            return fingerprint([Path(self.address)])
        return self._read(lambda *_, **__: fingerprint(SafetensorsDirectory(self._directory()).files), "weights")

    def directory(self) -> Path:
        """Where the checkpoint is on this machine; of a hub model, what its inference takes is fetched first."""
        directory: Path = self._read(lambda *_, **__: self._directory(), "weights")
        if not Path(self.address).is_dir():
            with suppress(EntryNotFoundError):  # not every model has one
                hf_hub_download(self.address, GENERATION_CONFIG_NAME)
        return directory

    def _streamed(self, config: PreTrainedConfig, dtype: Dtype, device: torch.device) -> LayeredModel:
        model = empty_model(config, self.trust_remote_code)
        stored = self.stored(model.state_dict(), config)
        chosen = self.dtype(dtype, config) or stored.dtype
        if _differ_though_tied(model, stored):  # as Transformers has it, the weights decide
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
        model = empty_model(config, self.trust_remote_code, chosen)
        family = family_of(model)
        found = _locate(model, stored)
        prefix = f"{model.base_model_prefix}.{family.description.layers}."

        def load(wanted: Iterable[str], outside: str = "") -> dict[str, torch.Tensor]:
            names = {found[f"{outside}{name}"]: name for name in wanted}
            tensors = stored.read(names, chosen, device)
            return {names[name]: tensor for name, tensor in tensors.items()}

        rest = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
        for name, tensor in load(rest).items():
            set_tensor(model, name, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in model.named_buffers():
            set_tensor(model, name, buffer.to(device))
        model.tie_weights()
        model.eval()
        if not self.is_gguf:
            with suppress(OSError):  # not every model has one
                model.generation_config = GenerationConfig.from_pretrained(self.address)
        of_layers = [list(layer.state_dict()) for layer in decoder_layers(model, family)]
        return LayeredModel(model, family, lambda index: load(of_layers[index], f"{prefix}{index}."))

    def dtype(self, wanted: Dtype, config: PreTrainedConfig) -> torch.dtype | None:
        """The dtype to load weights in: ``wanted``, or for ``auto`` the config's, and float32 for a GGUF file.

        None where the config names none: then it is that of the weights.
        """
        named = wanted if wanted != "auto" else "float32" if self.is_gguf else getattr(config, "dtype", None)
        named = getattr(torch, named, None) if isinstance(named, str) else named
        return named if isinstance(named, torch.dtype) else None

    def _directory(self) -> Path:
        """The local directory of the weights; a hub model's are fetched first."""
        if Path(self.address).is_dir():
            return Path(self.address)
        try:
            return Path(hf_hub_download(self.address, WEIGHTS_FILE)).parent
        except EntryNotFoundError:
            index = Path(hf_hub_download(self.address, INDEX_FILE))
        for name in shard_names(index):
            hf_hub_download(self.address, name)
        return index.parent

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
            if self.is_gguf and "architecture" in message:  # it advises newer versions, which do not have it either
                message = (
                    "Transformers reads no GGUF file of its architecture; give safetensors, from which it was made"
                )
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


def empty_model(
    config: PreTrainedConfig, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of ``config`` with its parameters on the meta device and its buffers computed."""
    options = {} if dtype is None else {"dtype": dtype}
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **options
        )
    model.tie_weights()
    return model


def _stored_name(name: str, model: PreTrainedModel, stored: StoredTensors) -> str | None:
    """The stored name of a tensor: a checkpoint of the base model alone has names without the base model's prefix."""
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return name if name in stored.shapes else short if short in stored.shapes else None


def _tied_groups(model: PreTrainedModel) -> list[list[str]]:
    """The names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _differ_though_tied(model: PreTrainedModel, stored: StoredTensors) -> bool:
    """Whether a checkpoint has different tensors for parameters that its config ties."""
    for group in _tied_groups(model):
        present = {found for name in group if (found := _stored_name(name, model, stored)) is not None}
        if len(present) > 1:
            first, *others = stored.read(sorted(present), torch.float32, torch.device("cpu")).values()
            if not all(torch.equal(first, other) for other in others):
                return True
    return False


def _locate(model: PreTrainedModel, stored: StoredTensors) -> dict[str, str]:
    """The stored name of every parameter and persistent buffer; refuses a checkpoint that lacks some.

    Of tied parameters any name will do.
    """
    found, problems = {}, []
    for name, tensor in model.state_dict().items():
        stored_name = _stored_name(name, model, stored)
        if stored_name is not None and stored.shapes[stored_name] != tuple(tensor.shape):
            problems.append(f"{name} is {stored.shapes[stored_name]} instead of {tuple(tensor.shape)}")
        elif stored_name is not None:
            found[name] = stored_name
    for group in _tied_groups(model):
        present = [found[name] for name in group if name in found]
        found |= dict.fromkeys(group, present[0]) if present else {}
    problems += [f"{name} is missing" for name in model.state_dict() if name not in found]
    if problems:
        raise CheckpointError(f"incomplete weights: {', '.join(problems[:3])}")
    return found


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
