"""The up-projection of a gated MLP, fitted once more to the channels that are left.

An MLP puts out (G o X W_U) W_D with G = sigma(X W_G). Once channels are gone and W_D' makes up for them, the W_U' of
those that stay can change as well: they are behind no nonlinearity but the product with G. The objective

    J(D) = || R - (G o X D) W_D' ||_F^2,    R = Y - (G o X W_U') W_D',

Y the dense MLP's output, is quadratic in the correction D, with gradient -2 X^T (G o (R W_D'^T)). Its normal equations
have d k unknowns, too many to write down: a few steps of conjugate gradients, preconditioned by the Kronecker product
that they would be if X and G were independent, X^T X (x) (G^T G / n o W_D' W_D'^T). How many steps is decided by rows
that the fit does not see.
"""

from __future__ import annotations

import torch

from .elimination import regularised
from .linalg import cholesky_of_psd

#: At most; what further steps gain on the rows that are fitted, others lose.
STEPS = 4
#: One row of so many is kept from the fit.
HELD_OUT = 8
#: Of the two factors of the preconditioner.
RIDGE = 1e-2
#: Rows whose products are held at once.
_ROWS = 2048


def gated_correction(
    inputs: torch.Tensor, gates: torch.Tensor, output: torch.Tensor, residual: torch.Tensor, steps: int = STEPS
) -> tuple[torch.Tensor, float]:
    """D (d, k), and J(D) / J(0) on held-out rows, which is at most 1.

    ``inputs`` X (n, d), ``gates`` G (n, k), ``output`` W_D' (k, e) and ``residual`` R (n, e) in one dtype, that of the
    products with rows; the preconditioner is factorised in float64. The last of every ``HELD_OUT`` rows are held out.
    D is zero where no step helps there.
    """
    held = torch.arange(len(inputs), device=inputs.device) % HELD_OUT == HELD_OUT - 1
    x, g, rows = inputs[~held], gates[~held], residual[~held]
    unseen = inputs[held], gates[held], residual[held]
    root_x = cholesky_of_psd(regularised((x.mT @ x).double(), RIDGE))
    root_g = cholesky_of_psd(regularised((g.mT @ g).double() * (output @ output.mT).double(), RIDGE))

    best = found = torch.zeros(inputs.shape[1], gates.shape[1], dtype=inputs.dtype, device=inputs.device)
    before = least = _loss(*unseen, output, found)
    slope = _adjoint(x, g, output, rows)
    direction, size = torch.zeros_like(found), 1.0
    for _ in range(steps):
        step = _preconditioned(slope, root_x, root_g)
        last, size = size, _dot(slope, step)
        if not size > 0:
            break
        direction = step + direction * (size / last)
        change = _adjoint(x, g, output, _outputs(x, g, output, direction))
        length = size / _dot(direction, change)
        found = found + length * direction
        loss = _loss(*unseen, output, found)
        if not loss < least:
            break
        best, least = found, loss
        slope = slope - length * change
    return best, least / before if before > 0 else 1.0


def _outputs(x: torch.Tensor, g: torch.Tensor, output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """(G o X D) W_D'."""
    pieces = zip(x.split(_ROWS), g.split(_ROWS), strict=True)
    return torch.cat([(some_g * (some_x @ change)) @ output for some_x, some_g in pieces])


def _adjoint(x: torch.Tensor, g: torch.Tensor, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """X^T (G o (R W_D'^T))."""
    result = x.new_zeros(x.shape[1], g.shape[1])
    for some_x, some_g, some in zip(x.split(_ROWS), g.split(_ROWS), rows.split(_ROWS), strict=True):
        result += some_x.mT @ (some_g * (some @ output.mT))
    return result


def _loss(x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor, output: torch.Tensor, change: torch.Tensor) -> float:
    difference = rows - _outputs(x, g, output, change)
    return _dot(difference, difference)


def _preconditioned(slope: torch.Tensor, root_x: torch.Tensor, root_g: torch.Tensor) -> torch.Tensor:
    half = torch.cholesky_solve(slope.double(), root_x)
    return torch.cholesky_solve(half.mT, root_g).mT.to(slope.dtype)


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))
