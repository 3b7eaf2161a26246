"""A model as an ONNX graph with its cache, by Transformers' exporter: any family, every layer with its own widths."""

from __future__ import annotations

import importlib.util
import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InvalidRequest

#: The one graph: tokens after those in the cache, of which there can be none, to logits and the new cache.
GRAPH = "decode"
_PACKAGES = ("onnx", "onnxscript")


def check_onnx() -> None:
    """Refuse where what exports is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidRequest(f"--format onnx needs {' and '.join(missing)}; install: pip install {' '.join(_PACKAGES)}")
    if importlib.util.find_spec("transformers.exporters") is None:
        raise InvalidRequest("--format onnx needs a newer Transformers; install: pip install --upgrade transformers")


def write_onnx(directory: Path, model: PreTrainedModel) -> None:
    """Write ``decode.onnx``, its weights and the configs into ``directory``; batch and lengths stay free.

    The attention mask tells padding (on the left) from tokens. What a runtime has to do is in ``docs/engines.md``.
    """
    from transformers.exporters.base import ExportedModel
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # with nothing to mask, the graph would have no mask
    exporter: Any = OnnxExporter()
    inputs = {"input_ids": ids, "attention_mask": mask}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():  # it says much
        warnings.simplefilter("ignore")
        whole = exporter.export_for_generation(model, inputs, OnnxConfig(dynamic=True), multi_token_decode=True)
        only = {GRAPH: whole.components[GRAPH]}
        exported: Any = ExportedModel(only, whole.export_format, whole.config, whole.generation_config)
        exported.save_pretrained(directory)
