"""A plain decoder as a GGUF file, for llama.cpp and what is built on it.

Layers of one width are the architecture ``llama``; of several, ``deci``, the same block with sizes for every layer. In
both the channels 2 i and 2 i + 1 of a head rotate together, where Transformers has i and i + D / 2.

With query and key norms they are ``qwen3`` and ``openelm``. The latter has its queries, keys and values in one map and
no head of its own, so layers of a model whose head is not its embeddings get the width of the widest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from transformers import PreTrainedConfig

from ..errors import InvalidRequest
from ..files import replace_file
from ..modeling import stock_config
from .gguf_tokenizer import TokenizerFields
from .k_quants import K_QUANTS, quantize
from .plain import PlainDecoder, PlainShape, alike_in_gguf, check_plain, has_norms

#: What matrices can be stored as, and how a file of these is labelled.
TYPES = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
#: Rows of a multiple of this many numbers can be quantised in blocks.
BLOCK = 32
_BLOCKED = {kind for kind in TYPES if kind.startswith("q")}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NO_BIASES = "--format gguf: llama.cpp has no biases for models with query and key norms"
_REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def check_gguf(config: PreTrainedConfig) -> None:
    """Refuse the models of a ``config`` that llama.cpp has no place for, though they are plain decoders."""
    check_plain(config)
    stock: Any = stock_config(config)
    if not has_norms(config):
        return
    kind = (stock.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise InvalidRequest(
            f"--format gguf: llama.cpp has no {kind!r} rotary factors for models with query and key norms"
        )
    if getattr(stock, "attention_bias", False):
        raise InvalidRequest(_NO_BIASES)


def write_gguf(path: Path, plain: PlainDecoder, kind: str, fields: TokenizerFields, name: str) -> int:
    """Write ``plain`` with its tokenizer into the file ``path``; how many numbers.

    Matrices are one of :data:`TYPES`, or what llama.cpp makes of them for one of :data:`K_QUANTS`. MLPs get channels of
    zeros up to a multiple of 32. Norms, biases and rotary factors are float32; embeddings and head have 8 bits where
    the other matrices have fewer. A matrix whose rows are no multiple of 32 numbers stays in 16 bits.
    """
    counted: list[int] = []

    def write(file: Path) -> None:
        if kind not in K_QUANTS:
            counted.append(_write(file, plain, kind, fields, name))
            return
        whole = file.with_name(f"{file.name}.f32")
        try:
            counted.append(_write(whole, plain, "f32", fields, name))
            quantize(whole, file, kind)
        finally:
            whole.unlink(missing_ok=True)

    replace_file(path, write)
    return counted[0]


def gguf_widths(shape: PlainShape) -> list[int]:
    """Of the MLPs of all layers in a file."""
    return _Sizes.of(shape).widths


@dataclass(frozen=True)
class _Sizes:
    """What a file says of its layers."""

    architecture: str
    widths: list[int]
    heads: list[int]
    groups: list[int]

    @classmethod
    def of(cls, shape: PlainShape) -> _Sizes:
        widths = [-(-width // BLOCK) * BLOCK for width in shape.widths]
        sizes = cls("", widths, list(shape.heads), list(shape.groups))
        if alike_in_gguf(shape.normed, shape.tied):
            sizes = cls("", *([max(one)] * len(one) for one in (widths, shape.heads, shape.groups)))
        names = ("qwen3", "openelm") if shape.normed else ("llama", "deci")
        return replace(sizes, architecture=names[0 if sizes.same else 1])

    @property
    def same(self) -> bool:
        """Whether all layers are alike."""
        return len({*zip(self.widths, self.heads, self.groups, strict=True)}) == 1


def _write(path: Path, plain: PlainDecoder, kind: str, fields: TokenizerFields, name: str) -> int:
    sizes = _Sizes.of(plain.shape)
    writer = gguf.GGUFWriter(path, sizes.architecture, use_temp_file=True)  # a tensor at a time in memory
    spooled: Any = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - the writer closes it
    writer.temp_file = spooled  # where there has to be room for the file itself
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, plain.shape, sizes)
    fields.add_to(writer)
    count = 0
    for label, tensor in _tensors(plain, sizes):
        _add_tensor(writer, label, tensor, kind)
        count += tensor.numel()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count


def _add_sizes(writer: gguf.GGUFWriter, shape: PlainShape, sizes: _Sizes) -> None:
    writer.add_block_count(len(sizes.widths))
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_feed_forward_length(sizes.widths[0] if sizes.same else sizes.widths)
    writer.add_head_count(sizes.heads[0] if sizes.same else sizes.heads)
    writer.add_head_count_kv(sizes.groups[0] if sizes.same else sizes.groups)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.base)
    writer.add_layer_norm_rms_eps(shape.epsilon)


def _tensors(plain: PlainDecoder, sizes: _Sizes) -> Iterator[tuple[str, torch.Tensor]]:
    shape = plain.shape
    for name, tensor in plain.rest().items():
        yield _renamed(name, _REST), tensor
    if not shape.usual:
        yield "rope_freqs.weight", shape.factors()
    for index, (groups, width) in enumerate(zip(sizes.groups, sizes.widths, strict=True)):
        tensors = plain.layer(index, groups, width)
        if shape.normed and any(name.endswith(".bias") for name in tensors):
            raise InvalidRequest(_NO_BIASES)
        if sizes.architecture == "openelm":
            maps = [tensors.pop(f"self_attn.{one}_proj.weight") for one in "qkv"]
            yield f"blk.{index}.attn_qkv.weight", torch.cat(maps)
        for name, tensor in tensors.items():
            if not shape.normed and name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                tensor = _interleaved(tensor, shape.head)
            yield f"blk.{index}.{_renamed(name, _LAYER)}", tensor


def _renamed(name: str, names: dict[str, str]) -> str:
    owner, _, kind = name.rpartition(".")
    return f"{names[owner]}.{kind}"


def _interleaved(x: torch.Tensor, head: int) -> torch.Tensor:
    """Rows (heads * D, ...) with the first and the second channel of every pair next to each other."""
    pairs = x.unflatten(0, (-1, 2, head // 2))
    interleaved: torch.Tensor = pairs.transpose(1, 2).flatten(0, 2)
    return interleaved


def from_gguf(label: str, tensor: torch.Tensor, head: int) -> tuple[str, torch.Tensor]:
    """The name in Transformers of a file's ``tensor`` and its rows in the order there; heads have ``head`` channels."""
    *layer, owner, kind = label.split(".")
    names = {written: name for name, written in (_LAYER if layer else _REST).items()}
    if owner in ("attn_q", "attn_k"):
        tensor = tensor.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)
    name = f"{names[owner]}.{kind}"
    return f"model.layers.{layer[1]}.{name}" if layer else name, tensor


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    data: Any = tensor.to("cpu", torch.float32).contiguous().numpy()
    embeds, blocked = name.startswith(("token_embd", "output.")), kind in _BLOCKED
    if tensor.dim() < 2 or kind == "f32":
        writer.add_tensor(name, data)
    elif kind == "f16" or (blocked and tensor.shape[-1] % BLOCK):
        if not np.abs(data).max(initial=0) <= np.finfo(np.float16).max:
            raise InvalidRequest(f"--type {kind}: {name} has weights that float16 cannot hold; use bf16 or f32")
        writer.add_tensor(name, data.astype(np.float16))
    else:
        chosen = TYPES["q8_0" if blocked and embeds else kind][0]
        writer.add_tensor(name, gguf.quants.quantize(data, chosen), raw_dtype=chosen)
