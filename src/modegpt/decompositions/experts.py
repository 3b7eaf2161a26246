"""Channels that calibration hardly reaches, and experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weight_energies(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """p_i ~ prod_W ||W_i||^2 over the input maps W: the channels' energies where nothing is known but these.

    Each of ``inputs`` is (d, m), with the channels as columns; returns (m,) float64 of mean 1, zeros where all are.
    For x of independent components of variance s, x W_i has the energy s ||W_i||^2, and of a gated channel
    sigma(x G_i) (x U_i) the product bounds what it can put out.
    """
    energies = torch.ones(inputs[0].shape[1], dtype=torch.float64, device=inputs[0].device)
    for weight in inputs:
        energies = energies * weight.double().square().sum(0)
    return energies / energies.mean().clamp_min(torch.finfo(torch.float64).tiny)


def with_pseudo_tokens(gram: torch.Tensor, tokens: int, inputs: Sequence[torch.Tensor], level: float) -> torch.Tensor:
    """C + max(0, m - N) l diag(p): make up for an expert that saw fewer tokens than it has channels.

    With N < m tokens the m channels of C = Z^T Z (m, m) look dependent though they are not: leverage scores would
    choose at random, and re-fitting would trust coincidences. So each missing token is replaced by one whose
    channels are independent, with the energies p of :func:`weight_energies` at the ``level`` l, the mean energy of a
    channel per token over all experts of the layer. Without any token the channels of largest weights are kept, and
    the output map stays as it is. With N >= m nothing changes.
    """
    missing = gram.shape[0] - tokens
    if missing <= 0:
        return gram
    result = gram.clone()
    result.diagonal().add_(missing * level * weight_energies(inputs).to(gram))
    return result
