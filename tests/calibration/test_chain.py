# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The Langevin chain of the calibrator: its states, its side effects, its precision, an adapted drift step."""

import copy

import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from energies import Linear, Quadratic, drift_only, randn, seeded, tiny_energy_model

from ecvae_diffusers import EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy, frozen


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Its state is one per process, and must not reach the next test file."""
    yield
    AcceleratorState._reset_state(True)


# The chain


@pytest.mark.parametrize(
    "config",
    [
        {"num_steps": 1, "noise_scale": 0.0},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.0},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.1},
        {"num_steps": 4, "drift_step_size": 0.5, "noise_scale": 0.1, "conditioning_weight": 1.0},
    ],
)
@pytest.mark.parametrize("generators", ["one", "list"])
def test_run_chain_is_the_loop(config, generators):
    """K steps on the energy in evaluation mode, from one start; a list has one generator per sample."""
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
    samples, noise = randn(2, 1, 8, 8), randn(3, 2, 1, 8, 8)
    expected = calibrator.run_chain(samples, seeded(0))
    assert torch.equal(calibrator.run_chain(samples, noise=noise), expected)
    assert torch.equal(calibrator.calibrate(samples, noise=noise).targets, expected)
    assert not torch.allclose(calibrator.run_chain(samples, noise=noise.flip(0)), expected, atol=1e-3)


def test_chain_in_closed_form():
    """On a quadratic energy, each step takes the share a of the distance to its centre."""
    center, samples = randn(1, 2, 4, seed=1), randn(3, 2, 4)
    targets = EnergyCalibrator(Quadratic(center), drift_only(7, 0.3)).run_chain(samples)
    assert torch.allclose(targets - center, (1 - 0.3) ** 7 * (samples - center), rtol=1e-5, atol=1e-6)


def test_chain_lowers_the_energy():
    energy_model, samples = tiny_energy_model().eval(), randn(16, 1, 8, 8)
    targets = EnergyCalibrator(energy_model, drift_only(10, 0.1)).run_chain(samples)
    assert (energy_model(targets).energy < energy_model(samples).energy).all()


def test_chain_works_in_any_gradient_mode():
    calibrator = EnergyCalibrator(tiny_energy_model(), drift_only())
    samples = randn(2, 1, 8, 8)
    expected = calibrator.run_chain(samples)
    with torch.no_grad():
        assert torch.equal(calibrator.run_chain(samples), expected) and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(calibrator.run_chain(samples + 0), expected)


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


def test_chain_with_gradient_checkpointing():
    energy_model = tiny_energy_model().train()
    calibrator = EnergyCalibrator(energy_model, drift_only())
    expected = calibrator.run_chain(randn(2, 1, 8, 8))
    energy_model.enable_gradient_checkpointing()
    assert torch.equal(calibrator.run_chain(randn(2, 1, 8, 8)), expected)


# What a chain leaves behind


def mixed_energy_model() -> EnergyModel:
    """In training, except for a block in evaluation mode and another whose weights are frozen."""
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
    """To the last bit of spectral norm's vectors, with its modes and frozen parameters, and without gradients."""
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
    with pytest.raises(ValueError, match="`sample`"):
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
    """A chain does not keep the weights of the chain before."""
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


# Trajectory, precision and an adapted step


def test_trajectory_and_energies():
    energy_model = tiny_energy_model().eval()
    calibrator = EnergyCalibrator(energy_model, LangevinScheduler(num_steps=4, noise_scale=0.1))
    samples, noise = randn(3, 1, 8, 8), randn(4, 3, 1, 8, 8, seed=1)
    states = calibrator.run_chain(samples, noise=noise, return_trajectory=True)
    assert states.shape == (5, 3, 1, 8, 8) and torch.equal(states[0], samples)
    # Each state is the end of the chain's first steps.
    for k in range(1, 5):
        shorter = EnergyCalibrator(energy_model, LangevinScheduler(num_steps=k, noise_scale=0.1))
        assert torch.equal(states[k], shorter.run_chain(samples, noise=noise))
    output = calibrator.calibrate(samples, noise=noise)
    assert torch.equal(output.targets, states[-1])
    assert torch.allclose(output.energy_samples, compute_energy(energy_model, samples), atol=1e-6)
    assert output.energy_samples.shape == (3,) and not output.energy_samples.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chain_has_its_own_precision(dtype):
    """Whatever precision Accelerate gave the module's forward."""
    samples, scheduler = randn(4, 1, 8, 8), LangevinScheduler(num_steps=3, drift_step_size=1.0, noise_scale=0.0)
    exact = EnergyCalibrator(tiny_energy_model(), scheduler).run_chain(samples)
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)
        prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(tiny_energy_model())
        chain = EnergyCalibrator(prepared, scheduler, chain_dtype=dtype).run_chain(samples)
        assert chain.dtype == torch.float32
        distance = ((chain - exact).norm() / (exact - samples).norm()).item()
        assert distance < 1e-5 if dtype == torch.float32 else 1e-4 < distance < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):  # nor what is around the call
        chain = EnergyCalibrator(tiny_energy_model(), scheduler, chain_dtype=torch.float32).run_chain(samples)
    assert torch.allclose(chain, exact, atol=1e-6)


def test_chain_dtype_is_checked():
    with pytest.raises(ValueError, match="`chain_dtype`"):
        EnergyCalibrator(tiny_energy_model(), LangevinScheduler(), chain_dtype=torch.float64)
    with pytest.raises(ValueError, match="`chain_dtype`"):
        EnergyCalibrator(lambda x: x.sum((1, 2, 3)), LangevinScheduler(), chain_dtype=torch.float32)


@pytest.mark.parametrize("steepness", [1e-3, 1.0, 30.0])
def test_the_drift_step_is_lowered_to_the_drift_allowed(steepness):
    """From a drift far too large to the one allowed, where it stays; it is never raised."""
    energy_model = Linear(steepness * randn(1, 8, 8))
    scheduler = LangevinScheduler(num_steps=5, drift_step_size=0.2, noise_scale=1e-3)
    calibrator = EnergyCalibrator(energy_model, scheduler, drift_tolerance=0.02)
    samples, generator = randn(16, 1, 8, 8), seeded(0)
    for _ in range(200):
        output = calibrator.calibrate(samples, generator)
        calibrator.adapt_drift_step(output.constraint)
    # The drift of this energy is K a |g| per pixel.
    slope = energy_model.slope.detach().square().mean().sqrt().item()
    expected = min(0.02, 5 * 0.2 * slope)
    assert 5 * calibrator.drift_step_size * slope == pytest.approx(expected, rel=0.05)
    assert output.drift.item() == pytest.approx(expected, rel=0.05, abs=3e-4)
    assert scheduler.config.drift_step_size == 0.2


def test_the_adapted_step_is_saved_and_used(tmp_path):
    calibrator = EnergyCalibrator(tiny_energy_model(), LangevinScheduler(noise_scale=0.0), drift_tolerance=1e-4)
    samples = randn(2, 1, 8, 8)
    for _ in range(5):
        calibrator.adapt_drift_step(calibrator.calibrate(samples).constraint)
    torch.save(calibrator.state_dict(), tmp_path / "calibrator.pt")
    resumed = EnergyCalibrator(tiny_energy_model(), LangevinScheduler(noise_scale=0.0))
    resumed.load_state_dict(torch.load(tmp_path / "calibrator.pt", weights_only=True))
    assert torch.equal(resumed.run_chain(samples), calibrator.run_chain(samples))
    plain = LangevinScheduler(noise_scale=0.0, drift_step_size=calibrator.drift_step_size)
    expected = EnergyCalibrator(tiny_energy_model(), plain).run_chain(samples)
    assert torch.allclose(resumed.run_chain(samples), expected, atol=1e-6)


@pytest.mark.parametrize("pull", [0.0, 0.3, 1.0])
def test_the_adapted_scheduler_runs_the_adapted_chain(pull):
    """Its drift step is the adapted one; the pull a w towards the start stays."""
    scheduler = LangevinScheduler(noise_scale=0.0, drift_step_size=0.3, conditioning_weight=pull / 0.3)
    calibrator = EnergyCalibrator(tiny_energy_model(), scheduler, drift_tolerance=1e-4)
    samples = randn(2, 1, 8, 8)
    for _ in range(5):
        calibrator.adapt_drift_step(calibrator.calibrate(samples).constraint)
    adapted = calibrator.adapted_scheduler()
    assert adapted.config.drift_step_size == calibrator.drift_step_size != 0.3
    assert adapted.conditioning_coefficient(1) == pytest.approx(scheduler.conditioning_coefficient(1), abs=1e-6)
    expected = EnergyCalibrator(calibrator.energy_model, adapted).run_chain(samples)
    assert torch.allclose(calibrator.run_chain(samples), expected, atol=1e-6)
    with pytest.raises(ValueError, match="`drift_tolerance`"):
        still = EnergyCalibrator(tiny_energy_model(), scheduler, drift_tolerance=0.0)
        still.adapt_drift_step(still.calibrate(samples).constraint)
