"""A model as an ONNX graph with its cache, by Transformers' exporter: any family, every layer with its own widths."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import InvalidRequest, ModeGPTError

#: The one graph: tokens after those in the cache, of which there can be none, to logits and the new cache.
GRAPH = "decode"
_PACKAGES = ("onnx", "onnxscript")


#: What tells a windowed layer's cache how long its window is, and a graph as the end of an input's name.
_WINDOW = "_sliding_window_tensor"


def onnx_dtype(dtype: str) -> str:
    """What weights of ``dtype`` are in a graph: ONNX Runtime does not compute in bfloat16, which most models are in."""
    if dtype == "bfloat16":
        raise InvalidRequest("--dtype bfloat16: ONNX Runtime does not compute in it; use float32 or float16")
    return "float32" if dtype == "auto" else dtype


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
    Raises :class:`ModeGPTError` for a model that the exporter cannot trace.
    """
    from transformers.exporters.base import ExportedModel
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # with nothing to mask, the graph would have no mask
    exporter: Any = OnnxExporter()
    inputs = {"input_ids": ids, "attention_mask": mask}
    with _silence():
        try:
            # The other parts, of which a runtime needs none, would take as long again.
            step, values = decompose_for_generation(model, inputs, multi_token_decode=True)[GRAPH]
            (component,) = exporter.export(step, values, OnnxConfig(dynamic=True)).components.values()
        except Exception as error:  # of PyTorch, of onnxscript, of Transformers
            problem = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModeGPTError(
                f"--format onnx: the exporter of Transformers cannot trace this {model.config.model_type}: {problem}"
            ) from error
        exported: Any = ExportedModel({GRAPH: component}, exporter.export_format, model.config, model.generation_config)
        exported.save_pretrained(directory)
    _settle_windows(directory / f"{GRAPH}.onnx", model)


def _settle_windows(path: Path, model: PreTrainedModel) -> None:
    """Make constants of inputs of the graph that only repeat the config: the lengths of sliding windows."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    inputs, outputs = graph.graph.input, graph.graph.output
    windows = [one for one in inputs if one.name.endswith(_WINDOW)]
    if not windows:
        return
    length = np.array(model.config.sliding_window, dtype=np.int64)
    for one in windows:
        graph.graph.initializer.append(onnx.numpy_helper.from_array(length, one.name))
        inputs.remove(one)
    for one in [one for one in outputs if one.name.endswith(_WINDOW)]:
        outputs.remove(one)
    onnx.save(graph, path)


@contextmanager
def _silence() -> Iterator[None]:
    """What exports says much, in several ways."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
