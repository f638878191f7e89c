#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What people would train instead, on the same data with the same networks: `python benchmarks/studies/peers.py --output_dir STUDY`.

Autoencoder, energy model (as the critic), batch, learning rates, Adam, average and iterations are those of the EC-VAE of
chain_study.py (the VAEBM way trains as many again for its energy model, with K 16). The DDPM has a UNet of about the
autoencoder's and energy model's parameters together. Where a method has a weight, a rate or a drift, three are tried.

- VAE-GAN: ELBO plus a weight times the hinge loss on prior samples (Larsen et al. 2016, with a spectrally normalized critic).
- SN-GAN: the decoder alone, hinge loss (Miyato et al. 2018).
- VAEBM way: the VAE frozen, the energy model trained against chains from its samples, and a chain of 16 steps per
  image at test time (Xiao et al. 2021).
- EC-VAE and the chain of 16 steps at test time, on the pair that training left.
- DDPM: noise prediction, 1,000 steps (Ho et al. 2020), sampled by DDIM in 50.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.tasks.networks import moving_average
from ecvae_diffusers.variational import elbo_loss


BATCH, ADAM_BETAS, EMA_DECAY = 64, (0.0, 0.9), 0.999
TEST_STEPS = 16
# 50 passes per image: more would take longer than the training.
NUM_DDIM_SAMPLES = 5_000
# Weights, rates and drifts of which the best one is taken, as the VAE is given its own best beta.
SETTINGS = {
    "EC-VAE (defaults)": None,
    "EC-VAE (defaults) + 16 steps at test time": None,
    **{f"VAE-GAN, weight {weight}": weight for weight in (10, 30, 100)},
    **{f"SN-GAN, rate {rate:g}": rate for rate in (5e-4, 1e-4, 2e-5)},
    **{f"VAEBM way, drift {drift:g}": drift for drift in (1.0, 4.0, 16.0)},
    **{f"DDPM, rate {rate:g}, DDIM 50": rate for rate in (2e-3, 5e-4, 2e-4)},
}
COLUMNS = {
    "Frechet distance, each seed": study.each("frechet_distance", ".1f"),
    "median": study.middle("frechet_distance", ".1f"),
    "precision": study.middle("precision", ".2f"),
    "recall": study.middle("recall", ".2f"),
    "coverage": study.middle("coverage", ".2f"),
}


def adam(network: torch.nn.Module, rate: float, betas: tuple[float, float] = ADAM_BETAS) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=rate, betas=betas, weight_decay=0.0)


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def networks(data) -> tuple[AutoencoderEC, EnergyModel]:
    sizes = {"sample_size": data.resolution, "in_channels": 1, "block_out_channels": data.channels}
    vae, energy = AutoencoderEC(**sizes, latent_channels=data.latent_channels), EnergyModel(**sizes)
    return vae.to(memory_format=torch.channels_last), energy.to(memory_format=torch.channels_last)


def latents(data, count: int = BATCH) -> torch.Tensor:
    return torch.randn(count, data.latent_channels, 1, 1)


def loop(data, num_steps: int, train_step: Callable[[torch.Tensor], None], name: str) -> float:
    """Return the seconds of `num_steps` steps."""
    started, batches = time.perf_counter(), study.epochs(data.train, BATCH)
    for _ in tqdm(range(num_steps), desc=name, mininterval=5):
        train_step(next(batches).to(memory_format=torch.channels_last))
    return time.perf_counter() - started


def critic_step(energy: EnergyModel, optimizer, real: torch.Tensor, samples: torch.Tensor) -> None:
    """Hinge loss; a low energy is a high score."""
    energies = compute_energy(energy, torch.cat([real, samples.detach()]))
    energy_real, energy_samples = energies.split([len(real), len(samples)])
    step(optimizer, F.relu(1 + energy_real).mean() + F.relu(1 - energy_samples).mean())


def adversarial(data, name: str, num_steps: int, weight: float | None, rate: float) -> tuple[ECVAEPipeline, float]:
    """Train a VAE-GAN, or without a weight an SN-GAN: it has no ELBO, and its encoder is not trained."""
    vae, energy = networks(data)
    average = moving_average(vae, EMA_DECAY)
    optimizers = adam(vae, rate), adam(energy, rate)

    def train_step(real: torch.Tensor) -> None:
        if weight is None:
            samples = vae.decode(latents(data)).sample
            loss = compute_energy(energy.requires_grad_(False), samples).mean()
        else:
            output = vae(real, sample_posterior=True, prior_latents=latents(data))
            samples = output.prior_sample
            loss = elbo_loss(real, output.sample, output.latent_dist).loss
            loss = loss + weight * compute_energy(energy.requires_grad_(False), samples).mean()
        energy.requires_grad_(True)
        step(optimizers[0], loss)
        critic_step(energy, optimizers[1], real, samples)
        average.update_parameters(vae)

    seconds = loop(data, num_steps, train_step, name)
    return ECVAEPipeline(vae=average.module.eval(), energy_model=energy.eval(), scheduler=None), seconds


def vaebm(data, num_steps: int, folder, drift: float) -> tuple[ECVAEPipeline, float]:
    """Return the frozen VAE of `folder`, with a new energy model for the chain."""
    vae = ECVAEPipeline.from_pretrained(folder).vae
    _, energy = networks(data)
    scheduler = LangevinScheduler(num_steps=TEST_STEPS, drift_step_size=drift / TEST_STEPS)
    calibrator, optimizer = EnergyCalibrator(energy, scheduler), adam(energy, data.learning_rate)

    def train_step(real: torch.Tensor) -> None:
        with torch.no_grad():
            samples = vae.decode(latents(data)).sample
        step(optimizer, calibrator.energy_loss(real, calibrator.run_chain(samples)).loss)

    seconds = loop(data, num_steps, train_step, f"VAEBM way, drift {drift}")
    return ECVAEPipeline(vae=vae, energy_model=energy.eval(), scheduler=scheduler), seconds


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def small_unet(data) -> UNet2DModel:
    """Return as many levels as the autoencoder has, attention at 4 px, and about as many parameters as both networks."""
    wanted = parameters(*networks(data))

    def unet(width: int) -> UNet2DModel:
        channels = tuple(width * min(2**i, 4) for i in range(len(data.channels)))
        return UNet2DModel(
            sample_size=data.resolution, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=channels,
            norm_num_groups=4, attention_head_dim=8,
            down_block_types=["DownBlock2D"] * (len(channels) - 1) + ["AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (len(channels) - 1),
        )  # fmt: skip

    return min((unet(width) for width in range(8, 65, 4)), key=lambda network: abs(parameters(network) - wanted))


def ddpm(data, name: str, num_steps: int, rate: float) -> tuple[DDIMPipeline, float]:
    unet, scheduler = small_unet(data), DDPMScheduler(num_train_timesteps=1000)
    unet.to(memory_format=torch.channels_last)
    average = moving_average(unet, EMA_DECAY)
    # With the first moment, as diffusion models are trained.
    optimizer = adam(unet, rate, betas=(0.9, 0.999))

    def train_step(real: torch.Tensor) -> None:
        noise, timesteps = torch.randn_like(real), torch.randint(1000, (len(real),))
        predicted = unet(scheduler.add_noise(real, noise, timesteps), timesteps).sample
        step(optimizer, F.mse_loss(predicted, noise))
        average.update_parameters(unet)

    seconds = loop(data, num_steps, train_step, name)
    return DDIMPipeline(unet=average.module.eval(), scheduler=scheduler), seconds


def images_of(call: Callable, num_images: int, seed: int) -> torch.Tensor:
    """Return uint8 images of a pipeline's call, 500 at a time."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for start in tqdm(range(0, num_images, 500), desc="Sampling"):
        images = torch.as_tensor(call(min(500, num_images - start), generator=generator).images)
        batches.append((images * 255).round().to(torch.uint8))
    return torch.cat(batches)


def ddim_images(pipeline: DDIMPipeline, num_images: int, seed: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = functools.partial(pipeline, num_inference_steps=50, output_type="np")
    return images_of(call, num_images, seed).permute(0, 3, 1, 2)


def refined_images(pipeline: ECVAEPipeline, num_images: int, seed: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return images_of(functools.partial(pipeline, num_refinement_steps=TEST_STEPS, output_type="pt"), num_images, seed)


def make_row(data, name: str, seed: int, output_dir: Path, num_steps: int) -> dict:
    """Train what `name` names, and measure its samples."""
    folder, setting, vae_gan = output_dir / data.name, SETTINGS[name], name.startswith("VAE-GAN")
    torch.manual_seed(seed)
    if name.startswith("EC-VAE"):
        run = folder / f"peers_ecvae_{seed}"
        study.train(data, run, seed, num_steps)
        if "test time" not in name:
            return study.trained_row(data, run)
        return data.measure(refined_images(ECVAEPipeline.from_pretrained(run), data.num_samples, seed=1))
    if name.startswith("VAEBM"):
        run = folder / f"peers_vae_{seed}"
        study.train(data, run, seed, num_steps, "--calibration", "none")
        pipeline, seconds = vaebm(data, num_steps, run, setting)
        samples = refined_images(pipeline, data.num_samples, seed=1)
    elif name.startswith("DDPM"):
        pipeline, seconds = ddpm(data, name, num_steps, setting)
        samples = ddim_images(pipeline, min(data.num_samples, NUM_DDIM_SAMPLES), seed=1)
    else:
        weight, rate = (setting, data.learning_rate) if vae_gan else (None, setting)
        pipeline, seconds = adversarial(data, name, num_steps, weight, rate)
        samples = sample_images(pipeline, data.num_samples, seed=1)
    return {**data.measure(samples), "training_seconds": round(seconds, 1)}


def main() -> None:
    args = study.parser(__doc__, list(SETTINGS)).parse_args()
    results = study.open_results(args, "peers")
    if not args.table:
        data = study.load_data(args)
        both, unet = parameters(*networks(data)), parameters(small_unet(data))
        print(
            f"{data.about}; {both:,} parameters, UNet {unet:,}; {args.max_train_steps} iterations; {study.versions()}"
        )

        def make(name: str, seed: int) -> dict:
            return make_row(data, name, seed, args.output_dir, args.max_train_steps)

        results.fill(args.settings, args.seeds, make, args.max_train_steps)
    print(study.results_table(results, list(SETTINGS), "model", COLUMNS))


if __name__ == "__main__":
    main()
