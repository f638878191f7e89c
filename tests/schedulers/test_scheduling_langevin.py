# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests of `LangevinScheduler`: as a scheduler of diffusers, and against closed forms of Langevin chains."""

import math

import energies
import pytest
import torch
from energies import seeded

from ecvae_diffusers import LangevinScheduler


# Every argument away from its default.
CONFIG = {"num_steps": 7, "drift_step_size": 0.3, "noise_scale": 0.05, "conditioning_weight": 0.4}
SHAPES = pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 16, 1, 1), (4, 10)], ids=["images", "latents", "vectors"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return energies.randn(*shape, seed=seed, dtype=dtype)


def test_config_round_trip(tmp_path):
    scheduler = LangevinScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    for loaded in (LangevinScheduler.from_pretrained(tmp_path), LangevinScheduler.from_config(scheduler.config)):
        assert {name: loaded.config[name] for name in CONFIG} == CONFIG
        assert loaded.num_inference_steps == len(loaded) == 7
    sample = randn(2, 3)
    assert scheduler.order == scheduler.init_noise_sigma == 1 and scheduler.scale_model_input(sample, 1) is sample


def test_timesteps():
    """K is the length of the chain that is run, not the one of the config."""
    scheduler = LangevinScheduler(num_steps=5, drift_step_size=0.5, noise_scale=0.1, conditioning_weight=2.0)
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.tolist() == [0, 1, 2, 3] and len(scheduler) == scheduler.num_inference_steps == 4
    assert [scheduler.conditioning_coefficient(k) for k in range(4)] == [0.75, 0.5, 0.25, 0.0]
    scheduler.set_timesteps(1)
    assert scheduler.noise_variance() == pytest.approx(0.1**2)
    scheduler.set_timesteps()
    assert len(scheduler) == len(scheduler.timesteps) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_step_shape_and_dtype(dtype, shape=(4, 10)):
    """Arguments stay as they are. Energies are float32, and so may their gradients be."""
    scheduler = LangevinScheduler(**CONFIG)
    sample, start = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    gradient = randn(*shape, seed=2, dtype=torch.float32)
    before = [tensor.clone() for tensor in (gradient, sample, start)]
    output = scheduler.step(gradient, scheduler.timesteps[0], sample, start, seeded(0)).prev_sample
    assert output.shape == shape and output.dtype == dtype and torch.isfinite(output).all()
    assert torch.equal(output, scheduler.step(gradient, 0, sample, start, seeded(0), return_dict=False)[0])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((gradient, sample, start), before))


@SHAPES
@pytest.mark.parametrize(
    "num_steps, weight, noise_scale", [(1, 0.7, 0.3), (4, 0.0, 0.3), (4, 0.7, 0.0), (4, 0.7, 0.3)]
)
def test_step_is_the_formula(shape, num_steps, weight, noise_scale):
    """x' = x - a grad f - c_k (x - x0) + b n with c_k = a w (K - 1 - k) / K, at every step k."""
    a = 0.2
    scheduler = LangevinScheduler(
        num_steps=num_steps, drift_step_size=a, noise_scale=noise_scale, conditioning_weight=weight
    )
    gradient, x, x0 = (randn(*shape, seed=seed) for seed in range(3))
    for k in range(num_steps):
        c_k = a * weight * (num_steps - 1 - k) / num_steps
        expected = x - a * gradient - c_k * (x - x0) + noise_scale * randn(*shape, seed=9)
        step = scheduler.step(gradient, k, x, x0, generator=seeded(9)).prev_sample
        assert torch.allclose(step, expected, rtol=1e-12, atol=1e-12)
        assert scheduler.conditioning_coefficient(k) == pytest.approx(c_k)


@SHAPES
def test_a_list_of_generators_is_one_per_sample(shape):
    """The chain of a sample does not depend on its batch, to the last bit."""
    scheduler = LangevinScheduler(**CONFIG)
    gradient, x, x0 = (randn(*shape, seed=seed) for seed in range(3))
    batch = scheduler.step(gradient, 0, x, x0, generator=[seeded(seed) for seed in range(len(x))]).prev_sample
    for i in range(len(x)):
        row = slice(i, i + 1)
        for generator in (seeded(i), [seeded(i)]):
            alone = scheduler.step(gradient[row], 0, x[row], x0[row], generator=generator).prev_sample
            assert torch.equal(batch[row], alone)
    given = torch.cat([randn(1, *shape[1:], seed=seed) for seed in range(len(x))])
    assert torch.equal(scheduler.step(gradient, 0, x, x0, noise=given).prev_sample, batch)


@pytest.mark.parametrize("num_steps, weight", [(1, 4.0), (3, 0.0), (10, 1.0), (10, 4.0)])
def test_noise_variance_by_monte_carlo(num_steps, weight):
    """Of the end of a chain with no gradient, around the start that the conditioning pulls it to."""
    scheduler = LangevinScheduler(
        num_steps=num_steps, drift_step_size=0.2, noise_scale=0.1, conditioning_weight=weight
    )
    start = torch.full((100_000, 1), 0.5)
    x, generator = start, seeded(0)
    for k in range(num_steps):
        x = scheduler.step(torch.zeros_like(x), k, x, start, generator).prev_sample
    variance = (x - start).double().var().item()
    # The variance of n normal draws has the relative standard error sqrt(2 / n).
    assert variance == pytest.approx(scheduler.noise_variance(), rel=5 * math.sqrt(2 / len(x)))
    if weight == 0 or num_steps == 1:
        assert scheduler.noise_variance() == pytest.approx(num_steps * 0.1**2)
    else:
        assert scheduler.noise_variance() < 0.99 * num_steps * 0.1**2


@pytest.mark.parametrize("a, b", [(0.2, math.sqrt(2 * 0.2)), (0.4, 0.3)], ids=["temperature 1", "another"])
def test_quadratic_energy_is_sampled(a, b):
    """
    On f(x) = (x - mu)^2 / (2 v) a chain is an autoregression with coefficient 1 - a / v, whose stationary mean is mu
    and whose variance is b^2 / (1 - (1 - a / v)^2). With b = sqrt(2 a) that is v / (1 - a / (2 v)), which tends to
    exp(-f)'s own v as a does to 0: temperature 1.
    """
    mu, v = 0.7, 0.9
    # After this many steps, what is left of the start is below 1e-5 of it.
    num_steps = math.ceil(math.log(1e-5) / math.log(1 - a / v))
    scheduler = LangevinScheduler(num_steps=num_steps, drift_step_size=a, noise_scale=b)
    x, generator = torch.full((10_000, 3, 4, 4), -1.0), seeded(0)
    for k in scheduler.timesteps:
        x = scheduler.step((x - mu) / v, k, x, generator=generator).prev_sample
    variance = b**2 / (1 - (1 - a / v) ** 2)
    assert b == 0.3 or variance == pytest.approx(v / (1 - a / (2 * v)))
    x, n = x.double(), x.numel()
    assert x.mean().item() == pytest.approx(mu, abs=5 * math.sqrt(variance / n))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
    # Chains of a batch are independent of each other, and so are the entries of a sample.
    centred = x.flatten(1) - mu
    neighbours = torch.stack([centred[1:] * centred[:-1], centred[1:] * centred[1:].roll(1, dims=1)]).flatten(1)
    assert (neighbours.mean(1).abs() < 5 * variance / math.sqrt(neighbours.shape[1])).all()


@pytest.mark.parametrize("name", ["drift_step_size", "noise_scale", "conditioning_weight"])
def test_invalid_numbers(name):
    assert LangevinScheduler(**{name: 0.0}).config[name] == 0
    for value in (-1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match=name):
            LangevinScheduler(**{name: value})
    with pytest.raises(ValueError, match="conditioning_weight"):
        LangevinScheduler(drift_step_size=0.5, conditioning_weight=2.1)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, 10**12])
def test_invalid_number_of_steps(num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        LangevinScheduler(num_steps=num_steps)
    with pytest.raises(ValueError, match="num_inference_steps"):
        LangevinScheduler().set_timesteps(num_steps)


@pytest.mark.parametrize("timestep", [-1, 3, torch.tensor(3)])
def test_invalid_steps(timestep):
    scheduler = LangevinScheduler(num_steps=10, conditioning_weight=1.0)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="`timestep`"):
        scheduler.step(randn(2, 3), timestep, randn(2, 3), randn(2, 3))
    with pytest.raises(ValueError, match="`initial_sample`"):
        scheduler.step(randn(2, 3), 0, randn(2, 3))
