# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The Langevin chain of the calibrator: its states, its side effects, its precision, an adapted drift step."""

import copy

import pytest
import torch
import torch.nn as nn
from energies import Linear, Quadratic, drift_only, randn, seeded, tiny_energy_model

from ecvae_diffusers import EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy


@pytest.mark.parametrize("noise_scale, conditioning_weight", [(0.0, 0.0), (0.1, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("generators", ["one", "list"])
def test_run_chain_is_the_loop(noise_scale, conditioning_weight, generators):
    """
    K steps on the energy in evaluation mode, from one start; a list has one generator per sample. Each state is that of the
    trajectory, and the first energies those of the samples.
    """
    energy_model = tiny_energy_model(num_scales=2).train()
    config = {"noise_scale": noise_scale, "conditioning_weight": conditioning_weight}
    scheduler = LangevinScheduler(num_steps=4, drift_step_size=0.5, **config)
    samples = randn(3, 1, 8, 8)

    def generator():
        return seeded(0) if generators == "one" else [seeded(seed) for seed in range(3)]

    calibrator = EnergyCalibrator(energy_model, scheduler)
    states = calibrator.run_chain(samples, generator(), return_trajectory=True)
    still, noise, x = copy.deepcopy(energy_model).eval(), generator(), samples
    assert torch.equal(states[0], samples)
    for k in range(4):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(still(x).energy.sum(), x)
        x = scheduler.step(gradient, k, x.detach(), samples, noise).prev_sample
        assert torch.allclose(states[k + 1], x, rtol=1e-5, atol=1e-6)
    assert (x - samples).abs().max() > 1e-4
    output = calibrator.calibrate(samples, generator())
    assert torch.equal(output.targets, states[-1])
    assert torch.allclose(output.energy_samples, compute_energy(still, samples), atol=1e-6)


def test_chain_in_closed_form():
    """On a quadratic energy, each step takes the share a of the distance to its centre."""
    center, samples = randn(1, 2, 4, seed=1), randn(3, 2, 4)
    targets = EnergyCalibrator(Quadratic(center), drift_only(7, 0.3)).run_chain(samples)
    assert torch.allclose(targets - center, (1 - 0.3) ** 7 * (samples - center), rtol=1e-5, atol=1e-6)


def test_given_noise_stands_for_drawn_noise():
    """One draw a step, in the order of the chain."""
    calibrator = EnergyCalibrator(tiny_energy_model(), LangevinScheduler(num_steps=3, noise_scale=0.1))
    samples, noise = randn(2, 1, 8, 8), randn(3, 2, 1, 8, 8)
    expected = calibrator.run_chain(samples, seeded(0))
    assert torch.equal(calibrator.run_chain(samples, noise=noise), expected)
    assert torch.equal(calibrator.calibrate(samples, noise=noise).targets, expected)
    assert not torch.allclose(calibrator.run_chain(samples, noise=noise.flip(0)), expected, atol=1e-3)


def test_chain_works_in_any_gradient_mode_and_with_checkpointing():
    energy_model, samples = tiny_energy_model(), randn(2, 1, 8, 8)
    calibrator = EnergyCalibrator(energy_model, drift_only())
    expected = calibrator.run_chain(samples)
    with torch.no_grad():
        assert torch.equal(calibrator.run_chain(samples), expected) and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(calibrator.run_chain(samples + 0), expected)
    energy_model.train().enable_gradient_checkpointing()
    assert torch.equal(calibrator.run_chain(samples), expected)


@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.bfloat16])
def test_chain_state_is_float32_under_autocast(sample_dtype):
    """A step of 1e-4 on a pixel of 1 is lost in bfloat16: only the energy may compute in it."""
    energy_model = tiny_energy_model()
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler(num_steps=5, drift_step_size=1e-3))
    samples = randn(2, 1, 8, 8).to(sample_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibration = calibrator.calibrate(samples, seeded(0))
    assert calibration.targets.dtype == calibration.loss.dtype == calibration.constraint.dtype == torch.float32
    reference = calibrator.run_chain(samples, seeded(0))
    assert torch.allclose(calibration.targets, reference, atol=1e-4)
    assert (calibration.targets != samples.float()).float().mean() > 0.9
    calibration.loss.backward()
    assert samples.grad.dtype == sample_dtype and samples.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_energy_model_in_another_precision(dtype):
    """The state of the chain has the precision of the samples, at least float32; only the network computes in its own."""
    energy_model = tiny_energy_model().eval()
    calibrator = EnergyCalibrator(energy_model, drift_only())
    samples = randn(4, 1, 8, 8)
    expected = calibrator.run_chain(samples)
    energy_model.to(dtype)
    found = calibrator.run_chain(samples)
    assert found.dtype == torch.float32 and not torch.equal(found, samples)
    assert (found - expected).norm() < 0.05 * (expected - samples).norm()
    assert calibrator.run_chain(samples.double()).dtype == torch.float64


def mixed_energy_model() -> EnergyModel:
    """In training, except for a block in evaluation mode and another whose weights are frozen."""
    energy_model = tiny_energy_model(num_scales=2).train()
    energy_model.networks[0].blocks[0].eval()
    energy_model.networks[0].blocks[1].requires_grad_(False)
    return energy_model


def snapshot(module: nn.Module) -> tuple:
    return (
        {name: part.training for name, part in module.named_modules()},
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
    )


def assert_unchanged(module: nn.Module, before: tuple):
    modes, trained, state = snapshot(module)
    assert modes == before[0] and trained == before[1]
    assert all(torch.equal(state[name], before[2][name]) for name in before[2]) and state.keys() == before[2].keys()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_chain_leaves_the_energy_model_unchanged():
    """
    To the last bit of spectral norm's vectors, with its modes and frozen parameters, and without gradients; also when it fails.
    """
    energy_model = mixed_energy_model()
    before = snapshot(energy_model)
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler())
    calibrator.calibrate(randn(3, 1, 8, 8).requires_grad_()).loss.backward()
    assert_unchanged(energy_model, before)
    with pytest.raises(ValueError, match="`sample`"):
        calibrator.run_chain(randn(3, 1, 16, 16))
    assert_unchanged(energy_model, before)


@pytest.mark.parametrize("steepness", [1e-3, 30.0])
def test_the_drift_step_is_lowered_to_the_drift_allowed(steepness):
    """From a drift far too large to the one allowed, where it stays; it is never raised."""
    energy_model = Linear(steepness * randn(1, 8, 8))
    scheduler = LangevinScheduler(num_steps=5, drift_step_size=0.2, noise_scale=1e-3)
    calibrator = EnergyCalibrator(energy_model, scheduler, drift_tolerance=0.02)
    samples, generator = randn(16, 1, 8, 8), seeded(0)
    with pytest.raises(RuntimeError, match="calibrate"):
        calibrator.adapt_drift_step(1.0)
    for _ in range(120):
        output = calibrator.calibrate(samples, generator)
        calibrator.adapt_drift_step(output.constraint)
    # The drift of this energy is K a |g| per pixel.
    slope = energy_model.slope.detach().square().mean().sqrt().item()
    expected = min(0.02, 5 * 0.2 * slope)
    assert 5 * calibrator.drift_step_size * slope == pytest.approx(expected, rel=0.05)
    assert output.drift.item() == pytest.approx(expected, rel=0.05, abs=3e-4)
    still = EnergyCalibrator(energy_model, scheduler, drift_tolerance=0.0)
    with pytest.raises(ValueError, match="`drift_tolerance`"):
        still.adapt_drift_step(still.calibrate(samples).constraint)


@pytest.mark.parametrize("pull", [0.0, 0.3, 1.0])
def test_the_adapted_chain_is_saved(pull, tmp_path):
    """As a checkpoint, with lambda, or as a scheduler: its drift step is the adapted one; the pull a w towards the start stays."""
    scheduler = LangevinScheduler(noise_scale=0.0, drift_step_size=0.3, conditioning_weight=pull / 0.3)
    calibrator = EnergyCalibrator(tiny_energy_model(), scheduler, tolerance=0.5, drift_tolerance=1e-4)
    samples = randn(2, 1, 8, 8)
    for _ in range(5):
        calibrator.adapt_drift_step(calibrator.calibrate(samples).constraint)
    calibrator.dual_step(0.8)
    state = calibrator.state_dict()
    torch.save(state, tmp_path / "calibrator.pt")
    expected = calibrator.run_chain(samples)

    adapted = calibrator.adapted_scheduler()
    assert adapted.config.drift_step_size == calibrator.drift_step_size != 0.3
    assert adapted.conditioning_coefficient(1) == pytest.approx(scheduler.conditioning_coefficient(1), abs=1e-6)
    assert torch.allclose(EnergyCalibrator(calibrator.energy_model, adapted).run_chain(samples), expected, atol=1e-6)

    resumed = EnergyCalibrator(tiny_energy_model(), scheduler, tolerance=0.5, initial_dual=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "calibrator.pt", weights_only=True))
    assert torch.equal(resumed.run_chain(samples), expected)
    for one in (calibrator, resumed):
        one.dual_step(0.9)
    assert resumed.dual == calibrator.dual != state["dual"]  # which is a snapshot
    bounded = EnergyCalibrator(tiny_energy_model(), scheduler, initial_dual=5.0, max_dual=10.0)
    bounded.load_state_dict(state)
    assert bounded.dual.item() == 10.0
