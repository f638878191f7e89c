# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The Langevin chain of the calibrator: what it computes, and what it leaves behind."""

import copy

import pytest
import torch
import torch.nn as nn
from energies import Quadratic, drift_only, randn, seeded, tiny_energy_model

from ecvae_diffusers import EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import frozen


# The chain


@pytest.mark.parametrize(
    "config",
    [
        {"num_steps": 1, "noise_scale": 0.0},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.0},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.1},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.1, "conditioning_weight": 1.0},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.1, "max_gradient_norm": 1e-3},
    ],
)
@pytest.mark.parametrize("generators", ["one", "list"])
def test_run_chain_is_the_loop(config, generators):
    """K steps on the energy in evaluation mode, all from one start; a list of generators is one a sample."""
    energy_model = tiny_energy_model(num_scales=2).train()
    scheduler = LangevinScheduler(**config)
    samples = randn(3, 1, 8, 8)

    def generator():
        return seeded(0) if generators == "one" else [seeded(seed) for seed in range(3)]

    targets = EnergyCalibrator(energy_model, scheduler).run_chain(samples, generator())
    still, noise, x = copy.deepcopy(energy_model).eval(), generator(), samples
    for k in range(config["num_steps"]):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(still(x).energy.sum(), x)
        x = scheduler.step(gradient, k, x.detach(), samples, noise).prev_sample
    assert torch.allclose(targets, x, rtol=1e-5, atol=1e-6)
    assert (targets - samples).abs().max() > 1e-4


def test_given_noise_stands_for_drawn_noise():
    """One draw a step, in the order of the chain."""
    calibrator = EnergyCalibrator(tiny_energy_model(), LangevinScheduler(num_steps=3, noise_scale=0.1))
    samples, generator = randn(2, 1, 8, 8), seeded(0)
    noise = torch.stack([torch.randn(2, 1, 8, 8, generator=generator) for _ in range(3)])
    expected = calibrator.run_chain(samples, seeded(0))
    assert torch.equal(calibrator.run_chain(samples, noise=noise), expected)
    assert torch.equal(calibrator.calibrate(samples, noise=noise).targets, expected)
    assert not torch.allclose(calibrator.run_chain(samples, noise=noise.flip(0)), expected, atol=1e-3)


def test_chain_in_closed_form():
    """On a quadratic energy each step takes the share a of the distance to its centre."""
    center, samples = randn(1, 2, 4, seed=1), randn(3, 2, 4)
    targets = EnergyCalibrator(Quadratic(center), drift_only(7, 0.3)).run_chain(samples)
    assert torch.allclose(targets - center, (1 - 0.3) ** 7 * (samples - center), rtol=1e-5, atol=1e-6)


def test_chain_lowers_the_energy():
    energy_model, samples = tiny_energy_model().eval(), randn(16, 1, 8, 8)
    targets = EnergyCalibrator(energy_model, drift_only(10, 0.1)).run_chain(samples)
    assert (energy_model(targets).energy < energy_model(samples).energy).all()


def test_chain_works_without_gradient_mode():
    calibrator = EnergyCalibrator(tiny_energy_model(), drift_only())
    with torch.no_grad():
        targets = calibrator.run_chain(randn(2, 1, 8, 8))
        assert not torch.is_grad_enabled()
    assert torch.equal(targets, calibrator.run_chain(randn(2, 1, 8, 8)))


@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.bfloat16])
def test_chain_state_is_float32_under_autocast(sample_dtype):
    """A step of 1e-4 on a pixel of 1 is lost in bfloat16: the energy may compute in it, the state may not."""
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


def test_chain_with_gradient_checkpointing():
    energy_model = tiny_energy_model().train()
    calibrator = EnergyCalibrator(energy_model, drift_only())
    expected = calibrator.run_chain(randn(2, 1, 8, 8))
    energy_model.enable_gradient_checkpointing()
    assert torch.equal(calibrator.run_chain(randn(2, 1, 8, 8)), expected)


# What a chain leaves behind


def mixed_energy_model() -> EnergyModel:
    """In training, but for a block in evaluation mode and another whose weights are frozen."""
    energy_model = tiny_energy_model(num_scales=2).train()
    energy_model.networks[0].blocks[0].eval()
    energy_model.networks[0].blocks[1].requires_grad_(False)
    return energy_model


def snapshot(module: nn.Module) -> tuple:
    return (
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        {name: part.training for name, part in module.named_modules()},
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
    )


def assert_unchanged(module: nn.Module, before: tuple):
    state, modes, trained = snapshot(module)
    assert all(torch.equal(state[name], before[0][name]) for name in before[0]) and state.keys() == before[0].keys()
    assert modes == before[1] and len(set(modes.values())) == 2
    assert trained == before[2] and len(set(trained.values())) == 2
    assert all(parameter.grad is None for parameter in module.parameters())


def test_chain_leaves_the_energy_model_unchanged():
    """To the last bit of spectral norm's vectors; modes and frozen parameters as they were; no gradient on it."""
    energy_model = mixed_energy_model()
    assert any(name.endswith("._u") for name in energy_model.state_dict())
    before = snapshot(energy_model)
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler())
    samples = randn(3, 1, 8, 8).requires_grad_()
    calibrator.run_chain(samples)
    assert_unchanged(energy_model, before)
    calibrator.calibrate(samples).loss.backward()
    assert_unchanged(energy_model, before)


def test_a_failing_chain_leaves_the_energy_model_unchanged():
    energy_model = mixed_energy_model()
    before = snapshot(energy_model)
    with pytest.raises(ValueError, match="`sample` must have shape"):
        EnergyCalibrator(energy_model, LangevinScheduler()).run_chain(randn(3, 1, 16, 16))
    assert_unchanged(energy_model, before)


def test_frozen():
    energy_model = mixed_energy_model()
    before = snapshot(energy_model)
    with pytest.raises(KeyError), frozen(energy_model):
        assert not any(part.training for part in energy_model.modules())
        assert not any(parameter.requires_grad for parameter in energy_model.parameters())
        # The normalized weights are computed once, not at every step.
        assert energy_model.networks[0].conv_in.weight is energy_model.networks[0].conv_in.weight
        raise KeyError
    assert_unchanged(energy_model, before)
    assert energy_model.networks[0].conv_in.weight is not energy_model.networks[0].conv_in.weight


def test_energy_model_trains_between_chains():
    """The weights that a chain holds are not those of the chain before."""
    energy_model = tiny_energy_model()
    calibrator = EnergyCalibrator(energy_model, drift_only())
    samples = randn(2, 1, 8, 8)
    first = calibrator.run_chain(samples)
    assert torch.equal(calibrator.run_chain(samples), first)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, energy_model.parameters()):
            parameter.add_(randn(*parameter.shape, seed=parameter.numel()))
    assert not torch.allclose(calibrator.run_chain(samples), first)
    calibrator.energy_loss(samples, first).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in energy_model.parameters())
