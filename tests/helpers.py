"""Small building blocks for the tests: tiny random models and reproducible random tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
