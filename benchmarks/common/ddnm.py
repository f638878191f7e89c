# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""DDNM+ (Wang et al. 2023, arXiv 2212.00490) without its time travel: restoration with a diffusion model, as a peer of ours.

At each step, the model's estimate of the clean image gets what was measured in the range of the operator A = U S V^T,

.. math:: \hat x_{0|t} = x_{0|t} + V \Lambda_t V^T A^+ (y - A x_{0|t}), \qquad x_{t-1} = a_t \hat x_{0|t} + b_t x_t + V \Phi_t V^T \epsilon,

where a_t and b_t are those of DDPM's posterior with standard deviation sigma_t. For measurement noise of standard deviation sigma_y and a
singular value s, the noise that comes with the measurement is a_t lambda sigma_y / s. It replaces noise of the sampler:
lambda = min(1, sigma_t s / (a_t sigma_y)) and phi^2 = sigma_t^2 - (a_t lambda sigma_y / s)^2. The model's estimates are clamped to [-1, 1].
"""

import time

import torch
from diffusers import DDIMPipeline
from tqdm import tqdm

from ecvae_diffusers.evaluation.restoration import Answers, Task


# Singular values below this share of the largest one count as 0.
SMALLEST = 1e-6


class Decomposition:
    """The singular value decomposition of a linear operator on images (C, H, W), computed from its dense matrix."""

    def __init__(self, operator, shape: tuple[int, ...]):
        unit = torch.eye(torch.Size(shape).numel()).view(-1, *shape)
        # A row per pixel, so that this is A^T = V S U^T.
        matrix = torch.cat([operator.A(part).flatten(1) for part in unit.split(512)])
        self.v, s, _ = torch.linalg.svd(matrix.double(), full_matrices=True)
        self.v, self.s = self.v.float(), torch.zeros(len(matrix))
        self.s[: len(s)] = torch.where(s > SMALLEST * s.max(), s, 0).float()

    def weigh(self, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return V diag(weights) V^T x for images x (N, C, H, W) and one weight per singular vector."""
        return ((images.flatten(1) @ self.v) * weights @ self.v.T).view_as(images)


@torch.no_grad()
def ddnm(
    pipeline: DDIMPipeline, task: Task, num_restorations: int, num_steps: int = 100, batch_size: int = 64, seed: int = 0
) -> Answers:  # fmt: skip
    """
    Restore all measurements of a task with an unconditional diffusion model for images in [-1, 1].

    Args:
        pipeline (`DDIMPipeline`): Has a `unet` that predicts noise, and a `scheduler` with the noise schedule.
        task ([`Task`]): The measurements.
        num_restorations (`int`): Number of answers per measurement.
        num_steps (`int`, *optional*, defaults to 100): Number of passes of the UNet per answer.
        batch_size (`int`, *optional*, defaults to 64): Number of answers that are computed together.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.

    Returns:
        [`Answers`]
    """
    found = Decomposition(task.operator, tuple(task.clean.shape[1:]))
    started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    measured = task.measured.repeat_interleave(num_restorations, 0)
    alphas = pipeline.scheduler.alphas_cumprod
    timesteps = torch.linspace(len(alphas) - 1, 0, num_steps).round().long()
    inverse = torch.where(found.s > 0, 1 / found.s, 0.0)
    answers = []
    for y in tqdm(measured.split(batch_size), desc=f"DDNM, {task.name}"):
        x = torch.randn(len(y), *task.clean.shape[1:], generator=generator)
        for i, timestep in enumerate(timesteps):
            alpha = alphas[timestep]
            alpha_next = alphas[timesteps[i + 1]] if i + 1 < num_steps else torch.tensor(1.0)
            beta = 1 - alpha / alpha_next
            noise = pipeline.unet(x, timestep).sample
            clean = ((x - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1, 1)
            a, b = alpha_next.sqrt() * beta / (1 - alpha), (alpha / alpha_next).sqrt() * (1 - alpha_next) / (1 - alpha)
            sigma = (beta * (1 - alpha_next) / (1 - alpha)).sqrt()
            measurement_noise = a * task.noise_std * inverse
            # Without measurement noise, what was measured counts in full.
            weights = torch.where(measurement_noise > 0, (sigma / measurement_noise).clamp(max=1), 1.0)
            rest = (sigma**2 - (measurement_noise * weights) ** 2).clamp(min=0).sqrt()
            correction = task.operator.A_dagger(y - task.operator.A(clean))
            clean = clean + found.weigh(correction, weights)
            draws = torch.randn(x.shape, generator=generator)
            x = a * clean + b * x + found.weigh(draws, rest)
        answers.append(x)
    images = torch.cat(answers)
    each = images.view(len(task.clean), num_restorations, *images.shape[1:])
    residual = (task.operator.A(images) - measured).square()
    figures = {
        "residual": residual[::num_restorations].mean().sqrt().item(),
        "residual_of_mean": (task.operator.A(each.mean(1)) - task.measured).square().mean().sqrt().item(),
        "largest_relative_residual": (residual.flatten(1).sum(1).sqrt() / measured.flatten(1).norm(dim=1))
        .max()
        .item(),
        "num_network_calls": num_steps,
        "seconds": (time.perf_counter() - started) / len(task.clean),
    }
    std = each.std(1) if num_restorations > 1 else None
    return Answers(each[:, 0].clamp(-1, 1), each.mean(1).clamp(-1, 1), std, figures)
