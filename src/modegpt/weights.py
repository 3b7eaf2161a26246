"""One decoder layer's weights in a common form, whatever the family calls them, and back.

Everything is in the paper's orientation (``y = x W``) and float64, the decompositions' dtype. Notation:
d hidden size, m intermediate size, G key-value heads, g query heads per key-value head, h head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .decompositions import couples, norm_energy, rotate
from .layout import HeadShape, Map, Norm, linear, mlp_maps, norms, query_key_value, rotary_pairs
from .modeling import Family


@dataclass(frozen=True)
class MLPWeights:
    """sigma(x W_U) W_D. Gated MLPs have two input maps, W_G and W_U, that share one selection.

    The input maps stay in the model's dtype: behind a nonlinearity, their channels can be chosen but not mixed.
    """

    inputs: tuple[torch.Tensor, ...]
    """Each (d, m)."""
    input_biases: tuple[torch.Tensor | None, ...]
    """Each (m,)."""
    output: torch.Tensor
    """W_D (m, d)."""
    output_bias: torch.Tensor | None = None
    """(d,)."""
    parts: int = 1
    """Input maps that are stored as one."""

    def maps(self) -> tuple[torch.Tensor, ...]:
        """The linear maps as they are stored, (in, out) float64: the inputs' and W_D."""
        stored = [self.inputs[start : start + self.parts] for start in range(0, len(self.inputs), self.parts)]
        return (*(torch.cat(one, dim=1).double() for one in stored), self.output)

    def select(self, kept: torch.Tensor, output: torch.Tensor) -> MLPWeights:
        """Only the channels ``kept`` (k,), with W_D' = ``output`` (k, d)."""
        return replace(
            self,
            inputs=tuple(weight[:, kept] for weight in self.inputs),
            input_biases=tuple(None if bias is None else bias[kept] for bias in self.input_biases),
            output=output,
            output_bias=self.output_bias,
        )


@dataclass(frozen=True)
class NormWeights:
    """x_i / sqrt(sum_j e_j x_j^2 / n) w_i + b_i, a norm of queries (G, g, h) or keys (G, h)."""

    weight: torch.Tensor
    """w, as the family stores it."""
    energy: torch.Tensor
    """e: for how many of the norm's n channels each one stands; ones where all are there."""
    bias: torch.Tensor | None
    joint: bool
    """Whether the sum goes over all heads."""

    def select(self, channels: torch.Tensor, squares: torch.Tensor | None) -> NormWeights:
        """Keep the ``channels`` (G, k); ``squares`` as in :class:`modegpt.statistics.LayerStatistics`.

        Without statistics those that stay stand for equally many of all.
        """
        chosen = _select(self.energy, channels)
        if squares is None:
            energy = torch.full_like(chosen, self.energy.shape[-1] / channels.shape[-1])
        elif self.joint:  # one head of all channels
            every = torch.arange(self.weight.numel(), device=channels.device).view_as(self.weight)
            energy = norm_energy(squares, _select(every, channels).flatten())
        else:
            energy = norm_energy(squares, _select(_positions(self.weight), channels))
        bias = None if self.bias is None else _select(self.bias, channels)
        return replace(self, weight=_select(self.weight, channels), energy=energy.view_as(chosen), bias=bias)

    def of_groups(self, kept: torch.Tensor, squares: torch.Tensor | None) -> NormWeights:
        """Keep all channels of the key-value heads ``kept`` (n,); ``squares`` as for :meth:`select`."""
        energy = self.energy[kept]
        if self.joint and squares is not None:
            every = torch.arange(self.weight.numel(), device=kept.device).view_as(self.weight)
            energy = norm_energy(squares, every[kept].flatten()).view_as(energy)
        elif self.joint:
            energy = energy * (len(self.weight) / len(kept))
        bias = None if self.bias is None else self.bias[kept]
        return replace(self, weight=self.weight[kept], energy=energy, bias=bias)


@dataclass(frozen=True)
class Units:
    """What of a group's queries and keys can only go together."""

    channels: torch.Tensor
    """(G, n, w): the w channels of each of n units, two where any rotate."""
    pairs: torch.Tensor | None
    """Rotary pairs (G, n), see :func:`modegpt.decompositions.couples`; None without rotary embedding."""

    def scores(self, of_channels: torch.Tensor) -> torch.Tensor:
        """Of every unit the sum over its channels (G, h): (G, n)."""
        return of_channels.gather(1, self.channels.flatten(1)).view(self.channels.shape).sum(-1)

    def select(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The channels (G, w k) of the units ``kept`` (G, k), all first ones first, and their rotary pairs (G, k)."""
        chosen = self.channels.gather(1, kept.unsqueeze(-1).expand(-1, -1, self.channels.shape[-1]))
        return chosen.mT.flatten(1), None if self.pairs is None else self.pairs.gather(1, kept)


@dataclass(frozen=True)
class QueryKeyWeights:
    """rho(x W_q + b_q) rho(x W_k + b_k)^T for every head."""

    query: torch.Tensor
    """(G, g, d, h)."""
    key: torch.Tensor
    """(G, d, h)."""
    query_bias: torch.Tensor | None
    """(G, g, h)."""
    key_bias: torch.Tensor | None
    """(G, h)."""
    query_norm: NormWeights | None = None
    key_norm: NormWeights | None = None
    rotary: int = 0
    """Channels of a head that the rotary embedding turns."""
    neighbours: bool = False
    """How it pairs them, see :class:`modegpt.layout.HeadShape`."""

    @property
    def full_rank(self) -> int:
        """Rotary pairs, or channels where none rotate, of a head."""
        return self.query.shape[-1] // (2 if self.rotary else 1)

    def maps(self) -> tuple[torch.Tensor, ...]:
        """W_q and W_k of all heads: (d, H h) and (d, G h)."""
        return self.query.permute(2, 0, 1, 3).flatten(1), self.key.permute(1, 0, 2).flatten(1)

    def rotary_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second channel of every rotary pair."""
        return rotary_pairs(self.rotary, self.neighbours, self.query.device)

    def units(self, scores: torch.Tensor) -> Units:
        """Rotary pairs, and couples by ``scores`` (G, h) of channels that do not rotate; singles where none does."""
        if not self.rotary:
            return Units(torch.arange(scores.shape[-1], device=scores.device).expand_as(scores).unsqueeze(-1), None)
        first, second, pairs = couples(scores, self.rotary, self.neighbours)
        return Units(torch.stack((first, second), dim=-1), pairs)

    def compact(self) -> tuple[QueryKeyWeights, torch.Tensor | None]:
        """All channels in the order that the compressed model has them in, and the rotary pairs (G, h / 2) of all."""
        if not self.rotary:
            return self, None
        first, second, pairs = couples(torch.zeros_like(self.key[:, 0]), self.rotary, self.neighbours)
        return self.select(torch.cat((first, second), dim=-1), None, None), pairs

    def of_groups(
        self, kept: torch.Tensor, query_squares: torch.Tensor | None, key_squares: torch.Tensor | None
    ) -> QueryKeyWeights:
        """Keep the key-value heads ``kept`` (n,) with their queries; the rest as for :meth:`select`."""
        return replace(
            self,
            query=self.query[kept],
            key=self.key[kept],
            query_bias=None if self.query_bias is None else self.query_bias[kept],
            key_bias=None if self.key_bias is None else self.key_bias[kept],
            query_norm=None if self.query_norm is None else self.query_norm.of_groups(kept, query_squares),
            key_norm=None if self.key_norm is None else self.key_norm.of_groups(kept, key_squares),
        )

    def turned(self, coefficients: torch.Tensor) -> QueryKeyWeights:
        """With queries whose pairs are rotated and scaled by ``coefficients`` (G, g, h): see :func:`rotate`."""
        pairs = self.rotary_pairs()
        bias = None if self.query_bias is None else rotate(self.query_bias, coefficients, *pairs)
        return replace(self, query=rotate(self.query, coefficients.unsqueeze(-2), *pairs), query_bias=bias)

    def select(
        self, channels: torch.Tensor, query_squares: torch.Tensor | None, key_squares: torch.Tensor | None
    ) -> QueryKeyWeights:
        """Keep the ``channels`` (G, k) of every group, in their order.

        Norms are given the statistics of their normalised squares, so that they go on to divide by the size of
        all channels.
        """
        return replace(
            self,
            query=_select(self.query, channels),
            key=_select(self.key, channels),
            query_bias=None if self.query_bias is None else _select(self.query_bias, channels),
            key_bias=None if self.key_bias is None else _select(self.key_bias, channels),
            query_norm=_select_norm(self.query_norm, channels, query_squares),
            key_norm=_select_norm(self.key_norm, channels, key_squares),
        )


@dataclass(frozen=True)
class ValueOutputWeights:
    """A (x W_v + b_v) W_o + b_o summed over the heads, A the attention weights.

    They sum to one for every head, so b_v W_o goes straight to the output and is part of ``output_bias`` here:
    no truncation reaches it.
    """

    value: torch.Tensor
    """(G, d, h)."""
    output: torch.Tensor
    """(G, g, h, d)."""
    output_bias: torch.Tensor | None
    """b_o + b_v W_o: (d,)."""

    def maps(self) -> tuple[torch.Tensor, ...]:
        """W_v and W_o of all heads: (d, G h) and (H h, d)."""
        return self.value.permute(1, 0, 2).flatten(1), self.output.flatten(0, 2)

    def select(self, channels: torch.Tensor) -> ValueOutputWeights:
        """Keep the value ``channels`` (G, k) of every group."""
        output = _select(self.output.mT, channels).mT
        return replace(self, value=_select(self.value, channels), output=output)


@dataclass(frozen=True)
class HeadWeights:
    """All of attention: what decides where it looks, and what it takes from there."""

    query_key: QueryKeyWeights
    value_output: ValueOutputWeights

    def select(
        self,
        kept: torch.Tensor,
        output: torch.Tensor,
        query_squares: torch.Tensor | None,
        key_squares: torch.Tensor | None,
    ) -> HeadWeights:
        """Keep the key-value heads ``kept`` (n,), with W_o = ``output`` (n, g, h, d); the rest as for queries and keys.

        What the values' biases put out stays, since it does not depend on the input.
        """
        value_output = replace(self.value_output, value=self.value_output.value[kept], output=output)
        return HeadWeights(self.query_key.of_groups(kept, query_squares, key_squares), value_output)


@dataclass(frozen=True)
class Factors:
    """Two thin maps in place of some of a module's linear maps, by their places in its ``maps``."""

    maps: tuple[int, ...]
    """More than one where they share the first factor."""
    first: torch.Tensor
    """A (in, k)."""
    seconds: tuple[torch.Tensor, ...]
    """B (k, out) of each map."""


def _select(x: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """The ``channels`` (G, k) of the last axis of x (G, ..., h)."""
    index = channels.view(len(channels), *[1] * (x.dim() - 2), channels.shape[-1])
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def _select_norm(norm: NormWeights | None, channels: torch.Tensor, squares: torch.Tensor | None) -> NormWeights | None:
    return None if norm is None else norm.select(channels, squares)


def _positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[-1], device=x.device).expand_as(x)


def read_mlp(layer: nn.Module, family: Family, expert: int | None = None) -> MLPWeights:
    """Copy a stock layer's MLP, or one of its experts, into the common form."""
    inputs, output = mlp_maps(layer, family, expert)
    bias = linear(layer, family.mlp_output)[1] if expert is None else None
    return MLPWeights(
        inputs=tuple(weight for weight, _ in inputs),
        input_biases=tuple(bias for _, bias in inputs),
        output=output.double(),
        output_bias=None if bias is None else bias.double(),
        parts=1 if expert is not None else len(inputs) // len(family.mlp_inputs),
    )


def mlp_tensors(mlp: MLPWeights, family: Family, expert: int | None = None) -> dict[str, torch.Tensor]:
    """A compressed MLP under the names and in the orientation of the compressed layer's state dict.

    Those of an ``expert`` have its number in place of the stacked tensors' first axis: see :func:`stack_experts`.
    """
    if expert is not None:
        gate_up = torch.cat([weight.T for weight in mlp.inputs])
        return {
            f"{family.experts}.gate_up_proj[{expert}]": gate_up,
            f"{family.experts}.down_proj[{expert}]": mlp.output.T,
        }
    tensors = _named(family.mlp_output, mlp.output.T, mlp.output_bias)
    for number, path in enumerate(family.mlp_inputs):
        parts = slice(number * mlp.parts, (number + 1) * mlp.parts)
        biases = [bias for bias in mlp.input_biases[parts] if bias is not None]
        weight = torch.cat(mlp.inputs[parts], dim=1)
        tensors |= _named(path, weight.T, torch.cat(biases) if biases else None)
    return tensors


def stack_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors named ``x[0]``, ``x[1]``, ... become one named ``x``; others stay."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith("]")}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith("]"):
            whole, _, number = name[:-1].partition("[")
            parts.setdefault(whole, {})[int(number)] = tensor
    return result | {name: torch.stack([found[key] for key in sorted(found)]) for name, found in parts.items()}


def read_query_key(layer: nn.Module, family: Family, shape: HeadShape) -> QueryKeyWeights:
    """Copy a stock layer's queries and keys into the common form."""
    groups, per_group = shape.groups, shape.heads // shape.groups
    query, key, _ = query_key_value(layer, family, shape)
    query_norm, key_norm = norms(layer, family, shape)
    if family.norm_centred:  # the mean over a head's channels is linear: the maps can subtract it
        query = _centred(query) if query_norm else query
        key = _centred(key) if key_norm else key
    return QueryKeyWeights(
        query=query[0].unflatten(1, (groups, per_group)).permute(1, 2, 0, 3),
        key=key[0].permute(1, 0, 2),
        query_bias=None if query[1] is None else query[1].unflatten(0, (groups, per_group)),
        key_bias=key[1],
        query_norm=_norm_weights(query_norm, groups, per_group),
        key_norm=_norm_weights(key_norm, groups),
        rotary=shape.rotary,
        neighbours=shape.neighbours,
    )


def _centred(found: Map) -> Map:
    weight, bias = found
    return weight - weight.mean(-1, keepdim=True), None if bias is None else bias - bias.mean(-1, keepdim=True)


def _norm_weights(norm: Norm | None, *lead: int) -> NormWeights | None:
    if norm is None:
        return None
    weight = norm.weight.unflatten(0, lead)
    bias = None if norm.bias is None else norm.bias.unflatten(0, lead)
    return NormWeights(weight, torch.ones_like(weight, dtype=torch.float64), bias, norm.joint)


def query_key_tensors(qk: QueryKeyWeights, pairs: torch.Tensor | None, family: Family) -> dict[str, torch.Tensor]:
    """Compressed queries and keys, and the rotary ``pairs`` they keep, as in the compressed layer's state dict."""
    attention = family.attention
    tensors = {
        **_named(f"{attention}.q_proj", qk.query.permute(0, 1, 3, 2).flatten(0, 2), qk.query_bias),
        **_named(f"{attention}.k_proj", qk.key.permute(0, 2, 1).flatten(0, 1), qk.key_bias),
        **({} if pairs is None else {f"{attention}.rotary_pairs": pairs}),
    }
    for name, norm in (("q_norm", qk.query_norm), ("k_norm", qk.key_norm)):
        if norm is not None:
            parts = {"weight": norm.weight, "energy": norm.energy, "bias": norm.bias}
            for part, tensor in parts.items():
                if tensor is not None:
                    tensors[f"{attention}.{name}.{part}"] = tensor.reshape(-1, tensor.shape[-1])
    return tensors


def read_value_output(layer: nn.Module, family: Family, shape: HeadShape) -> ValueOutputWeights:
    """Copy a stock layer's values and attention output into the common form."""
    _, _, (value, value_bias) = query_key_value(layer, family, shape)
    output, output_bias = linear(layer, f"{family.attention}.{family.output}")
    output = output.double().unflatten(0, (shape.groups, shape.heads // shape.groups, shape.head))
    bias = None if output_bias is None else output_bias.double()
    if value_bias is not None:
        carried = torch.einsum("gh,gnhd->d", value_bias, output)
        bias = carried if bias is None else bias + carried
    return ValueOutputWeights(value=value.permute(1, 0, 2), output=output, output_bias=bias)


def head_tensors(heads: HeadWeights, family: Family) -> dict[str, torch.Tensor]:
    """Compressed attention that has all channels of some heads, as in the compressed layer's state dict."""
    query_key, pairs = heads.query_key.compact()
    return query_key_tensors(query_key, pairs, family) | value_output_tensors(heads.value_output, family)


def value_output_tensors(vo: ValueOutputWeights, family: Family) -> dict[str, torch.Tensor]:
    """Compressed values and attention output as in the compressed layer's state dict."""
    attention = family.attention
    return {
        **_named(f"{attention}.v_proj", vo.value.permute(0, 2, 1).flatten(0, 1), None),
        **_named(f"{attention}.o_proj", vo.output.flatten(0, 2).T, vo.output_bias),
    }


def _named(path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {f"{path}.weight": weight, **({} if bias is None else {f"{path}.bias": bias.flatten()})}


def with_factors(
    tensors: Mapping[str, torch.Tensor], factors: Iterable[Factors], paths: Sequence[str]
) -> dict[str, torch.Tensor]:
    """A module's ``tensors`` with ``factors`` in place of some of its maps; ``paths`` are those of its ``maps``.

    A map's bias stays with its second factor.
    """
    result = dict(tensors)
    for one in factors:
        chosen = [paths[place] for place in one.maps]
        if len(chosen) > 1:
            result[f"{chosen[0].rpartition('.')[0]}.shared_input.weight"] = one.first.T
            result |= {f"{path}.weight": second.T for path, second in zip(chosen, one.seconds, strict=True)}
            continue
        (path,), (second,) = chosen, one.seconds
        del result[f"{path}.weight"]
        result |= _named(f"{path}.second", second.T, result.pop(f"{path}.bias", None))
        result[f"{path}.first.weight"] = one.first.T
    return result


def cast_like(tensors: Mapping[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
    """``tensors`` as ``layer`` would hold them: on its device, floating-point ones in its dtype."""
    reference = next(layer.parameters())
    return {
        name: tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }


def complete(module: nn.Module, tensors: Mapping[str, torch.Tensor], like: nn.Module) -> dict[str, torch.Tensor]:
    """The state of ``module``: ``tensors`` where named, else copies of those of the same name in ``like``."""
    source = like.state_dict()
    return {name: tensors[name] if name in tensors else source[name].clone() for name in module.state_dict()}


def copy_rest(module: nn.Module, source: nn.Module, *, outside: str, share: bool) -> None:
    """Give ``module`` the parameters and buffers of ``source`` whose name does not begin with ``outside``.

    They are copies unless ``share``.
    """
    for name, parameter in source.named_parameters():  # tied ones once: the model ties them again
        if not name.startswith(outside):
            data = parameter.detach() if share else parameter.detach().clone()
            set_tensor(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
    for name, buffer in source.named_buffers():
        if not name.startswith(outside):
            set_tensor(module, name, buffer if share else buffer.clone())


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` at the dotted ``name`` below ``module``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)
