#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compare EC-VAE with other methods on the same data and networks: `python benchmarks/studies/peers.py --output_dir STUDY`.

Autoencoder, energy model, batch, learning rates, Adam, weight average and iterations are those of the EC-VAE of chain_study.py.
GANs use the energy model's network as their discriminator. The UNet of the DDPM has about as many parameters as autoencoder and
energy model together. Three values are tried of the weight, the rate or the drift of a method.

- VAE-GAN: ELBO plus a weight times the hinge loss on prior samples (Larsen et al. 2016).
- SN-GAN: the decoder alone with the hinge loss (Miyato et al. 2018).
- VAEBM way: the VAE is frozen, and an energy model is trained for as many iterations again, with chains from samples of the
  VAE. Sampling runs a chain of 16 steps (Xiao et al. 2021).
- EC-VAE with the same chain of 16 steps at sampling time.
- DDPM: noise prediction with 1,000 steps (Ho et al. 2020), sampled by DDIM in 50 steps.
"""

import functools
import sys
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


BATCH, EMA_DECAY = 64, 0.999
TEST_STEPS = 16
# With 50 passes per image, more samples would take longer than training.
NUM_DDIM_SAMPLES = 5_000
# The best weight, rate or drift of each method counts, as does the best beta of the VAE.
SETTINGS = {
    "EC-VAE (defaults)": None,
    "EC-VAE (defaults) + 16 steps at test time": None,
    **{f"VAE-GAN, weight {weight}": weight for weight in (10, 30, 100)},
    **{f"SN-GAN, rate {rate:g}": rate for rate in (5e-4, 1e-4, 2e-5)},
    **{f"VAEBM way, drift {drift:g}": drift for drift in (1.0, 4.0, 16.0)},
    **{f"DDPM, rate {rate:g}, DDIM 50": rate for rate in (2e-3, 5e-4, 2e-4)},
}
COLUMNS = {
    **study.FRECHET,
    "precision": study.middle("precision", ".2f"),
    "recall": study.middle("recall", ".2f"),
    "coverage": study.middle("coverage", ".2f"),
}


def adam(network: torch.nn.Module, rate: float, betas: tuple[float, float] = (0.0, 0.9)) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=rate, betas=betas, weight_decay=0.0)


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def networks(data) -> tuple[AutoencoderEC, EnergyModel]:
    sizes = {"sample_size": data.resolution, "in_channels": 1, "block_out_channels": data.channels}
    vae, energy = AutoencoderEC(**sizes, latent_channels=data.latent_channels), EnergyModel(**sizes)
    return vae.to(memory_format=torch.channels_last), energy.to(memory_format=torch.channels_last)


def latents(data) -> torch.Tensor:
    return torch.randn(BATCH, data.latent_channels, 1, 1)


def loop(data, num_steps: int, train_step: Callable[[torch.Tensor], None]) -> None:
    batches = study.epochs(data.train, BATCH)
    for _ in tqdm(range(num_steps), mininterval=5):
        train_step(next(batches).to(memory_format=torch.channels_last))


def adversarial(data, num_steps: int, weight: float | None, rate: float) -> ECVAEPipeline:
    """Train a VAE-GAN or, if `weight` is `None`, an SN-GAN, which has no ELBO and no trained encoder."""
    vae, energy = networks(data)
    average = moving_average(vae, EMA_DECAY)
    optimizers = adam(vae, rate), adam(energy, rate)

    def train_step(real: torch.Tensor) -> None:
        energy.requires_grad_(False)
        if weight is None:
            samples = vae.decode(latents(data)).sample
            loss = compute_energy(energy, samples).mean()
        else:
            output = vae(real, sample_posterior=True, prior_latents=latents(data))
            samples = output.prior_sample
            loss = elbo_loss(real, output.sample, output.latent_dist).loss
            loss = loss + weight * compute_energy(energy, samples).mean()
        energy.requires_grad_(True)
        step(optimizers[0], loss)
        # The hinge loss. A low energy is a high score.
        energies = compute_energy(energy, torch.cat([real, samples.detach()]))
        energy_real, energy_samples = energies.split([len(real), len(samples)])
        step(optimizers[1], F.relu(1 + energy_real).mean() + F.relu(1 - energy_samples).mean())
        average.update_parameters(vae)

    loop(data, num_steps, train_step)
    return ECVAEPipeline(vae=average.module.eval(), energy_model=energy.eval(), scheduler=None)


def vaebm(data, num_steps: int, folder: Path, drift: float) -> ECVAEPipeline:
    """Train a new energy model for the chain from samples of the frozen VAE in `folder`."""
    vae = ECVAEPipeline.from_pretrained(folder).vae
    _, energy = networks(data)
    scheduler = LangevinScheduler(num_steps=TEST_STEPS, drift_step_size=drift / TEST_STEPS)
    calibrator, optimizer = EnergyCalibrator(energy, scheduler), adam(energy, data.learning_rate)

    def train_step(real: torch.Tensor) -> None:
        with torch.no_grad():
            samples = vae.decode(latents(data)).sample
        step(optimizer, calibrator.energy_loss(real, calibrator.run_chain(samples)).loss)

    loop(data, num_steps, train_step)
    return ECVAEPipeline(vae=vae, energy_model=energy.eval(), scheduler=scheduler)


def small_unet(data) -> UNet2DModel:
    """Build a UNet with the levels of the autoencoder, attention at 4 px, and about the parameters of both networks."""
    wanted = sum(network.num_parameters() for network in networks(data))

    def unet(width: int) -> UNet2DModel:
        channels = tuple(width * min(2**i, 4) for i in range(len(data.channels)))
        return UNet2DModel(
            sample_size=data.resolution, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=channels,
            norm_num_groups=4, attention_head_dim=8,
            down_block_types=["DownBlock2D"] * (len(channels) - 1) + ["AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (len(channels) - 1),
        )  # fmt: skip

    return min((unet(width) for width in range(8, 65, 4)), key=lambda network: abs(network.num_parameters() - wanted))


def ddpm(data, num_steps: int, rate: float) -> DDIMPipeline:
    unet, scheduler = small_unet(data), DDPMScheduler(num_train_timesteps=1000)
    unet.to(memory_format=torch.channels_last)
    average = moving_average(unet, EMA_DECAY)
    # Diffusion models are trained with momentum.
    optimizer = adam(unet, rate, betas=(0.9, 0.999))

    def train_step(real: torch.Tensor) -> None:
        noise, timesteps = torch.randn_like(real), torch.randint(1000, (len(real),))
        predicted = unet(scheduler.add_noise(real, noise, timesteps), timesteps).sample
        step(optimizer, F.mse_loss(predicted, noise))
        average.update_parameters(unet)

    loop(data, num_steps, train_step)
    return DDIMPipeline(unet=average.module.eval(), scheduler=scheduler)


def sample_in_steps(pipeline, num_images: int, **kwargs) -> torch.Tensor:
    """Return samples of a pipeline as uint8 images (N, C, H, W). `kwargs` are passed to the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    return sample_images(functools.partial(pipeline, **kwargs), num_images, seed=1)


def make_row(args, data, name: str, seed: int) -> dict:
    """Train the setting `name`, and measure its samples."""
    folder, setting, num_steps = args.output_dir / data.name, SETTINGS[name], args.max_train_steps
    torch.manual_seed(seed)
    if name.startswith("EC-VAE"):
        run = folder / f"peers_ecvae_{seed}"
        study.train(data, run, seed, num_steps)
        if name == "EC-VAE (defaults)":
            return study.trained_row(data, run)
        pipeline = ECVAEPipeline.from_pretrained(run)
        samples = sample_in_steps(pipeline, data.num_samples, num_refinement_steps=TEST_STEPS)
    elif name.startswith("VAEBM"):
        run = folder / f"peers_vae_{seed}"
        study.train(data, run, seed, num_steps, "--calibration", "none")
        pipeline = vaebm(data, num_steps, run, setting)
        samples = sample_in_steps(pipeline, data.num_samples, num_refinement_steps=TEST_STEPS)
    elif name.startswith("DDPM"):
        num_samples = min(data.num_samples, NUM_DDIM_SAMPLES)
        samples = sample_in_steps(ddpm(data, num_steps, setting), num_samples, num_inference_steps=50)
    else:
        weight, rate = (setting, data.learning_rate) if name.startswith("VAE-GAN") else (None, setting)
        samples = sample_images(adversarial(data, num_steps, weight, rate), data.num_samples, seed=1)
    return study.against(data.metrics, samples)


def main() -> None:
    args = study.parser(__doc__, list(SETTINGS)).parse_args()
    results = study.run_on_either(args, "peers", functools.partial(make_row, args))
    print(results.table("model", list(SETTINGS), COLUMNS))


if __name__ == "__main__":
    main()
