"""Linear maps made of two thin ones: a part of the runtime of a compressed model, see ``modeling_modegpt.py``.

This file travels with every checkpoint as well, so it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn


class FactorisedLinear(nn.Module):
    """x A B + b with A of shape (in, rank) and B of shape (rank, out)."""

    def __init__(self, like: nn.Linear, rank: int) -> None:
        """In place of the map ``like``, with its dtype and device; uninitialised."""
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.first = _linear(like, like.in_features, rank, bias=False)
        self.second = _linear(like, rank, like.out_features, bias=like.bias is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        result: torch.Tensor = self.second(self.first(x))
        return result


class BehindSharedInput:
    """Mixin before a stock MLP whose input maps share their first factor."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) to (B, T, d)."""
        shared: nn.Linear = self.shared_input  # type: ignore[attr-defined]
        result: torch.Tensor = super().forward(shared(hidden_states))  # type: ignore[misc]
        return result


@cache
def _behind_shared_input(stock: Any) -> Any:
    return type(f"ModeGPT{stock.__name__}", (BehindSharedInput, stock), {})


@cache
def _with_factors(stock: Any, name: str) -> Any:
    """A class for the modules whose map ``name`` is factorised: engines take all modules of one class for alike."""
    return type(f"Factorised{stock.__name__.removeprefix('Factorised')}", (stock,), {"__doc__": f"With {name} in two."})


def factorise(layer: nn.Module, stacks: Mapping[str, Sequence[str]], ranks: Mapping[str, int]) -> None:
    """Replace linear maps of a decoder ``layer`` by factorised ones of these ``ranks``.

    ``stacks`` has the paths of what can be factorised by the names that ``ranks`` goes by: of one map, or of maps of
    one module that then share their first factor, its ``shared_input``. Raises ``ValueError`` for anything else, and
    for a rank above that of the dense maps.
    """
    done: set[str] = set()
    for name, rank in ranks.items():
        if name not in stacks:
            raise ValueError(f"{name!r} is not one of {', '.join(stacks)}")
        paths = stacks[name]
        if not done.isdisjoint(paths):
            raise ValueError(f"{name!r} has a map that another entry has")
        done.update(paths)
        maps: list[Any] = [layer.get_submodule(path) for path in paths]
        inputs, outputs = maps[0].in_features, sum(linear.out_features for linear in maps)
        if rank > min(inputs, outputs):
            raise ValueError(f"{name!r} is {rank}; it is at most {min(inputs, outputs)}")
        place, _, child = paths[0].rpartition(".")
        owner: Any = layer.get_submodule(place)
        if len(maps) == 1:
            layer.set_submodule(paths[0], FactorisedLinear(maps[0], rank))
            owner.__class__ = _with_factors(cast(Hashable, type(owner)), child)
            continue
        for path, linear in zip(paths, maps, strict=True):
            layer.set_submodule(path, _linear(linear, rank, linear.out_features, bias=linear.bias is not None))
        if not hasattr(owner, "shared_input"):  # a module that knows what to do with it has one already
            owner.__class__ = _behind_shared_input(cast(Hashable, type(owner)))
        owner.shared_input = _linear(maps[0], inputs, rank, bias=False)


def _linear(like: nn.Linear, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """An uninitialised linear map."""
    return nn.Linear(inputs, outputs, bias=bias, device=like.weight.device, dtype=like.weight.dtype)
