# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The constraint and its gradient, the loss of the energy model, and the inputs of a calibrator."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from energies import Linear, Quadratic, drift_only, randn, seeded, tiny_energy_model

from ecvae_diffusers import EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.energy import compute_energy, energy_and_gradient


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (1, 12), (6, 2, 3, 4, 5)])
def test_constraint_and_its_gradient(shape):
    """
    C is the mean of squared errors summed over a sample, the loss lambda times it. Targets are constants: the gradient is
    2 lambda (x - x~) / B, through the samples and not through the chain.
    """
    energy = tiny_energy_model() if shape[1:] == (1, 8, 8) else Quadratic(torch.zeros(shape[1:]))
    calibrator = EnergyCalibrator(energy, LangevinScheduler(num_steps=3, noise_scale=0.1), initial_dual=7.0)
    samples = randn(*shape).requires_grad_()
    output = calibrator.calibrate(samples, seeded(0))
    assert torch.equal(output.targets, calibrator.run_chain(samples, seeded(0)))
    assert not output.targets.requires_grad and output.targets.shape == samples.shape
    constraint = sum((sample - end).square().sum() for sample, end in zip(samples, output.targets)) / len(samples)
    assert output.constraint.item() == pytest.approx(constraint.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(7.0 * constraint.item(), rel=1e-5)
    for name in ("loss", "constraint", "noise_floor", "drift"):
        assert output[name].shape == () and output[name].requires_grad == (name == "loss")
    output.loss.backward()
    assert torch.allclose(samples.grad, 2 * 7 * (samples - output.targets).detach() / len(samples), rtol=1e-5)


def test_another_energy_and_another_distance():
    """For one call: the chain follows that energy, and the constraint is the mean of that distance, with its gradient."""
    scheduler = drift_only(2, 0.1)
    own, other = Quadratic(torch.zeros(3)), Quadratic(torch.ones(3))
    calibrator = EnergyCalibrator(own, scheduler, initial_dual=2.0)
    samples = randn(5, 3).requires_grad_()
    expected = EnergyCalibrator(other, scheduler).calibrate(samples).targets
    output = calibrator.calibrate(samples, energy_model=other, distance=lambda x, end: (x - end).abs().sum(1))
    assert torch.equal(output.targets, expected)
    assert output.constraint.item() == pytest.approx((samples - expected).abs().sum(1).mean().item())
    output.loss.backward()
    assert torch.allclose(samples.grad, 2.0 * (samples - expected).detach().sign() / 5)


@pytest.mark.parametrize("noise_scale", [0.0, 0.05])
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_noise_and_drift_add_up_to_the_constraint(slope, num_steps, noise_scale):
    """
    The noise floor is D K b^2. A constant gradient g moves each sample by K a g: the drift is K a |g| / sqrt(D), whatever the noise.
    """
    slopes, batch_size = slope * randn(3, 4), 20_000
    scheduler = LangevinScheduler(num_steps=num_steps, drift_step_size=0.01, noise_scale=noise_scale)
    output = EnergyCalibrator(Linear(slopes), scheduler).calibrate(torch.zeros(batch_size, 3, 4), seeded(0))
    floor, drift = num_steps * noise_scale**2, num_steps * 0.01 * slopes.square().mean().sqrt().item()
    assert output.noise_floor.item() == pytest.approx(12 * floor)
    # Deviations of |K a g + noise|^2 / D: of its noise part, and of the product of both.
    deviation = math.sqrt((2 * floor**2 + 4 * floor * drift**2) / (12 * batch_size))
    assert output.constraint.item() / 12 == pytest.approx(floor + drift**2, abs=5 * deviation + 1e-6)
    # Half of all chains on a flat energy end nearer than the noise floor says: no root of a negative number.
    assert 0 <= output.drift.item() <= math.sqrt(drift**2 + 5 * deviation) + 1e-6


def critic_gradient(energy_model, samples: torch.Tensor, weight: float) -> torch.Tensor:
    """The gradient of a generator's loss weight * mean f(x), as of a critic f."""
    samples = samples.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(weight * compute_energy(energy_model, samples).mean(), samples)
    return gradient


def test_one_step_is_a_critic_exactly():
    """
    At K = 1, the gradient of the constraint is that of a critic f of weight 2 lambda a. The chain is float32, so the numbers are
    chosen such that no operation rounds: multiples of 1/4, and powers of two for a, lambda and the batch size.
    """
    samples, center = torch.randint(-8, 9, (2, 8, 3, 4), generator=seeded(0)) / 4.0
    calibrator = EnergyCalibrator(Quadratic(center[0]), drift_only(1, 0.25), initial_dual=32.0)
    samples.requires_grad_()
    calibrator.calibrate(samples).loss.backward()
    assert samples.grad.abs().max() > 0
    assert torch.equal(samples.grad, critic_gradient(calibrator.energy_model, samples, 2 * 32.0 * 0.25))


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_one_step_is_a_critic_in_float64(spectral_norm):
    """The same identity on a network, with the constraint computed in float64: to 1e-12."""
    energy_model = tiny_energy_model(spectral_norm=spectral_norm, act_fn="silu").double().eval()
    samples, dual, a = randn(4, 1, 8, 8, dtype=torch.float64).requires_grad_(), 30.0, 0.5
    targets = drift_only(1, a).step(energy_and_gradient(energy_model, samples)[1], 0, samples.detach()).prev_sample
    (dual * (samples - targets).square().flatten(1).sum(1).mean()).backward()
    expected = critic_gradient(energy_model, samples, 2 * dual * a)
    assert (samples.grad - expected).abs().max() < 1e-12 * expected.abs().max()


def test_one_step_is_a_critic_in_expectation():
    """With noise, over many chains from one sample: x - x~ = a grad f - b n, and the noise has mean 0."""
    a, b, count, sample = 0.1, 0.5, 100_000, randn(1, 6, seed=1).requires_grad_()
    scheduler = LangevinScheduler(num_steps=1, drift_step_size=a, noise_scale=b)
    calibrator = EnergyCalibrator(Quadratic(randn(1, 6)), scheduler, initial_dual=1.0)
    calibrator.calibrate(sample.expand(count, -1), seeded(0)).loss.backward()
    expected, error = critic_gradient(calibrator.energy_model, sample, 2 * a), 2 * b / math.sqrt(count)
    assert (sample.grad - expected).abs().max() < 5 * error < expected.abs().max() / 4


def test_total_drift_on_a_constant_gradient():
    """K steps of a constant gradient have weight 2 lambda K a, as the docstring of the module states."""
    calibrator = EnergyCalibrator(Linear(randn(6)), drift_only(15, 0.3 / 15), initial_dual=2.0)
    samples = randn(4, 6, seed=1).requires_grad_()
    calibrator.calibrate(samples).loss.backward()
    expected = critic_gradient(calibrator.energy_model, samples, 2 * 2.0 * 0.3)
    assert torch.allclose(samples.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_targets", [1, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_energy_loss_is_the_formula(alpha, num_targets):
    """E f(data) - E f(x~) + alpha (E f(data)^2 + E f(x~)^2), each a mean over its own number of samples."""
    energy_model = tiny_energy_model(spectral_norm=False)
    with torch.no_grad():
        energy_model.networks[0].conv_out.weight *= 10.0
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler(), energy_regularization=alpha)
    real, targets = randn(3, 1, 8, 8), randn(num_targets, 1, 8, 8, seed=1).requires_grad_()
    output = calibrator.energy_loss(real, targets)
    f_real, f_fake = energy_model(real).energy, energy_model(targets).energy
    expected = f_real.mean() - f_fake.mean() + alpha * ((f_real**2).mean() + (f_fake**2).mean())
    assert torch.allclose(output.loss, expected, atol=1e-6)
    assert torch.allclose(output.energy_real, f_real, atol=1e-6)
    assert torch.allclose(output.energy_targets, f_fake, atol=1e-6)
    assert not output.energy_real.requires_grad and not output.energy_targets.requires_grad
    gradients = torch.autograd.grad(expected, energy_model.parameters(), allow_unused=True)
    output.loss.backward()
    assert targets.grad is None  # they are constants
    for (name, parameter), gradient in zip(energy_model.named_parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6), name


def test_energy_loss_goes_once_through_the_module_given():
    """Data and samples together: a distributed wrapper synchronizes one forward pass per backward pass."""
    wrapped, batches = nn.Sequential(tiny_energy_model()), []
    wrapped.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    calibrator = EnergyCalibrator(lambda sample: None, LangevinScheduler())
    calibrator.energy_loss(randn(3, 1, 8, 8), randn(5, 1, 8, 8, seed=1), energy_model=wrapped)
    assert batches == [8]


def test_energy_step_takes_one_power_iteration():
    """Spectral norm moves in the energy step only."""
    energy_model = tiny_energy_model().train()
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler())
    reference = copy.deepcopy(energy_model)
    output = calibrator.calibrate(randn(2, 1, 8, 8))
    calibrator.energy_loss(randn(2, 1, 8, 8), output.targets)
    reference(randn(4, 1, 8, 8))
    for name, expected in reference.state_dict().items():
        assert torch.equal(energy_model.state_dict()[name], expected), name


def test_gradient_penalty_is_half_the_mean_squared_slope_at_the_data():
    """gamma / 2 E |grad f(x)|^2, of a quadratic energy gamma / 2 E |x - m|^2, with the gradients to its parameters."""
    real, targets, gamma = randn(6, 3), randn(4, 3, seed=1), 0.7
    plain, penalized = Quadratic(randn(3, seed=2)), Quadratic(randn(3, seed=2))
    expected = EnergyCalibrator(plain, LangevinScheduler()).energy_loss(real, targets).loss
    expected = expected + gamma / 2 * (real - plain.center).square().sum(1).mean()
    output = EnergyCalibrator(penalized, LangevinScheduler(), gradient_penalty=gamma).energy_loss(real, targets)
    assert torch.allclose(output.loss, expected)
    expected.backward()
    output.loss.backward()
    assert torch.allclose(penalized.center.grad, plain.center.grad, atol=1e-6)
    assert not output.energy_real.requires_grad and not real.requires_grad


def test_the_automatic_gradient_penalty_is_that_of_the_same_image_at_every_size():
    """gamma E |grad f|^2 where f sees averages over a grid n times as fine: n times gamma, and 1 / n of the squared slope."""
    real, targets = randn(6, 3, 8, 8), randn(4, 3, 8, 8, seed=1)
    quadratic = Quadratic(randn(3 * 8 * 8, seed=2))
    losses = []
    for scale in (1, 2, 4):

        def energy(sample, scale=scale):
            return quadratic(torch.nn.functional.avg_pool2d(sample, scale).flatten(1))

        calibrator = EnergyCalibrator(energy, LangevinScheduler(), gradient_penalty="auto")
        finer = (image.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for image in (real, targets))
        losses.append(calibrator.energy_loss(*finer).loss)
    assert torch.allclose(torch.stack(losses), losses[0].expand(3), rtol=1e-5)
    fixed = EnergyCalibrator(lambda sample: quadratic(sample.flatten(1)), LangevinScheduler(), gradient_penalty=0.075)
    assert torch.allclose(fixed.energy_loss(real, targets).loss, losses[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_penalty_of_an_energy_model(checkpointing):
    """The penalty's gradient to a weight, by finite differences; the same with activations computed again."""
    energy_model = tiny_energy_model(spectral_norm=False, act_fn="silu").double()
    if checkpointing:
        energy_model.enable_gradient_checkpointing()
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler(), gradient_penalty=3.0)
    real, targets = randn(2, 1, 8, 8, dtype=torch.float64), randn(2, 1, 8, 8, seed=1, dtype=torch.float64)
    calibrator.energy_loss(real, targets).loss.backward()
    weight, step = energy_model.networks[0].conv_in.weight, 1e-3
    values = []
    for change in (step, -step):
        weight.data[0, 0, 1, 1] += change
        values.append(calibrator.energy_loss(real, targets).loss.item())
        weight.data[0, 0, 1, 1] -= change
    assert weight.grad[0, 0, 1, 1].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("energy_shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_plain_callables(energy_shape):
    """An energy is any function that gives one number per sample. Critics give a trailing dimension of 1."""

    def energy(sample):
        return (sample.square().sum(1) / 2).view(energy_shape)

    samples = randn(4, 9)
    output = EnergyCalibrator(energy, drift_only(1, 0.25)).calibrate(samples)
    assert torch.allclose(output.targets, 0.75 * samples)
    for dtype in (torch.float32, torch.bfloat16):
        energies = compute_energy(energy, samples.to(dtype))
        assert energies.shape == (4,) and energies.dtype == torch.float32


def test_what_would_be_cut_or_spread_silently_is_refused():
    """A map of patch scores as energy; integer data, which would round targets; targets of one sample; a tolerance of 0."""
    calibrator = EnergyCalibrator(tiny_energy_model(), drift_only(), drift_tolerance=0.0)
    samples = randn(4, 1, 8, 8)
    targets = calibrator.calibrate(samples).targets
    for energy in (lambda sample: sample, lambda sample: (sample,)):
        with pytest.raises(ValueError, match="`energy_model`"):
            compute_energy(energy, randn(4, 9))
    for name, call in (
        ("distance", lambda: calibrator.calibrate(samples, distance=lambda x, end: (x - end).abs())),
        ("real", lambda: calibrator.energy_loss(torch.ones(4, 1, 8, 8, dtype=torch.int64), targets)),
        ("samples", lambda: calibrator.constrain(samples, targets[:1])),
        ("samples", lambda: calibrator.calibrate(randn(5))),
        ("energy_model", lambda: EnergyCalibrator(None, drift_only()).run_chain(samples)),
        ("drift_tolerance", calibrator.resolve_tolerance),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            call()


@pytest.mark.parametrize(
    "name, values",
    [
        ("tolerance", (0.0, -1.0, math.nan, math.inf, "automatic", None)), ("max_dual", (0.0, -1.0, math.inf, math.nan, 10.0)),
        ("initial_dual", (-1.0, 101.0, math.nan)), ("drift_tolerance", (-1.0, math.nan)), ("gradient_penalty", (-1.0, math.nan, "automatic")),
        ("dual_learning_rate", (-0.1, math.inf, math.nan)), ("energy_regularization", (-0.1, math.nan)),
    ],
)  # fmt: skip
def test_invalid_arguments(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`"):
            EnergyCalibrator(tiny_energy_model(), LangevinScheduler(), **{name: value})
