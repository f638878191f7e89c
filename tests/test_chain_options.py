"""What `EnergyCalibrator` offers beside the plain chain: its trajectory, its precision, an adapted drift step."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ecvae_diffusers import EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_energy_model() -> EnergyModel:
    torch.manual_seed(0)
    return EnergyModel(sample_size=8, in_channels=1, block_out_channels=(8, 8))


class Slope(torch.nn.Module):
    """f(x) = <g, x>: a chain of K steps moves by exactly K a g."""

    def __init__(self, slope: torch.Tensor):
        super().__init__()
        self.slope = torch.nn.Parameter(slope)

    def forward(self, sample):
        return (sample * self.slope).flatten(1).sum(1)


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
    """Whatever precision Accelerate has put on the module's forward."""
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
    with pytest.raises(ValueError, match="`chain_dtype` must be None, torch.float32.* but is torch.float64"):
        EnergyCalibrator(tiny_energy_model(), LangevinScheduler(), chain_dtype=torch.float64)
    with pytest.raises(ValueError, match="`chain_dtype` must be None where `energy_model` is not a module"):
        EnergyCalibrator(lambda x: x.sum((1, 2, 3)), LangevinScheduler(), chain_dtype=torch.float32)


@pytest.mark.parametrize("steepness", [1e-3, 1.0, 30.0])
def test_the_drift_step_is_lowered_to_the_drift_allowed(steepness):
    """From a drift far too large to the one allowed, and it stays there; but it is not raised to it."""
    energy_model = Slope(steepness * randn(1, 8, 8))
    scheduler = LangevinScheduler(num_steps=5, drift_step_size=0.2, noise_scale=1e-3)
    calibrator = EnergyCalibrator(energy_model, scheduler, drift_tolerance=0.02)
    samples, generator = randn(16, 1, 8, 8), torch.Generator().manual_seed(0)
    for _ in range(200):
        output = calibrator.calibrate(samples, generator)
        calibrator.adapt_drift_step(output.constraint)
    # The drift of this energy is K a |g| a pixel.
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
    """The drift step is what it has become; the pull towards the start, a w, is the one given."""
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


def test_a_drift_of_nothing_can_not_be_kept():
    calibrator = EnergyCalibrator(tiny_energy_model(), LangevinScheduler(), drift_tolerance=0.0)
    output = calibrator.calibrate(randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="`drift_tolerance` must be above 0"):
        calibrator.adapt_drift_step(output.constraint)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Its state is one for the process: the next test file is not to find ours."""
    yield
    AcceleratorState._reset_state(True)
