"""Principal directions: the basis in which a few coordinates hold most of the energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: In units of the mean energy of a channel. Products of float32 activations are off by about 1e-7.
_LEAN = 1e-9


@dataclass(frozen=True)
class PrincipalDirections:
    """C = Q diag(e) Q^T with Q^T Q = I, from the largest eigenvalue to the smallest."""

    energies: torch.Tensor
    """e: (d,) float64, none below zero, in that order up to rounding."""
    basis: torch.Tensor
    """Q: (d, d) float64, one direction a column."""

    def lost(self, width: int) -> float:
        """sum_{i > width} e_i / sum_i e_i = ||X - X Q_w Q_w^T||_F^2 / ||X||_F^2; zero where X is."""
        whole = float(self.energies.sum())
        return float(self.energies[width:].sum()) / whole if whole > 0 else 0.0


def principal_directions(gram: torch.Tensor) -> PrincipalDirections:
    """The Q of C = X^T X (d, d) float64 whose first w columns minimise ||X - X Q_w Q_w^T||_F for every w.

    Uncentred: what is kept of X is a part of X itself, its mean included. What C leaves open is decided, so that C
    that differ by rounding give Q that do: each direction's largest entry is positive, and directions of equal energy,
    such as those of none, lean to the first channels, by adding to the diagonal of C what is far below its rounding.
    """
    lean = torch.linspace(_LEAN, 0, len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean()
    _, basis = torch.linalg.eigh(gram + lean.diag())
    basis = basis.flip(1)
    energies = (basis * (gram @ basis)).sum(0).clamp_min(0)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return PrincipalDirections(energies, basis * torch.where(largest < 0, -1.0, 1.0))
