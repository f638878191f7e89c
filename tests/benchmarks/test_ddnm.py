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


def test_noise_is_removed_as_far_as_the_prior_allows(clean):
    task = Task("denoising", clean, 0.2)
    answers = ddnm(PIPELINE, task, 16)
    # The best mean has an error of STD * noise / sqrt(STD^2 + noise^2), and the measurement one of `noise`.
    best = STD * 0.2 / (STD**2 + 0.2**2) ** 0.5
    error = (answers.mean - clean).square().mean().sqrt().item()
    assert best * 0.95 < error < 0.85 * 0.2
