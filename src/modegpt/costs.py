"""What a compression costs, from the shapes alone: floating-point operations and bytes.

Notation: d hidden size, m intermediate size, H query heads, G key-value heads, h head size, T tokens in a
window. A multiplication and an addition count as two operations.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from .budget import Module
from .decompositions import gated, values
from .families import decoder_layers, family_of
from .layout import HeadShape, expert_count, mlp_maps, norms
from .logits import KEYS, QUERIES
from .modeling import Family
from .statistics import SAMPLED_ROWS, Statistic, panels

_K = TypeVar("_K")
_EXPERTS_EVERYWHERE: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Sizes:
    """The shapes of a stock model that costs depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head: int
    gates: int
    """Maps into the intermediate space: two for a gated MLP."""
    experts: int = 1
    routed: int = 1
    """Experts that a token goes through; one of one for a plain MLP."""
    normed: int = 0
    """Elements of the statistics of normed queries and keys."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        """The sizes of a stock model (which may be on the meta device); of its largest layer where they differ."""
        family = family_of(model)
        layers = decoder_layers(model, family)
        description = family.description
        layer = max(layers, key=lambda layer: sum(parameter.numel() for parameter in layer.parameters()))
        shape = HeadShape.of(layer, model.config, description)
        experts = expert_count(layer, description)
        inputs, output = mlp_maps(layer, description, 0 if experts else None)
        normed = 0
        for norm, heads in zip(norms(layer, description, shape), (shape.heads, shape.groups), strict=True):
            if norm is not None:
                normed += (heads * shape.head) ** 2 if norm.joint else heads * shape.head**2
        return cls(
            layers=len(layers),
            hidden=output.shape[1],
            intermediate=output.shape[0],
            heads=shape.heads,
            groups=shape.groups,
            head=shape.head,
            gates=len(inputs),
            experts=max(1, experts),
            routed=model.config.num_experts_per_tok if experts else 1,
            normed=normed,
        )

    def scaled(self, share: float) -> Sizes:
        """The same shape, about ``share`` as wide, with as many heads to a group and heads as large."""
        groups = max(1, round(self.groups * share))
        return replace(
            self,
            layers=1,
            hidden=max(8, round(self.hidden * share / 8) * 8),
            intermediate=max(8, round(self.intermediate * share / 8) * 8),
            heads=groups * self.heads // self.groups,
            groups=groups,
        )


def resized(config: PreTrainedConfig, family: Family, sizes: Sizes, vocabulary: int) -> PreTrainedConfig:
    """A config like ``config`` for a model of these ``sizes``, its layers all as its first ones."""
    result = copy.deepcopy(config)
    values = {
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        family.intermediate_size: sizes.intermediate,
        "num_attention_heads": sizes.heads,
        "vocab_size": vocabulary,
        "pad_token_id": None,
    }
    for name, value in (("num_key_value_heads", sizes.groups), ("head_dim", sizes.head)):
        if getattr(config, name, None) is not None:
            values[name] = value
    if sizes.experts > 1:  # every layer as those that have experts
        values |= {name: value for name, value in _EXPERTS_EVERYWHERE.items() if hasattr(config, name)}
    if getattr(config, "layer_types", None) is not None:
        values["layer_types"] = config.layer_types[: sizes.layers]
    result.update(values)
    return result


def layer_parameters(sizes: Sizes) -> int:
    """Weights of one decoder layer's linear maps that a token goes through: q and o, k and v, and the MLP's."""
    d, h, m = sizes.hidden, sizes.head, sizes.intermediate
    return 2 * d * sizes.heads * h + 2 * d * sizes.groups * h + sizes.routed * (sizes.gates + 1) * d * m


def forward_flops(sizes: Sizes, window: int, kept: float = 1.0) -> float:
    """Operations of one layer for one token of a ``window``, with the share ``kept`` of its channels.

    Attention counts every pair of positions, as PyTorch's counter does; causal kernels skip some of them.
    """
    return kept * (2.0 * layer_parameters(sizes) + 4 * window * sizes.heads * sizes.head)


def gram_flops(sizes: Sizes, wanted: Collection[Statistic], window: int) -> float:
    """Operations to add one token of a ``window`` to a layer's statistics (see :class:`modegpt.statistics.GramSum`)."""
    h = sizes.head
    flops = 2.0 * sizes.normed if wanted else 0.0
    if "mlp" in wanted:
        flops += sizes.routed * _panel_flops(sizes.intermediate)
    if sizes.experts > 1 and any(name.startswith("mlp") for name in wanted):
        # What goes into the experts' output maps is computed once more.
        flops += 2.0 * sizes.routed * sizes.gates * sizes.hidden * sizes.intermediate
    if "query" in wanted:
        flops += 2.0 * (sizes.heads + sizes.groups) * h**2
    if "value" in wanted:
        flops += 2.0 * sizes.groups * h**2
    flops += sum(_panel_flops(sizes.hidden) for name in ("attention_input", "mlp_input") if name in wanted)
    if "head_outputs" in wanted:
        flops += _panel_flops(sizes.heads * h)
    if "logits" in wanted:  # of some queries, all scores and the products of the features of some keys
        keys = min(KEYS, window)
        flops += min(1.0, QUERIES / window) * sizes.heads * (2.0 * window * h + keys * _panel_flops(h))
    return flops


def _panel_flops(n: int) -> float:
    return float(sum(2 * (panel.stop - panel.start) * (n - panel.start) for panel in panels(n)))


def eigen_flops(n: int) -> float:
    """Operations of the eigendecomposition of a symmetric n x n matrix with its vectors, about 9 n^3."""
    return 9.0 * n**3


def head_flops(hidden: int, vocabulary: int) -> float:
    """Operations of the output head for one token."""
    return 2.0 * hidden * vocabulary


def sampled_rows(sizes: Sizes, tokens: int) -> int:
    """How many of the calibration ``tokens`` at most are kept as they enter the MLP."""
    return min(tokens, SAMPLED_ROWS) if sizes.experts == 1 and sizes.gates == 2 else 0


def statistics_bytes(sizes: Sizes, wanted: Collection[Statistic], tokens: int, item: int) -> int:
    """The float64 sums of one layer calibrated on so many ``tokens``, and the rows that are kept of these.

    The rows are in the model's dtype, of ``item`` bytes.
    """
    rows = item * sampled_rows(sizes, tokens) * sizes.hidden if "mlp_rows" in wanted else 0
    return rows + 8 * (sum(_elements(sizes)[name] for name in wanted if name != "mlp_rows") + _normed(sizes, wanted))


def _normed(sizes: Sizes, wanted: Collection[Statistic]) -> int:
    return sizes.normed if wanted else 0


def _elements(sizes: Sizes) -> dict[Statistic, int]:
    return {
        "mlp": sizes.experts * sizes.intermediate**2,
        "attention_input": sizes.hidden**2,
        "mlp_input": sizes.hidden**2,
        "query": sizes.heads * sizes.head**2,
        "key": sizes.groups * sizes.head**2,
        "value": sizes.groups * sizes.head**2,
        "head_outputs": (sizes.heads * sizes.head) ** 2,
        "logits": sizes.heads * sizes.head**2,
        "mlp_moments": 2 * sizes.experts * sizes.intermediate,
        "mlp_input_moments": 2 * sizes.experts * sizes.hidden,
        "attention_input_moments": 2 * sizes.hidden,
        "head_outputs_moments": 2 * sizes.heads * sizes.head,
    }


def kept_bytes(sizes: Sizes, wanted: Collection[Statistic], tokens: int, item: int) -> int:
    """The same as :mod:`modegpt.kept` has it: in float32, of the largest sums about half."""
    m = sizes.intermediate
    below_diagonal = sizes.experts * (m**2 - round(_panel_flops(m) / 2)) if "mlp" in wanted else 0
    sums = statistics_bytes(sizes, wanted, 0, item)
    return statistics_bytes(sizes, wanted, tokens, item) - sums // 2 - 4 * below_diagonal


def elimination_bytes(sizes: Sizes) -> int:
    """What the greedy elimination of an MLP's channels holds at once besides the statistics and the layer.

    A with its factor and its inverse, and the output map before and after. The fit at one rank takes less.
    """
    made_up = 0 if sizes.experts == 1 else sizes.intermediate**2
    return 8 * (made_up + 3 * sizes.intermediate**2 + 3 * sizes.intermediate * sizes.hidden)


def factor_flops(n: float) -> float:
    """Operations of the Cholesky factor of an n x n matrix and of the diagonal of its inverse."""
    return 2 / 3 * n**3


def elimination_flops(sizes: Sizes) -> float:
    """Operations of the greedy elimination of an MLP's channels, with the norm of its output.

    The inverse from its Cholesky factor, and for every block of channels its update and that of the output map. Those
    that are gone take part until a fifth is, which makes the inverse's products 1.23 and the map's 1.11 times as many.
    """
    m, d = sizes.intermediate, sizes.hidden
    return m**3 + 1.23 * (2 / 3 * m**3) + 1.11 * m**2 * d + 2.0 * m**2 * d


def refit_flops(sizes: Sizes, kept: float) -> float:
    """Operations to fit the output map at one rank to the channels that stay."""
    m, d = sizes.intermediate, sizes.hidden
    k = kept * m
    return 2 * k * (m - k) * d + factor_flops(k) + 2 * k**2 * d + 2 * (m - k) ** 2 * d


def gated_fit_flops(sizes: Sizes, tokens: int, kept: float) -> float:
    """Operations of the second fit of one layer's MLP, mostly in products of rows.

    What the dense MLP makes of the rows and what the thin one leaves of that; the slope with the inputs' Gram matrix;
    for every step the products of the curvature's rows and the preconditioner's solves; what the change does to
    held-out rows and, for the output map's fit, to the others.
    """
    rows, d, m = sampled_rows(sizes, tokens), sizes.hidden, sizes.intermediate
    if not rows:
        return 0.0
    k, held = kept * m, rows / gated.HELD_OUT
    seen = rows - held
    curved = min(seen, gated.CURVATURE_ROWS)
    products = 6.0 * rows * d * m + 2 * rows * d * k + seen * (12 * d * k + 2 * d**2) + 6 * held * d * k
    factors = 2 * curved * k**2 + 4 * k**2 * d + (d**3 + 2 * k**3) / 3
    return products + factors + gated.STEPS * (8 * curved * d * k + 2 * d * k * (d + k))


def value_fit_flops(sizes: Sizes, kept: float) -> float:
    """Operations to fit values and outputs: the errors from three bases, a fit at one rank, and fits in turn."""
    h, d, n = sizes.head, sizes.hidden, sizes.heads * sizes.head
    errors = 4.0 * n**2 * h + n**3 / 3 + 3 * n**2 * d
    bases = sizes.groups * (8 * h**3 + 3 * h**2 * sizes.heads // sizes.groups * d)
    return 3 * errors + 2 * bases + 2.0 * n**2 * d + _output_map_flops(sizes, kept) + alternation_flops(sizes, kept)


def value_fit_bytes(sizes: Sizes) -> int:
    """What that holds at once besides the statistics and the layer: copies of the heads' correlation, in float64."""
    n = sizes.heads * sizes.head
    return 8 * (5 * n**2 + 3 * n * sizes.hidden)


def alternation_flops(sizes: Sizes, kept: float) -> float:
    """Operations to fit the bases of the values and the output map to each other in turn."""
    h, d, n = sizes.head, sizes.hidden, sizes.heads * sizes.head
    k = kept * h
    width = sizes.heads * k
    products = 2.0 * n * h * width + 2 * n * width * k
    step = 2 * width**2 * d + 2 * n * k * d + (1 + values.STEPS) * products
    return 2.0 * n**2 * d + (1 + values.ROUNDS) * _output_map_flops(sizes, kept) + values.ROUNDS * step


def _output_map_flops(sizes: Sizes, kept: float) -> float:
    h, d, n = sizes.head, sizes.hidden, sizes.heads * sizes.head
    k = kept * h
    width = sizes.heads * k
    return 2 * n * h * width + 2 * width**2 * h + 2 * n * k * d + width**3 / 3 + 2 * width**2 * d


def gated_fit_bytes(sizes: Sizes, tokens: int, kept: float) -> int:
    """What it holds at once besides the statistics and the layer.

    Of the rows inputs, residuals, gates and channels, those of the curvature and of the held-out ones once more; in
    float64 the correlation of what stays with its factors, and a few matrices of the maps' size.
    """
    rows, d = sampled_rows(sizes, tokens), sizes.hidden
    k, again = kept * sizes.intermediate, min(rows, gated.CURVATURE_ROWS) + rows / gated.HELD_OUT
    return round(8 * (rows + again) * (k + d) + 8 * (5 * k**2 + 4 * d**2 + 4 * d * k)) if rows else 0


def head_elimination_bytes(sizes: Sizes) -> int:
    """The same of whole heads."""
    return elimination_bytes(replace(sizes, experts=1, intermediate=sizes.heads * sizes.head))


def selection_bytes(sizes: Sizes) -> int:
    """What choosing by the weights alone holds: the output maps in float64, and as much of the others at a time."""
    return 8 * sizes.hidden * (2 * sizes.intermediate + 4 * sizes.heads * sizes.head)


def solve_bytes(sizes: Sizes, tokens: int, kept: float = 1.0) -> int:
    """What the paper's algorithm for the MLP holds at once besides the statistics and the layer.

    C_SS, its factor and the triangular solver's copy of it, C_SD with the prediction from it (before them the factor
    of C, which is less), and the output map before and after, all in float64. With fewer ``tokens`` than kept
    channels C_SS is singular and takes an eigendecomposition. ``kept`` is the share of the layer that keeps most.
    """
    m, d = sizes.intermediate, sizes.hidden
    k = kept * m
    squares = 3 if tokens >= k else 6
    made_up = 0 if sizes.experts == 1 else m**2  # the correlation of an expert that saw few tokens
    return round(8 * (made_up + max(m**2, squares * k**2 + 2 * k * (m - k)) + 2 * m * d))


def forward_bytes(sizes: Sizes, tokens: int, item: int) -> int:
    """What a layer's forward over ``tokens`` at once holds: mostly the MLP's channels, some of them in float32."""
    routed = 0 if sizes.experts == 1 else tokens * sizes.routed * item * (2 * sizes.hidden + 3 * sizes.intermediate)
    return routed + tokens * (item * (5 * sizes.hidden + 3 * sizes.intermediate) + 4 * sizes.intermediate)


def solve_flops(module: Module, sizes: Sizes, kept: float = 0.7) -> float:
    """Operations to solve one module of a layer with the paper's algorithms, keeping the share ``kept``.

    MLP: Cholesky factor of C and diagonal of its inverse, the same of C_SS, the prediction of the m - k others with
    its residual, W_D' and the norm. Value-output: W_v^T C W_v for every value head, and a thin SVD of an h x d
    matrix for each. Query-key: a sum over channels. Whole heads: their greedy elimination. Leading terms only.
    """
    d, m, h = sizes.hidden, sizes.intermediate, sizes.head
    if module == "mlp":  # or one expert
        k = kept * m
        others = m - k
        products = 2 * k * others * m + 2 * k * others * d + 2 * others**2 * d + 2 * m**2 * d
        return factor_flops(m) + factor_flops(k) + products
    if module == "vo":
        return sizes.groups * (2 * d**2 * h + 12 * d * h**2) + sizes.heads * 4 * d * h**2 + 10 * sizes.groups * h**3
    if module == "heads":  # a Cholesky factor, an inverse and its updates, and the products with W_o
        n = sizes.heads * h
        return 4.0 * n**3 + 4 * n**2 * d
    return 10.0 * sizes.heads * h**2


def _map_sizes(module: Module, sizes: Sizes) -> list[tuple[int, int]]:
    """Inputs and outputs of the maps of a module."""
    d, heads, groups = sizes.hidden, sizes.heads * sizes.head, sizes.groups * sizes.head
    inner = sizes.intermediate
    return {"mlp": [*[(d, inner)] * sizes.gates, (inner, d)], "qk": [(d, heads), (d, groups)]}.get(
        module, [(d, groups), (heads, d)]
    )


def truncation_flops(module: Module, sizes: Sizes, *, whitened: bool) -> float:
    """Operations to truncate the singular value decompositions of a module's maps.

    Of a p x q matrix, q <= p, 6 p q^2 + 20 q^3 (Golub and Van Loan's count for both sets of vectors); where it is
    ``whitened`` the Cholesky factor of its inputs' correlation, and products with it before and after.
    """
    flops = 0.0
    for inputs, outputs in _map_sizes(module, sizes):
        p, q = max(inputs, outputs), min(inputs, outputs)
        flops += 6.0 * p * q**2 + 20.0 * q**3
        flops += (inputs**3 / 3 + 2.0 * inputs**2 * outputs + inputs**2 * q) if whitened else 0.0
    return flops


def truncation_bytes(sizes: Sizes, *, whitened: bool) -> int:
    """What truncating all maps of a layer holds at once, in float64.

    The maps of the module at work and those of others that are kept, the factors found so far, and of the largest map:
    its copy, the routine's, both sets of vectors with its workspace, and where it is ``whitened`` the weighted copy and
    the root of its correlation.
    """
    modules: tuple[Module, ...] = ("mlp", "qk", "vo")
    maps = [one for module in modules for one in _map_sizes(module, sizes)]
    whole = sum(inputs * outputs for inputs, outputs in maps)
    p, q = max((max(one), min(one)) for one in maps)
    return 8 * (2 * whole + 3 * p * q + 5 * q**2 + (p * q + 2 * p**2 if whitened else 0))


def spread(costs: Mapping[_K, float], workers: int) -> dict[_K, int]:
    """Give each task to the worker with the least to do so far, the costliest first; ties go to the lower rank."""
    load = [0.0] * workers
    owners = {}
    for task in sorted(costs, key=lambda task: -costs[task]):
        owners[task] = load.index(min(load))
        load[owners[task]] += costs[task]
    return owners
