#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Can a kernel take the energy model's place? `python benchmarks/studies/kernel_study.py --output_dir STUDY` (or `--fashion_mnist DATASET`).

Drifting models (arXiv 2602.04770) train a generator without a second network. The target of a sample lies in the direction of a field:
the kernel-weighted mean of data minus that of other samples. Calibration takes such targets as they are
(`EnergyCalibrator.constrain`), so each row trains the VAE of peers.py with another source of targets, and moves of the same length.

- pixels: the kernel compares images.
- patches: it compares patches of 8 px at equal places, every 4 px.
- encoder: it compares features of the VAE's encoder at equal places, after each block that halves the size.

A field in features is pulled back to the image by the features' gradient. The distances of a kernel are in units of their mean.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.calibration import HEALTHY_MOVE
from ecvae_diffusers.energy import frozen
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.tasks.networks import moving_average
from ecvae_diffusers.variational import elbo_loss
from studies.peers import EMA_DECAY, adam, latents, loop, networks, step


TEMPERATURES = (0.02, 0.05, 0.2)
PATCH, STRIDE, PLACES = 8, 4, 4


def kernel_field(samples: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """
    Return the field V of samples (L, N, d) towards data (L, M, d), at each of L places. The rows of a place have a root-mean-square
    length of 1 for each temperature. A sample is not compared with itself.
    """
    with torch.no_grad():
        distances = [torch.cdist(samples, other) for other in (data, samples)]
        scale = distances[0].mean((1, 2), keepdim=True).clamp(min=1e-12)
        itself = torch.eye(samples.shape[1], dtype=torch.bool, device=samples.device)
        distances = torch.cat([distances[0], distances[1].masked_fill(itself, float("inf"))], dim=2) / scale
        field = torch.zeros_like(samples)
        for temperature in TEMPERATURES:
            # Each pair is weighted by how near it is among the pairs of its sample, and among those of its other end.
            weights = (-distances / temperature).softmax(2) * (-distances / temperature).softmax(1)
            near, repelling = weights.sqrt().split([data.shape[1], samples.shape[1]], dim=2)
            pull = (near * repelling.sum(2, keepdim=True)) @ data - (repelling * near.sum(2, keepdim=True)) @ samples
            field += pull / pull.square().sum(2).mean(1).sqrt().clamp(min=1e-12)[:, None, None]
    return field


def pixels(vae: AutoencoderEC, images: torch.Tensor) -> Iterator[torch.Tensor]:
    yield images.flatten(1)[None]


def patches(vae: AutoencoderEC, images: torch.Tensor) -> Iterator[torch.Tensor]:
    yield F.unfold(images, PATCH, stride=STRIDE).permute(2, 0, 1)


def encoder(vae: AutoencoderEC, images: torch.Tensor) -> Iterator[torch.Tensor]:
    hidden = vae.encoder.conv_in(images)
    for block in vae.encoder.blocks:
        size, hidden = hidden.shape[-1], block(hidden)
        if hidden.shape[-1] < size:
            pooled = F.adaptive_avg_pool2d(hidden, min(PLACES, hidden.shape[-1]))
            yield pooled.flatten(2).permute(2, 0, 1)


# The features of each setting, and whether an energy model calibrates too.
SETTINGS: dict[str, tuple[list[Callable], bool]] = {
    "VAE": ([], False),
    "energy model, K 1": ([], True),
    "kernel, pixels": ([pixels], False),
    "kernel, patches": ([patches], False),
    "kernel, encoder": ([encoder], False),
    "kernel, patches and encoder": ([patches, encoder], False),
    "energy model and kernel, patches": ([patches], True),
}


def kernel_targets(
    features: list[Callable], vae: AutoencoderEC, samples: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Return targets of samples (B, C, H, W): a move of root-mean-square length `HEALTHY_MOVE` along the pulled-back fields."""
    samples = samples.detach().requires_grad_()
    move = torch.zeros_like(samples)
    with frozen(vae):
        for described in features:
            for of_samples, of_data in zip(described(vae, samples), described(vae, real)):
                field = kernel_field(of_samples.detach(), of_data.detach())
                (pulled,) = torch.autograd.grad((field * of_samples).sum(), samples, retain_graph=True)
                move += pulled / pulled.square().flatten(1).sum(1).mean().sqrt().clamp(min=1e-12)
    length = move.square().flatten(1).sum(1).mean().sqrt().clamp(min=1e-12)
    return samples.detach() + HEALTHY_MOVE * move / length


def train(data, num_steps: int, features: list[Callable], with_energy_model: bool) -> ECVAEPipeline:
    vae, energy = networks(data)
    average = moving_average(vae, EMA_DECAY)
    optimizers = adam(vae, data.learning_rate, (0.0, 0.99)), adam(energy, 1e-3, (0.0, 0.99))
    scheduler = LangevinScheduler(num_steps=1, drift_step_size=1.0)
    learned = EnergyCalibrator(energy, scheduler, gradient_penalty="auto")
    # Targets of a kernel have no noise, and the move of the tolerance, so lambda stays where it starts.
    kernel = EnergyCalibrator(None, LangevinScheduler(num_steps=1, noise_scale=0.0))

    def train_step(real: torch.Tensor) -> None:
        output = vae(real, sample_posterior=True, prior_latents=latents(data))
        loss, samples = elbo_loss(real, output.sample, output.latent_dist).loss, output.prior_sample
        if features:
            loss = loss + kernel.constrain(samples, kernel_targets(features, vae, samples, real)).loss
        if with_energy_model:
            calibration = learned.calibrate(samples)
            loss = loss + calibration.loss
        step(optimizers[0], loss)
        if with_energy_model:
            step(optimizers[1], learned.energy_loss(real, calibration.targets).loss)
            learned.dual_step(calibration.constraint)
        average.update_parameters(vae)

    loop(data, num_steps, train_step)
    return ECVAEPipeline(vae=average.module.eval(), energy_model=None, scheduler=None)


def main() -> None:
    args = study.parser(__doc__, list(SETTINGS)).parse_args()

    def make(data, name: str, seed: int) -> dict:
        torch.manual_seed(seed)
        pipeline = train(data, args.max_train_steps, *SETTINGS[name])
        return study.against(data.metrics, sample_images(pipeline, data.num_samples, seed=1))

    results = study.run_on_either(args, "kernel", make)
    columns = {**study.FRECHET, "seconds": study.middle("seconds", ".0f")}
    for key in ("precision", "recall"):
        columns[key] = study.middle(key, ".2f")
    print(results.table("targets", list(SETTINGS), columns))


if __name__ == "__main__":
    main()
