# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""DDNM+ with the exact denoiser of independent normal pixels, whose answers are known."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from common.ddnm import Decomposition, ddnm
from ecvae_diffusers.evaluation.restoration import Task, make_operator


STD = 0.2
SCHEDULER = DDIMScheduler(num_train_timesteps=1000)
TASKS = ("random_inpainting", "super_resolution_x2", "deblurring", "colorization")


def unet(sample, timestep):
    """The best prediction of the noise for images whose pixels are N(0, STD^2)."""
    alpha = SCHEDULER.alphas_cumprod[timestep]
    clean = alpha.sqrt() * STD**2 / (alpha * STD**2 + 1 - alpha) * sample
    return SimpleNamespace(sample=(sample - alpha.sqrt() * clean) / (1 - alpha).sqrt())


PIPELINE = SimpleNamespace(unet=unet, scheduler=SCHEDULER)


@pytest.fixture(scope="module")
def clean():
    return STD * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TASKS)
def test_the_decomposition_is_that_of_the_operator(clean, name):
    operator = make_operator(name, (3, 8, 8))
    found = Decomposition(operator, (3, 8, 8))
    product = found.weigh(clean, found.s**2)
    assert torch.allclose(product, operator.A_adjoint(operator.A(clean)), atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_without_noise_the_measurement_is_kept_and_the_rest_is_drawn(clean, name):
    task = Task(name, clean, 0.0)
    answers = ddnm(PIPELINE, task, 8)
    assert answers.figures["residual"] < 1e-4
    unknown = answers.std.square().mean().sqrt().item()
    expected = STD * (Decomposition(task.operator, (3, 8, 8)).s == 0).float().mean().sqrt().item()
    assert unknown == pytest.approx(expected, rel=0.15, abs=1e-4)


@pytest.mark.parametrize("name", ["denoising", "super_resolution_x2", "deblurring"])
def test_with_noise_each_direction_has_the_spread_of_its_recursion(clean, name):
    noise_std, num_steps, num_answers = 0.1, 20, 64
    task = Task(name, clean, noise_std)
    found = Decomposition(task.operator, (3, 8, 8))
    answers = [ddnm(PIPELINE, task, 1, num_steps, seed=seed).single for seed in range(num_answers)]
    spread = (torch.stack(answers).flatten(2) @ found.v).var(0).mean(0)
    # Along one singular vector, the sampler is a recursion of numbers. Its variance, given the measurement:
    expected = torch.ones(len(found.s))
    alphas = SCHEDULER.alphas_cumprod
    timesteps = torch.linspace(999, 0, num_steps).round().long()
    for i, timestep in enumerate(timesteps):
        alpha, last = alphas[timestep], i + 1 == num_steps
        alpha_next = torch.tensor(1.0) if last else alphas[timesteps[i + 1]]
        beta = 1 - alpha / alpha_next
        a = alpha_next.sqrt() * beta / (1 - alpha)
        b = (alpha / alpha_next).sqrt() * (1 - alpha_next) / (1 - alpha)
        variance = beta * (1 - alpha_next) / (1 - alpha)
        shrink = alpha.sqrt() * STD**2 / (alpha * STD**2 + 1 - alpha)
        of_noise = a * noise_std / found.s.clamp(min=1e-12)
        weight = torch.where(found.s > 0, (variance.sqrt() / of_noise).clamp(max=1), 0.0)
        rest = torch.where(found.s > 0, variance - (of_noise * weight) ** 2, variance)
        expected = (a * (1 - weight) * shrink + b) ** 2 * expected + rest
    for part in (found.s == 0, found.s > 0.5, (found.s > 0) & (found.s <= 0.5)):
        if part.any():
            assert spread[part].mean().item() == pytest.approx(expected[part].mean().item(), rel=0.1, abs=1e-5)
