"""Type III (value-output): singular value decomposition. Paper: Algorithm 3, Theorem 3, appendix B.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linalg import cutoff


@dataclass(frozen=True)
class SVDDecomposition:
    """Thinner value and output maps of the heads that share one value head."""

    value: torch.Tensor
    """W_v': (..., d, k) float64."""
    output: torch.Tensor
    """W_o' of each head of the group: (..., g, k, d) float64."""
    error: float
    """sum over the heads of ||X W_v W_o - X W_v' W_o'||_F^2 over the calibration tokens, exactly."""
    norm: float
    """sum over the heads of ||X W_v W_o||_F^2."""
    singular: torch.Tensor | None = None
    """S' of one head or, where several share the values, S: (..., h); None at full rank, where neither is needed."""


def svd_decomposition(
    gram: torch.Tensor, value: torch.Tensor, output: torch.Tensor, rank: int, resolution: float = 0.0
) -> SVDDecomposition:
    """Best rank-k factors of X W_v W_o: two thin SVDs for one head, the first alone for a group.

    ``gram`` is C = X^T X (d, d) of the attention block's input, ``value`` W_v (..., d, h), ``output`` W_o
    (..., g, h, d) of the g heads that share W_v; all float64. One head (Algorithm 3):

        C^(1/2) W_v = U S V^T,  S V^T W_o = U' S' V'^T,  W_v' = C^(-1/2) U U'_k,  W_o' = S'_k V'_k^T

    Several heads (appendix B.1): W_v' = C^(-1/2) U_k,  W_o,j' = S_k V_k^T W_o,j.

    No root of C is formed: W_v^T C W_v = V S^2 V^T is head-sized, and C^(-1/2) U = W_v V S^-1 (on the range
    of C, which is all the calibration data can see). Channels are then scaled so that W_v' and W_o' share
    their size evenly. Directions the data do not excite, below :func:`cutoff` of the largest energy for
    a ``gram`` of relative precision ``resolution``, are zero. Full rank returns the weights as they are. Leading
    axes of ``value`` and ``output`` are groups.
    """
    moment = value.mT @ (gram @ value)  # W_v^T C W_v: (..., h, h)
    if rank == value.shape[-1]:
        norm = float(((moment.unsqueeze(-3) @ output) * output).sum())
        return SVDDecomposition(value.clone(), output.clone(), error=0.0, norm=norm)
    squared, basis = torch.linalg.eigh(moment)  # ascending
    squared, basis = squared.flip(-1), basis.flip(-1)
    alive = squared > cutoff(value.shape[-1], resolution) * squared[..., :1].clamp_min(0)
    singular = torch.where(alive, squared, 0.0).sqrt()  # S
    inverse = torch.where(alive, singular.reciprocal(), 0.0)  # S^-1 on the excited directions
    whiten = value @ (basis * inverse.unsqueeze(-2))  # C^(-1/2) U
    mixed = (singular.unsqueeze(-1) * basis.mT).unsqueeze(-3) @ output  # S V^T W_o,j: (..., g, h, d)
    norm = float(mixed.square().sum())
    if output.shape[-3] > 1:
        thin_value, thin_output = balance(whiten[..., :rank], mixed[..., :rank, :])
        lost = float(mixed[..., rank:, :].square().sum())
        return SVDDecomposition(thin_value, thin_output, lost, norm, singular)
    left, second, right = torch.linalg.svd(mixed.squeeze(-3), full_matrices=False)  # U', S', V'^T
    thin_output = (second[..., :rank, None] * right[..., :rank, :]).unsqueeze(-3)
    missing = max(0, rank - second.shape[-1])  # heads wider than the model have no more directions than it has
    thin_output = torch.nn.functional.pad(thin_output, (0, 0, 0, missing))
    thin_value = torch.nn.functional.pad(whiten @ left[..., :rank], (0, missing))
    thin_value, thin_output = balance(thin_value, thin_output)
    unseen = value.shape[-1] - second.shape[-1]
    lost = float(second[..., rank:].square().sum())
    return SVDDecomposition(thin_value, thin_output, lost, norm, torch.nn.functional.pad(second, (0, unseen)))


def balance(value: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each channel so that its value column and its output rows are equally long.

    The product is the same. Unbalanced, values would have unit energy over all calibration tokens together,
    so their weights would shrink with the amount of text and leave the range of 16-bit formats.
    """
    columns, rows = value.norm(dim=-2), output.norm(dim=(-3, -1))
    scale = torch.where((columns > 0) & (rows > 0), (rows / columns).sqrt(), 1.0)
    return value * scale.unsqueeze(-2), output / scale[..., None, :, None]
