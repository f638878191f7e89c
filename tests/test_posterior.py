# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Chains on an amortized posterior, with a linear decoder, whose posterior is known."""

import math

import pytest
import torch
from energies import randn, seeded
from linear_decoder import LATENTS, PIXELS, VARIANCE, LinearDecoder, posterior_of

from ecvae_diffusers import EnergyCalibrator
from ecvae_diffusers.energy import energy_and_gradient
from ecvae_diffusers.posterior import (
    DRIFT_STEP,
    PosteriorEnergy,
    coupled_ends,
    generated_images,
    negative_log_posterior,
    optimized_posterior,
    posterior_chain,
    refine,
    stationary_constraint,
)
from ecvae_diffusers.variational import likelihood_bounds


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return randn(count, LATENTS, 1, 1, seed=seed)


@pytest.fixture
def decoder() -> LinearDecoder:
    return LinearDecoder()


def test_gradient_is_that_of_the_log_posterior(decoder):
    """-grad log p(z|x), times sigma for the whitening: (z - mean) / variance of the true posterior."""
    images = randn(4, 1, 2, 4)
    true, amortised = decoder.posterior(images), posterior_of(draws(4, 5), torch.full((4, LATENTS, 1, 1), 0.5))
    energy, whitened = PosteriorEnergy(decoder, images, amortised, VARIANCE), draws(4, 6)
    latents = energy.unwhiten(whitened)
    expected = (latents - true.mean) / true.var * amortised.std
    torch.testing.assert_close(energy_and_gradient(energy, whitened)[1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(energy.whiten(latents), whitened, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`variance`"):
        PosteriorEnergy(decoder, images, amortised, 0.0)


def test_generated_images_are_draws_of_the_model(decoder):
    """With x ~ p(x) and the true posterior, x' ~ p(x): its covariance is W W^T + s^2 I. Its residual does not depend on G(z')."""
    count, variance = 100_000, VARIANCE / 2500
    decoder.weight = decoder.weight / 50  # so that nothing is clipped
    images = decoder(draws(count)) + variance**0.5 * randn(count, 1, 2, 4, seed=1)
    precision = 1 + decoder.weight.square().sum(0) / variance
    mean = (images.flatten(1) @ decoder.weight / variance / precision)[..., None, None]
    q = posterior_of(mean, precision.rsqrt().view(1, -1, 1, 1).expand_as(mean))
    found = generated_images(images, q, decoder, draws(count, 2), draws(count, 3)).flatten(1)
    expected = decoder.weight @ decoder.weight.T + variance * torch.eye(PIXELS)
    torch.testing.assert_close(found.T @ found / count, expected, rtol=0.03, atol=3e-5)
    decoded = decoder(draws(count, 3)).flatten(1)  # G(z')
    residual = found - decoded
    assert (residual.T @ decoded / count).abs().max() < 3e-5
    torch.testing.assert_close(residual.T @ residual / count, variance * torch.eye(PIXELS), rtol=0.03, atol=2e-6)
    assert generated_images(10 * images, q, decoder, draws(count, 2), draws(count, 3)).abs().max() == 1


def test_the_constraint_brings_an_amortised_posterior_to_the_true_one(decoder):
    """In mean and spread."""
    images = randn(1, 1, 2, 4).expand(256, -1, -1, -1)
    true = decoder.posterior(images[:1])
    mean, log_std = (true.mean + 0.5 * true.std).requires_grad_(), (true.std.log() - 0.5).requires_grad_()
    optimizer = torch.optim.Adam([mean, log_std], lr=0.04)
    generator = seeded(0)
    for _ in range(150):
        q = posterior_of(mean.expand(256, -1, -1, -1), log_std.exp().expand(256, -1, -1, -1))
        energy = PosteriorEnergy(decoder, images, q, VARIANCE)
        calibrator = EnergyCalibrator(energy, posterior_chain(5, 0.2), tolerance=1.0, initial_dual=1.0)
        latents = q.mean + q.std * torch.randn(q.mean.shape, generator=generator)
        distance = negative_log_posterior(q, energy)
        optimizer.zero_grad()
        calibrator.calibrate(energy.whiten(latents), generator, distance=distance).loss.backward()
        optimizer.step()
    assert ((mean - true.mean) / true.std).abs().max() < 0.2
    # Wider than the posterior, of the order of the step, a = 0.2.
    assert (log_std.exp() / true.std - 1).abs().max() < 0.15


def test_log_form_is_a_difference_of_log_probabilities_and_0_without_a_move():
    q = posterior_of(draws(6).requires_grad_(), draws(6, 2).exp().requires_grad_())
    energy = PosteriorEnergy(LinearDecoder(), randn(6, 1, 2, 4), q, VARIANCE)
    distance = negative_log_posterior(q, energy)
    samples, targets = draws(6, 4), draws(6, 3)
    normal = torch.distributions.Normal(q.mean, q.std)

    def log_prob(whitened: torch.Tensor) -> torch.Tensor:
        return normal.log_prob(energy.unwhiten(whitened)).flatten(1).sum(1)

    found, expected = distance(samples, targets), log_prob(samples) - log_prob(targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(value.sum(), (q.mean, q.std), retain_graph=True) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    still = distance(targets, targets)
    assert (still == 0).all() and (torch.autograd.grad(still.sum(), q.mean)[0] == 0).all()


def test_stationary_constraint_is_what_a_chain_leaves_where_q_is_the_posterior(decoder):
    """The ends of chains are distributed as q, up to the order of the step."""
    count = 20_000
    images = randn(1, 1, 2, 4).expand(count, -1, -1, -1)
    q = decoder.posterior(images)
    energy = PosteriorEnergy(decoder, images, q, VARIANCE)
    scheduler = posterior_chain(5, 0.1)
    calibrator = EnergyCalibrator(None, scheduler, tolerance=1.0)
    distance = negative_log_posterior(q, energy)
    output = calibrator.calibrate(draws(count), seeded(1), energy_model=energy, distance=distance)
    # Of each latent a squared normal number at most 2 wide, halved in the logarithm.
    noise = 5 * math.sqrt(2 * LATENTS / count)
    assert abs(output.constraint.item() - stationary_constraint(scheduler, LATENTS)) < noise
    assert output.targets.mean(0).abs().max() < 5 / math.sqrt(count)
    # Unadjusted Langevin dynamics of a standard normal has the variance 1 / (1 - a / 2).
    assert (output.targets.var(0) - 1).abs().max() < 0.05 / 0.95 + 5 * math.sqrt(2 / count)


def test_coupled_chains_end_together_where_q_is_the_posterior(decoder):
    """Then neither the constraint nor its gradient has any variance: the one is its remainder, the other 0."""
    images = randn(6, 1, 2, 4)
    true = decoder.posterior(images)
    q = posterior_of(true.mean.clone().requires_grad_(), true.std.clone().requires_grad_())
    energy = PosteriorEnergy(decoder, images, q, VARIANCE)
    scheduler = posterior_chain(5, 0.1)
    start, noise = draws(6, 1), list(randn(5, 6, LATENTS, 1, 1, seed=2))
    ends = EnergyCalibrator(None, scheduler, tolerance=1.0).run_chain(start, noise=noise, energy_model=energy)
    reference = coupled_ends(scheduler, start, noise)
    torch.testing.assert_close(ends, reference, rtol=1e-4, atol=1e-4)
    found = negative_log_posterior(q, energy, reference, remainder=0.7)(start, ends)
    torch.testing.assert_close(found, torch.full((6,), 0.7), rtol=0, atol=1e-3)
    for gradient in torch.autograd.grad(found.sum(), (q.mean, q.std)):
        assert (gradient * q.std).abs().max() < 1e-3


def test_coupling_changes_the_variance_of_value_and_gradient_but_not_their_mean(decoder):
    count, images = 20_000, randn(1, 1, 2, 4)
    true = decoder.posterior(images)
    mean, std = (true.mean + 0.3 * true.std).requires_grad_(), (0.8 * true.std).requires_grad_()
    shape = (count, -1, -1, -1)
    q = posterior_of(mean.expand(shape), std.expand(shape))
    energy = PosteriorEnergy(decoder, images.expand(shape), q, VARIANCE)
    scheduler = posterior_chain(5, 0.02)
    start, noise = draws(count), list(randn(5, count, LATENTS, 1, 1, seed=1))
    ends = EnergyCalibrator(None, scheduler, tolerance=1.0).run_chain(start, noise=noise, energy_model=energy)
    remainder, reference = stationary_constraint(scheduler, LATENTS), coupled_ends(scheduler, start, noise)
    forms = negative_log_posterior(q, energy), negative_log_posterior(q, energy, reference, remainder)
    values = [form(start, ends).detach() for form in forms]
    # One gradient per sample, in the unit of q's standard deviation: (u_0 - u~) of the mean alone.
    for first, second in (values, ((start - ends).flatten(1), (reference - ends).flatten(1))):
        spread = first.std(0) / math.sqrt(count)
        assert ((first.mean(0) - second.mean(0)).abs() < 5 * spread).all()
        assert (second.var(0) < 0.2 * first.var(0)).all()


@pytest.mark.parametrize("width", [1.0, 1e3])
def test_refinement_never_goes_uphill(decoder, width):
    """
    With posteriors far wider than the true one, the step of the chain overshoots: beyond a width of sqrt(2 / a) = 4.5, plain descent
    diverges. The other images of the batch move as they would alone.
    """
    images = randn(6, 1, 2, 4)
    true = decoder.posterior(images)
    widths = torch.ones(6, 1, 1, 1)
    widths[3:] = width
    q = posterior_of(true.mean + true.std, widths * true.std)
    energy = PosteriorEnergy(decoder, images, q, VARIANCE)
    start = draws(6, 3)
    states = [refine(energy, start, range(steps), noise=False) for steps in range(41)]
    course = torch.stack([energy(state) for state in states])
    assert (course.diff(dim=0) <= 0).all()
    least = energy(energy.whiten(true.mean))  # the mode of a Gaussian is its mean
    assert (course[-1] - least < 0.05 * (course[0] - least)).all()
    descent = start
    for _ in range(40):
        descent = descent - DRIFT_STEP * energy_and_gradient(energy, descent)[1]
    torch.testing.assert_close(states[-1][:3], descent[:3], rtol=0, atol=1e-2)
    if width > math.sqrt(2 / DRIFT_STEP):
        assert not (energy(descent)[3:] < course[0, 3:]).any()  # what halving is for


def test_refinement_stays_where_the_energy_is_no_number():
    """With a decoder that overflows near the start."""
    start = torch.ones(2, LATENTS, 1, 1)
    q = posterior_of(0 * start, start)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return (latents + (latents.detach() - 1).abs() * math.inf).nan_to_num(nan=0.0, posinf=math.inf)

    assert torch.equal(refine(PosteriorEnergy(decode, 0 * start, q, 0.5), start, range(3), noise=False), start)


def test_optimized_posterior_comes_to_the_true_one_and_to_the_likelihood_itself(decoder):
    """For a linear decoder, the best q is the posterior, and its evidence lower bound is log p(x)."""
    images = randn(1, 1, 2, 4).expand(512, -1, -1, -1)
    true = decoder.posterior(images)
    amortised = posterior_of(true.mean + 0.5 * true.std, 0.6 * true.std)
    found = optimized_posterior(images, amortised, decoder, VARIANCE, generator=seeded(0))
    assert ((found.mean - true.mean) / true.std).mean(0).abs().max() < 0.05
    assert (found.std / true.std).mean(0).sub(1).abs().max() < 0.05
    bounds = [
        likelihood_bounds(images[:8], posterior_of(q.mean[:8], q.std[:8]), decoder, 2000, VARIANCE, seeded(1))
        for q in (true, found, amortised)
    ]
    torch.testing.assert_close(bounds[0].elbo, bounds[0].importance_weighted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bounds[1].elbo, bounds[0].elbo, rtol=0, atol=0.1)
    assert (bounds[2].elbo < bounds[1].elbo - 0.3).all()
