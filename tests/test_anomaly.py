# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The parts of anomaly scores, on data whose distribution is known."""

import math

import pytest
import torch

from ecvae_diffusers.anomaly import (
    LARGEST_LEVEL,
    bits,
    combine,
    largest,
    local_mean,
    measure_tail,
    robust_reconstruction,
    spectral_error,
)
from ecvae_diffusers.evaluation.anomaly import interval_of_rate
from ecvae_diffusers.model_error import NUM_BANDS, colored


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_bits_are_tail_probabilities():
    """Of an exponential distribution of scale 3, also far beyond the values that were measured."""
    tail = measure_tail(3 * torch.empty(200_000, dtype=torch.float64).exponential_(generator=generator()))
    assert len(tail["quantiles"]) == LARGEST_LEVEL + 1
    values = torch.tensor([0.5, 2.0, 9.0, 30.0, 100.0])
    torch.testing.assert_close(bits(values, tail), values / 3 / math.log(2), rtol=0.1, atol=0.05)
    assert bits(torch.tensor([-5.0]), tail) == 0


def test_a_share_of_2_to_the_minus_n_has_n_bits():
    values = torch.randn(4096, generator=generator())
    found = bits(values, measure_tail(values))
    for level in range(1, 7):
        assert (found >= level).float().mean().item() == pytest.approx(2.0**-level, rel=0.02)
    order = values.argsort()
    assert (found[order].diff() >= 0).all() and found.min() == 0


def test_ties_and_few_values():
    constant = measure_tail(torch.ones(100))
    assert torch.equal(bits(torch.tensor([0.5, 1.0]), constant)[:1], torch.zeros(1))
    assert bits(torch.tensor([2.0]), constant).isfinite().all()
    with pytest.raises(ValueError, match="values"):
        measure_tail(torch.ones(31))


def test_the_error_has_unit_1_for_the_models_own_errors():
    spectrum = [4.0 * math.exp(-band / 3) for band in range(NUM_BANDS)]
    white = torch.randn(400, 2, 16, 16, generator=generator())
    for own, error in ((None, white), ([1.0] * NUM_BANDS, white)):
        assert spectral_error(0.3 * error, 0.09, own).mean().item() == pytest.approx(1, rel=0.02)
    # Half white and half of the spectrum, as the equation has it.
    mixed = (colored(white, spectrum) + torch.randn(white.shape, generator=generator().manual_seed(1))) / math.sqrt(2)
    found = spectral_error(0.3 * mixed, 0.09, spectrum)
    assert found.mean().item() == pytest.approx(1, rel=0.02)
    # An error at high frequencies, where the model makes few, counts more.
    checker = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))[None, None]
    assert spectral_error(checker, 1.0, spectrum) > 1.5 > spectral_error(torch.ones(1, 1, 16, 16), 1.0, spectrum)


def test_a_local_mean_keeps_constants_and_spreads_a_pixel():
    assert torch.equal(local_mean(torch.ones(1, 3, 8, 8)), torch.ones(1, 1, 8, 8))
    one = torch.zeros(1, 1, 8, 8)
    one[..., 4, 4] = 9
    assert torch.equal(local_mean(one)[..., 3:6, 3:6], torch.ones(1, 1, 3, 3)) and local_mean(one).sum() == 9


def test_a_robust_reconstruction_ignores_a_defect():
    """Of constant images: the reconstruction is the mean, and a defect shifts the plain one, but not the robust one."""

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3), keepdim=True).expand_as(images)

    images = torch.full((1, 1, 16, 16), 0.2)
    damaged = images.clone()
    damaged[..., :3, :3] = -0.8
    found = robust_reconstruction(reconstruct, damaged, variance=1e-3)
    assert (found - images).abs().max() < 0.1 * (reconstruct(damaged) - images).abs().max()
    torch.testing.assert_close(robust_reconstruction(reconstruct, images, 1e-3), images)


def test_a_combination_without_measurement_is_the_residual():
    parts = {"a": torch.tensor([0.5, 3.0]), "b": torch.tensor([1.0, 1.0])}
    weights = {"a": 1.0, "b": 0.25}
    torch.testing.assert_close(combine(parts, None, weights), parts["a"] / math.log(2))
    tails = {"a": {"quantiles": [0.0], "scale": 1.0}, "b": {"quantiles": [0.0], "scale": 2.0}}
    torch.testing.assert_close(combine(parts, tails, weights), (parts["a"] + parts["b"] / 2 / 4) / math.log(2))
    torch.testing.assert_close(combine({"a": parts["a"]}, tails, weights), parts["a"] / math.log(2))


def test_the_largest_twentieth():
    values = torch.arange(400.0).view(1, 20, 20)
    assert largest(values) == pytest.approx(sum(range(380, 400)) / 20)


def test_the_interval_holds_the_rate_of_false_alarms():
    """Of many thresholds, each from 200 scores: 95% of the true rates lie in the interval."""
    count, place = 200, 191
    scores = torch.rand(4000, count, generator=generator(), dtype=torch.float64).sort(dim=1).values
    rates = 1 - scores[:, place - 1]
    low, high = interval_of_rate(count, place)
    assert ((rates >= low) & (rates <= high)).double().mean().item() == pytest.approx(0.95, abs=0.012)
    assert rates.mean().item() == pytest.approx((count + 1 - place) / (count + 1), abs=0.001)
