"""What the tests of the structured baselines share: every method through the real pipeline and back from disk."""

from __future__ import annotations

import torch

from modegpt.data import TokenWindows


def windows(count: int = 8, length: int = 16, *, seed: int = 1) -> TokenWindows:
    """Random windows."""
    return TokenWindows(torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed)))
