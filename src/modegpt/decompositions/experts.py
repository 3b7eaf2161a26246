"""Experts that calibration hardly reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def with_pseudo_tokens(gram: torch.Tensor, tokens: int, inputs: Sequence[torch.Tensor], level: float) -> torch.Tensor:
    """C + max(0, m - N) l diag(p): make up for an expert that saw fewer tokens than it has channels.

    With N < m tokens the m channels of C = Z^T Z (m, m) look dependent though they are not: leverage scores would
    choose at random, and re-fitting would trust coincidences. So each missing token is replaced by one whose
    channels are independent, with the energies p that the weights suggest (the product of the squared norms of the
    channel's columns of the ``inputs``, each (d, m); mean 1) at the ``level`` l, the mean energy of a channel per
    token over all experts of the layer. Without any token the channels of largest weights are kept, and the output
    map stays as it is. With N >= m nothing changes.
    """
    missing = gram.shape[0] - tokens
    if missing <= 0:
        return gram
    profile = torch.ones(gram.shape[0], dtype=gram.dtype, device=gram.device)
    for weight in inputs:
        profile = profile * weight.to(gram.dtype).square().sum(0)
    result = gram.clone()
    result.diagonal().add_(missing * level * profile / profile.mean().clamp_min(torch.finfo(gram.dtype).tiny))
    return result
