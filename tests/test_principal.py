"""Principal directions of activations."""

from __future__ import annotations

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import principal_directions


def test_a_known_basis_and_its_energies() -> None:
    directions = torch.linalg.qr(randn(5, 5)).Q
    energies = torch.tensor([9.0, 7.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    found = principal_directions(directions @ torch.diag(energies) @ directions.T)
    torch.testing.assert_close(found.energies, energies, rtol=0, atol=1e-8)
    torch.testing.assert_close((found.basis * directions).sum(0).abs(), torch.ones(5, dtype=torch.float64))
    assert [found.lost(width) for width in range(6)] == pytest.approx([1, 12 / 21, 5 / 21, 1 / 21, 0, 0], abs=1e-12)


def test_energies_are_what_is_kept_and_lost_of_the_activations() -> None:
    x = mixed(60, 12)
    found = principal_directions(x.T @ x)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(found.energies, found.energies.sort(descending=True).values)
    for width in range(13):
        leading = found.basis[:, :width]
        assert found.lost(width) == pytest.approx(squared(x - x @ leading @ leading.T) / squared(x), abs=1e-12)


@pytest.mark.parametrize("width", [1, 5, 11])
def test_no_other_subspace_loses_less(width: int) -> None:
    x = mixed(60, 12)
    found = principal_directions(x.T @ x)
    for seed in range(20):
        step = 1e-3 if seed % 2 else 1.0
        other = torch.linalg.qr(found.basis[:, :width] + step * randn(12, width, seed=seed)).Q
        assert squared(x - x @ other @ other.T) >= found.lost(width) * squared(x) * (1 - 1e-8)


def test_the_mean_counts() -> None:
    """What is kept is a part of the activations themselves: a direction that does not vary has energy."""
    x = randn(100, 4) * 1e-3 + torch.tensor([0.0, 5.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        principal_directions(x.T @ x).basis[:, 0].abs(),
        torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64),
        atol=1e-3,
        rtol=0,
    )


def test_signs_do_not_depend_on_the_routine() -> None:
    found = principal_directions((x := mixed(60, 12)).T @ x)
    assert bool((found.basis.gather(0, found.basis.abs().argmax(0, keepdim=True)) > 0).all())


def test_directions_without_energy_do_not_depend_on_rounding() -> None:
    x = randn(5, 12)
    gram = x.T @ x
    noise = randn(12, 12, seed=1) * 1e-15
    found, other = principal_directions(gram), principal_directions(gram + noise + noise.T)
    torch.testing.assert_close(other.basis, found.basis, rtol=0, atol=1e-4)


def test_nothing_has_no_energy_to_lose() -> None:
    found = principal_directions(torch.zeros(3, 3, dtype=torch.float64))
    assert [found.lost(width) for width in range(4)] == [0.0] * 4
    assert torch.equal(found.basis.abs().sum(0), torch.ones(3, dtype=torch.float64))
