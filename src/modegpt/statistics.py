"""What calibration leaves behind for one decoder layer, and how it is gathered from the running stock model.

No attention is re-implemented: Transformers routes every attention through a named function, and an
observing one sees queries and keys after the rotary embedding. Hooks on two linear maps see the rest.

Sums are float64, of products of at most ``BLOCK_ROWS`` tokens in float32 (float64 for float64 models). A float32
product is off by about 1e-7 of its two channels' sizes, whatever the others are: the same noise that
float32 activations bring along. The decompositions treat what is below it as zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .data import TokenWindows
from .decompositions import Elimination
from .families import is_capped
from .layout import HeadShape, expert_count, intermediate_size, is_gated, query_key_value
from .logits import attended, logit_features
from .modeling import Family, is_joint
from .parallel import Workers

#: Tokens that :attr:`LayerStatistics.rows` are of, at most.
SAMPLED_ROWS = 16384
#: Tokens whose products are summed in float32 before they join the float64 sum.
BLOCK_ROWS = 2048
#: Keeps the squares of a zero vector finite, namely zero.
_TINY = 1e-30
#: A symmetric product is computed in at most this many column panels, each against itself and those after it.
PANELS, PANEL_WIDTH = 8, 384


def panels(n: int) -> list[slice]:
    """The column panels of a symmetric n x n product."""
    width = max(PANEL_WIDTH, -(-n // PANELS))
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


class GramSum:
    """C = sum over tokens of x^T x, (..., n, n) float64, for x (..., N, n) given piece by piece.

    Only the panels on and above the diagonal are computed: for wide x little more than half of the arithmetic.
    """

    def __init__(self, out: torch.Tensor | None = None) -> None:
        """The sum is kept in ``out`` (..., n, n) where given, zeros of float64."""
        self.resolution = 0.0
        self._sum = out
        self._panels: list[slice] = [] if out is None else panels(out.shape[-1])

    def add(self, x: torch.Tensor) -> None:
        """Add x^T x of x (..., N, n), in any floating-point dtype."""
        x = x if x.dtype == torch.float64 else x.float()
        self.resolution = torch.finfo(x.dtype).eps
        if self._sum is None:
            n = x.shape[-1]
            self._sum = torch.zeros(*x.shape[:-2], n, n, dtype=torch.float64, device=x.device)
            self._panels = panels(n)
        for rows in x.split(BLOCK_ROWS, dim=-2):
            for panel in self._panels:
                self._sum[..., panel, panel.start :] += rows[..., panel].mT @ rows[..., panel.start :]

    def total(self, workers: Workers) -> torch.Tensor:
        """The sum over all workers' tokens; this ends the accumulation."""
        assert self._sum is not None
        workers.sum(self._sum)
        for panel in self._panels:
            self._sum[..., panel.stop :, panel] = self._sum[..., panel, panel.stop :].mT
            own = self._sum[..., panel, panel]  # of which some routines round the halves differently
            own.copy_(own.triu() + own.triu(1).mT)
        return self._sum


class MomentSum:
    """The sums over tokens of x and of x^2, (..., 2, n) float64, for x (..., N, n) given piece by piece."""

    resolution = 0.0

    def __init__(self, out: torch.Tensor | None = None) -> None:
        """The sums are kept in ``out`` (..., 2, n) where given, zeros of float64."""
        self._sum = out

    def add(self, x: torch.Tensor) -> None:
        """Add those of x (..., N, n), in any floating-point dtype."""
        for rows in x.split(BLOCK_ROWS, dim=-2):
            wide = rows.double()
            both = torch.stack((wide.sum(-2), wide.square().sum(-2)), dim=-2)
            self._sum = both if self._sum is None else self._sum.add_(both)

    def total(self, workers: Workers) -> torch.Tensor:
        """The sums over all workers' tokens; this ends the accumulation."""
        assert self._sum is not None
        workers.sum(self._sum)
        return self._sum


#: Sums over tokens that a method can ask for; notation: d hidden size, m intermediate size, G key-value heads, g query
#: heads each, H = G g, h head size.
#:
#: mlp              C = Z^T Z of the input of the MLP's output map: (m, m). Of E experts: (E, m, m), each over the
#:                  tokens that are routed to it, times the router's weight, as the expert's output is
#: mlp_input        C = X^T X of what enters the MLP's maps into the intermediate space: (d, d); not with experts
#: attention_input  C = X^T X of the attention block's input, after its norm: (d, d)
#: query, key       C_q and C_k of every head after the rotary embedding: (G, g, h, h) and (G, h, h)
#: value            C = V^T V of every value head, without the value bias, as attention takes it: (G, h, h)
#: head_outputs     C = Z^T Z of what all heads put out, without the value bias: (H h, H h)
#: logits           F, the covariance of the features of every head's logits: (G, g, h, h), see decompositions.logits
#:
#: mlp_rows         no sum, see :attr:`LayerStatistics.rows`
#:
#: Of some activations only the sums of x and of x^2 can be had, which cost next to nothing: (2, n), see
#: :class:`MomentSum`. ``mlp_input`` is what goes into the MLP's first maps. Of experts they are (E, 2, n), each over
#: the tokens that are routed to it.
Statistic = Literal[
    "mlp",
    "mlp_input",
    "attention_input",
    "query",
    "key",
    "value",
    "head_outputs",
    "logits",
    "mlp_moments",
    "mlp_input_moments",
    "attention_input_moments",
    "head_outputs_moments",
    "mlp_rows",
]
#: Where queries and keys are normed, these are gathered with any others: U = sum of u^T u, u_i = n x_i^2 / sum_j x_j^2
#: for the n channels that go into a norm. Of queries (G, g, h, h) and keys (G, h, h), or, for norms over all heads,
#: (H h, H h) and (G h, G h).
Squares = Literal["query_squares", "key_squares"]


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one layer's activations, summed over ``tokens`` real (unmasked) tokens; sums are float64."""

    sums: Mapping[Statistic | Squares, torch.Tensor]
    tokens: int = 0
    resolution: float = 0.0
    """Relative precision of the products: those of float32, or of float64 for a model in float64."""
    expert_tokens: tuple[int, ...] | None = None
    """Tokens routed to each expert, where there are experts."""
    rows: torch.Tensor | None = None
    """What enters the MLP x at some tokens, see :func:`sampled_tokens`, in the order of the windows: (S, d) in the
    model's dtype. Of gated MLPs only, not of experts, and where asked for."""
    passed: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    """What becomes of the ``rows`` at the channels it is given, see :func:`through_mlp`; None without these."""
    eliminations: tuple[Elimination, ...] = ()
    """That of the MLP's channels, or of every expert's, where it was found before: it takes longer than all else that
    follows from the sums."""

    def __getitem__(self, name: Statistic) -> torch.Tensor:
        """One of the sums; raises ``KeyError`` where it was not asked for."""
        return self.sums[name]

    def squares(self, name: Squares) -> torch.Tensor | None:
        """The normalised squares of queries or keys; None where they have no norm."""
        return self.sums.get(name)

    def is_finite(self) -> bool:
        """Whether everything is free of NaN and infinity."""
        found = [*self.sums.values(), *([] if self.rows is None else [self.rows])]
        return all(bool(x.isfinite().all()) for x in found)

    def of_expert(self, expert: int) -> LayerStatistics:
        """The same with the MLP correlation and the tokens of one expert."""
        assert self.expert_tokens is not None
        own, known = self.with_mlp(self["mlp"][expert]), self.eliminations[expert : expert + 1]
        return replace(own, tokens=self.expert_tokens[expert], expert_tokens=None, eliminations=known)

    def with_mlp(self, gram: torch.Tensor) -> LayerStatistics:
        """The same with another MLP correlation."""
        return replace(self, sums={**self.sums, "mlp": gram})


def sampled_tokens(windows: TokenWindows) -> torch.Tensor:
    """Which tokens of all ``windows`` the rows are of: (N, T) bool, ``SAMPLED_ROWS`` at most.

    Of every window the first, which most attention goes to and whose activations are like no others', and from there
    one in so many real ones; of more windows than rows, only some.
    """
    real = torch.ones_like(windows.ids, dtype=torch.bool) if windows.mask is None else windows.mask
    count, length = real.shape
    every = math.ceil(length / max(1, SAMPLED_ROWS // count))
    window = torch.arange(count, device=real.device)[:, None] % math.ceil(count / SAMPLED_ROWS)
    return real & ((real.cumsum(1) - 1) % every == 0) & (window == 0)


AttentionObserver = Callable[..., None]
_observers: WeakKeyDictionary[nn.Module, AttentionObserver] = WeakKeyDictionary()


def _observing(implementation: str) -> str:
    """Register an attention function that shows its inputs and mask to an observer, then computes as before."""
    name = f"modegpt_observing_{implementation}"

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        """As Transformers calls an attention function."""
        if (observer := _observers.get(module)) is not None:
            observer(query, key, value, attention_mask, options)
        compute = sdpa_attention_forward
        if implementation == "eager":  # not registered by Transformers: every family has its own
            compute = sys.modules[type(module).__module__].eager_attention_forward
        return compute(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


@contextmanager
def observable(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the attention of ``model`` can be observed; its results do not change."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(_observing("eager" if previous == "eager" or is_capped(model) else "sdpa"))
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


class StatisticsCollector:
    """Accumulates the :class:`LayerStatistics` of one stock decoder layer while it runs."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        shape: HeadShape,
        wanted: Collection[Statistic],
        sampled: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Rows are taken where ``sampled`` (B, T) of every batch is true; of all real tokens where not given."""
        self._attention = layer.get_submodule(family.attention)
        self._family = family
        self._shape = shape
        self._wanted = wanted
        self._sampled = None if sampled is None else iter(sampled)
        self._rows: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None
        self._sums: dict[str, GramSum | MomentSum] = {}
        self._tokens = 0
        _, _, (_, self._value_bias) = query_key_value(layer, family, shape)
        self._experts: nn.Module | None = None
        self._device = next(layer.parameters()).device
        self._mlp_input: nn.Module | None = None
        self._mlp_output: nn.Module | None = None
        if expert_count(layer, family):
            self._experts = layer.get_submodule(str(family.experts))
            self._prepare_experts(self._experts)
        else:
            self._mlp_input = layer.get_submodule(family.mlp_inputs[0])
            self._mlp_output = layer.get_submodule(family.mlp_output)
        self._samples = "mlp_rows" in wanted and is_gated(layer, family)
        if "logits" in wanted:
            h = shape.head
            self._logits = torch.zeros(shape.heads, h, h, dtype=torch.float64, device=self._device)
            self._logit_sums = [GramSum(out) for out in self._logits]

    def _prepare_experts(self, experts: Any) -> None:
        """Zeros for every expert, since some may see no token."""
        count, d, m = experts.down_proj.shape
        device = experts.down_proj.device
        shapes = {"mlp": (m, m), "mlp_moments": (2, m), "mlp_input_moments": (2, d)}
        self._of_experts = {
            name: torch.zeros(count, *shape, dtype=torch.float64, device=device)
            for name, shape in shapes.items()
            if name in self._wanted
        }
        self._expert_sums = {name: [_sum_of(name)(part) for part in whole] for name, whole in self._of_experts.items()}
        self._routed = torch.zeros(count, dtype=torch.int64, device=device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Collect from every forward of the layer within this context."""
        attention, family = self._attention, self._family
        hooks = []
        if self._asked("attention_input"):
            inputs = attention.get_submodule(family.input_maps[-1])
            hooks.append(inputs.register_forward_pre_hook(self._input("attention_input")))
        if self._asked("head_outputs"):
            hooks.append(attention.get_submodule(family.output).register_forward_pre_hook(self._head_outputs))
        if self._experts is not None and self._of_experts:
            hooks.append(self._experts.register_forward_pre_hook(self._observe_experts))
        if self._mlp_output is not None and self._asked("mlp"):
            hooks.append(self._mlp_output.register_forward_pre_hook(self._input("mlp")))
        if self._mlp_input is not None and self._asked("mlp_input"):
            hooks.append(self._mlp_input.register_forward_pre_hook(self._input("mlp_input")))
        if self._mlp_input is not None and self._samples:
            hooks.append(self._mlp_input.register_forward_pre_hook(self._sample))
        for norm, name, projection in zip(family.norms, ("query", "key"), family.input_maps, strict=False):
            if self._wanted and norm is not None and getattr(attention, norm, None) is not None:
                joint = is_joint(getattr(attention, norm), self._count(name), self._shape.head)
                hooks.append(attention.get_submodule(projection).register_forward_hook(self._squares(name, joint)))
        with ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            _observers[attention] = self._observe
            stack.callback(_observers.pop, attention)
            yield

    def next_batch(self, batch: TokenWindows) -> None:
        """Announce the batch about to run."""
        self._real = batch.mask
        if self._samples:
            every = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
            self._chosen = (every if self._sampled is None else next(self._sampled)).flatten()
        self._mask = None if batch.mask is None else batch.mask.flatten()
        self._tokens += batch.tokens

    def result(self, workers: Workers) -> LayerStatistics:
        """The statistics of everything that all workers have seen."""
        sums = {name: gram.total(workers) for name, gram in self._sums.items()}
        grams: list[GramSum | MomentSum] = list(self._sums.values())
        routed = None
        if "logits" in self._wanted:
            for gram in self._logit_sums:
                gram.total(workers)
            sums["logits"] = self._logits
            grams += self._logit_sums
        lead = (self._shape.groups, self._shape.heads // self._shape.groups)
        for name in ("query", "query_squares", "logits"):
            if name in sums and sums[name].dim() == 3:
                sums[name] = sums[name].unflatten(0, lead)
        tokens = torch.tensor(self._tokens, device=next(self._attention.parameters()).device)
        workers.sum(tokens)
        if self._experts is not None and self._of_experts:
            for name, parts in self._expert_sums.items():
                for part in parts:
                    part.total(workers)
                sums[name] = self._of_experts[name]
                grams += parts
            workers.sum(self._routed)
            routed = tuple(self._routed.tolist())
        resolution = max((gram.resolution for gram in grams), default=0.0)
        rows = self._all_rows(workers) if self._samples else None
        return LayerStatistics(cast(Any, sums), int(tokens), resolution, routed, rows)

    def _count(self, name: str) -> int:
        return self._shape.heads if name == "query" else self._shape.groups

    def _asked(self, name: str) -> bool:
        return name in self._wanted or f"{name}_moments" in self._wanted

    def _input(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: self._add(name, args[0].flatten(0, -2))

    def _sample(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        self._rows.append(x[self._chosen.to(x.device)])  # a copy, so that the others need not stay

    def _all_rows(self, workers: Workers) -> torch.Tensor:
        """Those of all workers, in the order of the batches that they share."""
        own = {str(number): rows for number, rows in enumerate(self._rows)}
        found = [
            workers.tensors(own if source == workers.rank else None, source, self._device)
            for source in range(workers.size)
        ]
        numbers = range(max(map(len, found)))
        return torch.cat([rows[str(number)] for number in numbers for rows in found if str(number) in rows])

    def _head_outputs(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        outputs = args[0].flatten(0, -2)
        if self._value_bias is not None:  # it goes to the output whatever the attention is
            per_group = self._shape.heads // self._shape.groups
            outputs = outputs - self._value_bias.repeat_interleave(per_group, 0).flatten().to(outputs.dtype)
        self._add("head_outputs", outputs)

    def _observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> None:
        if "query" in self._wanted:
            for name, x in (("query", query), ("key", key)):
                self._add(name, x.transpose(1, 2).flatten(0, 1))  # (B T, heads, h)
        if "value" in self._wanted:
            values = value.transpose(1, 2).flatten(0, 1)
            self._add("value", values if self._value_bias is None else values - self._value_bias.to(values.dtype))
        if "logits" in self._wanted:
            scaling, softcap = options["scaling"], options.get("softcap")
            seen = attended(query, key, mask, real=self._real, scaling=scaling, softcap=softcap)
            for stands_for, attention in seen:
                self._logit_sums[attention.head].add(logit_features(attention, self._shape) * stands_for**0.5)

    def _squares(self, name: str, joint: bool) -> Callable[..., None]:
        def observe(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            x = output.detach() if output.dtype == torch.float64 else output.detach().float()
            x = x.flatten(0, -2).unflatten(-1, (-1, self._shape.head))  # (B T, heads, h)
            if self._family.norm_centred:
                x = x - x.mean(-1, keepdim=True)
            squares = x.flatten(-2).square() if joint else x.square()
            self._add(f"{name}_squares", squares / squares.mean(-1, keepdim=True).clamp_min(_TINY))

        return observe

    def _observe_experts(self, experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, weights = args  # (N, d), (N, k), (N, k)
        for expert in range(len(self._routed)):
            routed = chosen == expert
            if self._mask is not None:
                routed = routed & self._mask.to(routed.device)[:, None]
            tokens, slot = routed.nonzero(as_tuple=True)
            self._routed[expert] += len(tokens)
            if len(tokens):
                gate, up = nn.functional.linear(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
                seen = {"mlp": experts.act_fn(gate) * up * weights[tokens, slot, None], "mlp_input": hidden[tokens]}
                for name, sums in self._expert_sums.items():
                    sums[expert].add(seen[name.removesuffix("_moments")])

    def _add(self, name: str, x: torch.Tensor) -> None:
        """Add the real tokens of x (B T, ..., n) to what is asked for: one sum for each index in between."""
        rows = x.detach() if self._mask is None else x.detach()[self._mask.to(x.device)]  # (N, ..., n)
        for wanted in (name, f"{name}_moments"):
            if wanted in self._wanted or wanted.endswith("_squares"):
                self._sums.setdefault(wanted, _sum_of(wanted)()).add(rows.movedim(0, -2))  # (..., N, n)


def _sum_of(name: str) -> type[GramSum] | type[MomentSum]:
    return MomentSum if name.endswith("_moments") else GramSum


def through_mlp(
    layer: nn.Module, family: Family, rows: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """G = sigma(x W_G) and Z = G o (x W_U) (S, k) at the channels ``kept``, and Y = Z W_D of all channels (S, e).

    Of the ``rows`` x (S, d) that enter the gated MLP of a stock ``layer``, in float64 for rows in that and in float32
    for others. G is Z divided by x W_U, whatever the family calls its activation, and zero where that is.
    """
    output, up = layer.get_submodule(family.mlp_output), layer.get_submodule(family.mlp_inputs[-1])
    width, bias = intermediate_size(layer, family), getattr(output, "bias", None)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    gates, channels = (rows.new_empty(len(rows), len(kept), dtype=wide) for _ in range(2))
    outputs = torch.empty_like(rows, dtype=wide)
    here = slice(0)

    def up_maps(_: nn.Module, __: Any, out: torch.Tensor) -> None:
        gates[here] = out[0][:, -width:][:, kept].to(wide)

    def passed(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        channels[here], ups = args[0][0][:, kept].to(wide), gates[here]
        gates[here] = torch.where(ups == 0, 0.0, channels[here] / ups)
        outputs[here] = out[0].to(wide) if bias is None else out[0].to(wide) - bias.to(wide)

    with ExitStack() as stack, torch.no_grad():
        stack.callback(up.register_forward_hook(up_maps).remove)
        stack.callback(output.register_forward_hook(passed).remove)
        for start in range(0, len(rows), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            layer.get_submodule(family.mlp_inputs[-1].rpartition(".")[0])(
                rows[here].to(next(up.parameters()).dtype)[None]
            )
    return gates, channels, outputs
