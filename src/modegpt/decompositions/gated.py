"""The up-projection of a gated MLP, and its output map after that, fitted once more to the channels that are left.

An MLP puts out Z W_D with Z = G o X W_U, G = sigma(X W_G). Once channels are gone and W_D' makes up for them, the W_U'
of those that stay can change as well: they are behind no nonlinearity but the product with G. The objective

    J(D) = || R - (G o X D) W_D' ||_F^2,    R = Y - Z' W_D',

Y the dense MLP's output, is quadratic in the correction D, with gradient -2 X^T (G o (R W_D'^T)). Its normal equations
have d k unknowns, too many to write down: a few steps of conjugate gradients, preconditioned by the Kronecker product
that they would be if X and G were independent, X^T X (x) (G^T G / n o W_D' W_D'^T). The gradient that they start from
is that of all rows, for what is learnt from few would be learnt by heart; for the curvature some are enough.

With the channels Z' + dZ, dZ = G o X D, the output map can change too. W_D' is the optimum for Z' over all tokens, so
of the slope only what the rows tell of its change counts, and the curvature A_SS is known of all tokens:

    A_SS E = (Z' + dZ)^T (R - dZ W_D') - Z'^T R

for the correction E of W_D'. (With what dZ adds to A_SS, E is no better on other text.) How far to go along D and
along E is decided by rows that neither has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .elimination import regularised
from .linalg import cholesky_of_psd, conjugate_gradients, inner_product

#: Of conjugate gradients.
STEPS = 4
#: One row of so many is kept from the fits.
HELD_OUT = 16
#: Rows of the curvature, at most.
CURVATURE_ROWS = 4096
#: Of the two factors of the preconditioner.
RIDGE = 1e-2
#: Rows whose products are held at once.
_ROWS = 2048


@dataclass(frozen=True)
class GatedRows:
    """What a gated MLP makes of some tokens by the k channels that stay, all in one dtype: that of the products."""

    inputs: torch.Tensor
    """X (n, d)."""
    gates: torch.Tensor
    """G (n, k)."""
    channels: torch.Tensor
    """Z' (n, k)."""
    residual: torch.Tensor
    """R (n, e)."""

    def are_finite(self) -> bool:
        """Whether they are free of NaN and infinity."""
        return all(bool(x.isfinite().all()) for x in (self.inputs, self.gates, self.channels, self.residual))

    def at(self, index: torch.Tensor) -> GatedRows:
        """Some of the rows."""
        return GatedRows(self.inputs[index], self.gates[index], self.channels[index], self.residual[index])


@dataclass(frozen=True)
class GatedFit:
    """Corrections of both maps."""

    change: torch.Tensor
    """D (d, k)."""
    output: torch.Tensor
    """E (k, e)."""
    share: float
    """What held-out rows have left of ||R||_F^2: at most 1."""


def gated_fit(rows: GatedRows, output: torch.Tensor, matrix: torch.Tensor, steps: int = STEPS) -> GatedFit:
    """D and E for W_D' = ``output`` (k, e), in the dtype of the rows.

    ``matrix`` A_SS (k, k), float64, is positive definite; its scale does not matter, as the length of E is looked for.
    Of every ``HELD_OUT`` rows one is held out, and a correction that does not help there is zero; so are both where a
    row is not finite.
    """
    if not rows.are_finite():
        return GatedFit(output.new_zeros(rows.inputs.shape[1], len(output)), torch.zeros_like(output), 1.0)
    seen, held = split_rows(len(rows.inputs), rows.inputs.device)
    unseen = rows.at(held)

    change = _direction(rows, seen, output, steps)
    thin = unseen.gates * (unseen.inputs @ change)
    length, left = _along(unseen.residual, thin @ output)
    change, channels = length * change, unseen.channels + length * thin

    adjusted = _output_direction(rows, seen, output, matrix, change)
    length, left = _along(left, channels @ adjusted)
    before, after = inner_product(unseen.residual, unseen.residual), inner_product(left, left)
    return GatedFit(change, length * adjusted, min(1.0, after / before) if before > 0 else 1.0)


def split_rows(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of ``count`` rows are fitted and which are held out, both in a random order, always the same.

    Rows follow the text, so that one in so many could be the first of every window, or of none.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    held = count // HELD_OUT
    return order[held:], order[:held]


def _along(residual: torch.Tensor, move: torch.Tensor) -> tuple[float, torch.Tensor]:
    """How far to go so that the least of ``residual`` is left, never backwards, and what is left."""
    size = inner_product(move, move)
    length = max(0.0, inner_product(residual, move) / size) if size > 0 else 0.0
    return length, residual - length * move


def _direction(rows: GatedRows, seen: torch.Tensor, output: torch.Tensor, steps: int) -> torch.Tensor:
    """D by conjugate gradients, with the slope of all ``seen`` rows and the curvature of some."""
    (_, d), (_, k) = rows.inputs.shape, rows.gates.shape
    slope, gram = rows.inputs.new_zeros(d, k), rows.inputs.new_zeros(d, d)
    for part in seen.split(_ROWS):
        some = rows.at(part)
        slope += _adjoint(some, output, some.residual)
        gram += some.inputs.mT @ some.inputs
    some = rows.at(seen[:CURVATURE_ROWS])
    scale = len(seen) / max(1, len(some.inputs))  # of a sum over some to that over all
    squares = (some.gates.mT @ some.gates).double() * (output @ output.mT).double()
    root_x = cholesky_of_psd(regularised(gram.double(), RIDGE))
    root_g = cholesky_of_psd(regularised(squares / max(1, len(some.inputs)), RIDGE))

    def products(direction: torch.Tensor) -> torch.Tensor:
        return scale * _adjoint(some, output, (some.gates * (some.inputs @ direction)) @ output)

    def preconditioned(direction: torch.Tensor) -> torch.Tensor:
        half = torch.cholesky_solve(direction.double(), root_x)
        return torch.cholesky_solve(half.mT, root_g).mT.to(slope.dtype)

    return conjugate_gradients(slope, products, preconditioned, steps)


def _output_direction(
    rows: GatedRows, seen: torch.Tensor, output: torch.Tensor, matrix: torch.Tensor, change: torch.Tensor
) -> torch.Tensor:
    """E for D = ``change``, if ``matrix`` is of the ``seen`` rows."""
    wanted = torch.zeros_like(output, dtype=matrix.dtype)
    for part in seen.split(_ROWS):
        some = rows.at(part)
        thin = some.gates * (some.inputs @ change)  # dZ
        move = thin @ output
        wanted += thin.mT @ (some.residual - move) - some.channels.mT @ move
    return torch.cholesky_solve(wanted, cholesky_of_psd(matrix)).to(output.dtype)


def _adjoint(rows: GatedRows, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """X^T (G o (R W_D'^T))."""
    return rows.inputs.mT @ (rows.gates * (residual @ output.mT))
