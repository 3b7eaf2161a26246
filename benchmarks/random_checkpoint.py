"""Random Llama checkpoints of any shape, with a tokenizer and a text of their own: written layer by layer.

    python benchmarks/random_checkpoint.py DIRECTORY --layers 4

Every matrix is normal with standard deviation 0.02, every norm is one. Each layer is a shard, so that building takes
little more memory than a layer, whatever the model's size. A word of the text is a number, and that token's id.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCALE = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with a head of its own."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: q and o, k and v, the gated MLP, and two norms."""
        keys = self.hidden // self.heads * self.groups
        return 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def rest_parameters(self) -> int:
        """Parameters of embeddings, last norm and head."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + self.rest_parameters

    def config(self, dtype: torch.dtype) -> LlamaConfig:
        """The config of a model of this shape."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            bos_token_id=None,
            eos_token_id=None,
            dtype=dtype,
        )


def build(directory: Path, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a random checkpoint of ``shape`` into ``directory``, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    shape.config(dtype).save_pretrained(directory)
    with torch.device("meta"):
        pattern = LlamaForCausalLM(replace(shape, layers=1).config(dtype))
    first = "model.layers.0."
    sizes = {name: tuple(parameter.shape) for name, parameter in pattern.named_parameters()}
    layer = [name for name in sizes if name.startswith(first)]
    shards = [{name: name for name in sizes if name not in layer}]
    shards += [{name.replace(first, f"model.layers.{index}."): name for name in layer} for index in range(shape.layers)]

    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(sizes[like], dtype, generator) for name, like in names.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": shape.parameters * dtype.itemsize}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    tokenizer(shape.vocabulary).save_pretrained(directory)


def _random(size: Iterable[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    size = tuple(size)
    return torch.ones(size, dtype=dtype) if len(size) == 1 else SCALE * torch.randn(size, generator=generator).to(dtype)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers below ``vocabulary``."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def write_text(path: Path, tokens: int, vocabulary: int, seed: int = 0) -> None:
    """Write a text of ``tokens`` random words."""
    choose = random.Random(seed)
    path.write_text(" ".join(str(choose.randrange(vocabulary)) for _ in range(tokens)))


def add_shape_options(parser: argparse.ArgumentParser, default: Shape) -> None:
    """The options that describe one layer of a model."""
    for name in ("hidden", "intermediate", "heads", "groups", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))


def shape_of(arguments: argparse.Namespace, layers: int) -> Shape:
    """The shape that the options of :func:`add_shape_options` describe."""
    names = ("hidden", "intermediate", "heads", "groups", "vocabulary")
    return Shape(layers=layers, **{name: getattr(arguments, name) for name in names})


#: About 44 million parameters a layer.
DEFAULT = Shape(layers=4, hidden=2048, intermediate=5632, heads=32, groups=4, vocabulary=32000)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=DEFAULT.layers)
    add_shape_options(parser, DEFAULT)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = shape_of(arguments, arguments.layers)
    build(arguments.directory, shape, getattr(torch, arguments.dtype), arguments.seed)


if __name__ == "__main__":
    main()
