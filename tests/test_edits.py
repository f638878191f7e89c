# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Directions in latent space, of latents whose distribution is known."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ecvae_diffusers.edits import classifier_normal, difference_of_means, held_out_accuracy, principal_directions


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets that differ along (1, 1, 0, 0), with noise that is strong along (0, 1, 0, 0)."""
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 3.0, 1.0, 1.0])
    return noise[:2500], noise[2500:] + torch.tensor([1.0, 1.0, 0.0, 0.0])


def test_the_normal_is_that_of_fishers_discriminant(sets):
    normal = classifier_normal(*sets)
    theirs = LinearDiscriminantAnalysis().fit(torch.cat(sets).numpy(), [0] * 2500 + [1] * 1500).coef_[0]
    assert torch.cosine_similarity(normal, torch.tensor(theirs, dtype=normal.dtype), dim=0) > 0.999
    # Both directions cross from the level of one mean to that of the other.
    difference = difference_of_means(*sets)
    torch.testing.assert_close(normal @ normal, normal @ difference)
    assert normal.norm() < difference.norm()


def test_held_out_accuracy(sets):
    """The classifier's is that of the best linear one, and directions of equal sets are right by chance."""
    distance = (1 / 0.3**2 + 1 / 3**2) ** 0.5
    best = torch.distributions.Normal(0, 1).cdf(torch.tensor(distance / 2)).item()
    assert held_out_accuracy(*sets, "classifier") == pytest.approx(best, abs=0.015)
    assert held_out_accuracy(*sets, "means") < best - 0.1
    for method in ("means", "classifier"):
        assert held_out_accuracy(sets[0][:1000], sets[0][1000:2000], method) == pytest.approx(0.5, abs=0.05)


def test_few_latents_have_a_finite_normal():
    few = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    assert classifier_normal(few[:5], few[5:]).isfinite().all()
    assert 0 <= held_out_accuracy(few[:5], few[5:], "classifier") <= 1


def test_principal_directions_of_a_known_distribution():
    latents = np.random.default_rng(0).standard_normal((4000, 3)) * [1, 3, 0.1] + [5, 0, 0]
    mean, directions = principal_directions(latents, 8)
    np.testing.assert_allclose(mean, [5, 0, 0], atol=0.2)
    np.testing.assert_allclose(np.abs(directions), [[0, 3, 0], [1, 0, 0], [0, 0, 0.1]], atol=0.1)
    np.testing.assert_array_equal(principal_directions(latents, 2)[1], directions[:2])
