#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What each option of speed does to the numbers: `python benchmarks/precision.py`, or `--model FOLDER_OR_ID` of a pipeline.

One training iteration's quantities are computed with one option at a time, in the arrangement of training_step.py, on the same
weights, images and noise, and compared with those of the published arrangement in float32: the norm of the difference over
the norm. Float64 in the place of float32 says how much of it is rounding that nobody could avoid.
"""

import argparse
import contextlib
import copy
import platform
from collections.abc import Iterator
from unittest import mock

import diffusers
import torch
from command_line import add_figures, write_figures
from command_line import device as device_here
from training_step import separate_pooling

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyCalibrator, EnergyModel, LangevinScheduler, calibration
from ecvae_diffusers.energy import compute_energy
from ecvae_diffusers.variational import elbo_loss


OPTIONS = (
    "float64", "frozen energy", "one pass", "fused pooling", "channels_last", "fused optimizer", "bf16 in the chain",
    "bf16 everywhere",
)  # fmt: skip
NUM_IMAGES, BATCH_STEPS = 64, 10


@contextlib.contextmanager
def unfrozen() -> Iterator[None]:
    """Chains that do not hold the energy model still."""
    with mock.patch.object(calibration, "frozen", lambda module: contextlib.nullcontext()):
        yield


def quantities(
    vae: AutoencoderEC, energy: EnergyModel, scheduler: LangevinScheduler, option: str | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """The samples, how far the chain moves them, and both networks' gradients, flat; and weights after ten steps of Adam."""
    vae, energy = copy.deepcopy(vae).train(), copy.deepcopy(energy).train()
    dtype = torch.float64 if option == "float64" else torch.float32
    layout = torch.channels_last if option == "channels_last" else torch.contiguous_format
    for network in (vae, energy):
        network.to(dtype=dtype, memory_format=layout)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    size, channels = vae.config.sample_size, vae.config.in_channels
    real = normal(NUM_IMAGES, channels, size, size).clamp(-1, 1).contiguous(memory_format=layout)
    latents, posterior_noise = (normal(NUM_IMAGES, vae.config.latent_channels, 1, 1) for _ in range(2))
    # The published arrangement leaves the energy model in training: each step of a chain then takes a power iteration.
    held = contextlib.nullcontext() if option == "frozen energy" else unfrozen()
    noise = normal(len(scheduler), *real.shape)
    calibrator = EnergyCalibrator(
        energy,
        scheduler,
        chain_dtype=torch.bfloat16 if option == "bf16 in the chain" else None,
    )
    pooling = contextlib.nullcontext() if option == "fused pooling" else separate_pooling()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=option == "bf16 everywhere")
    with pooling, autocast:
        output = vae(real, True, latents, posterior_noise)
        with held:
            calibrated = calibrator.calibrate(output.prior_sample, noise=noise)
        (elbo_loss(real, output.sample, output.latent_dist).loss + calibrated.loss).backward()
        energy.zero_grad()  # without freezing the chain leaves gradients, which training would have cleared
        if option == "one pass":
            calibrator.energy_loss(real, calibrated.targets).loss.backward()
        else:
            energies = compute_energy(energy, real), compute_energy(energy, calibrated.targets)
            calibrator.contrast(*energies).loss.backward()
    gradients = {
        name: torch.cat([p.grad.flatten().double() for p in network.parameters() if p.requires_grad])
        for name, network in (("autoencoder's gradient", vae), ("energy model's gradient", energy))
    }
    before = torch.cat([p.detach().flatten().double() for p in vae.parameters()])
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=5e-4, betas=(0.0, 0.9), weight_decay=0.0, fused=option == "fused optimizer" or None
    )
    for _ in range(BATCH_STEPS):
        optimizer.step()
    after = torch.cat([p.detach().flatten().double() for p in vae.parameters()])
    samples = output.prior_sample.detach().double()
    return {
        "samples": samples,
        "chain's move": calibrated.targets.double() - samples,
        **gradients,
        "ten steps of Adam": after - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument(
        "--model", help="folder or Hub id of a pipeline with its energy model; new networks if not given"
    )
    add_figures(parser)
    args = parser.parse_args()
    device = args.device
    diffusers.utils.logging.set_verbosity_error()  # a warning at each cast
    torch.manual_seed(0)
    if args.model is not None:
        try:
            pipeline = ECVAEPipeline.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            parser.error(f"--model {args.model!r} can't be loaded: {error}")
        vae, energy, scheduler = pipeline.vae, pipeline.energy_model, pipeline.scheduler
        if energy is None or scheduler is None:
            parser.error(f"--model {args.model!r} has no energy model: there is no chain.")
    else:
        scheduler = LangevinScheduler()
        sizes = {"sample_size": 32, "block_out_channels": (32, 64, 128, 128)}
        vae, energy = AutoencoderEC(**sizes), EnergyModel(**sizes)
    vae, energy = vae.to(device), energy.to(device)
    reference = quantities(vae, energy, scheduler, None, device)
    print(f"{args.model or 'new networks'}; {device}, {platform.machine()}, torch {torch.__version__}")
    print(f"| option | {' | '.join(reference)} |\n|---|{'---|' * len(reference)}")
    for option in OPTIONS:
        found = quantities(vae, energy, scheduler, option, device)
        differences = [((found[key] - value).norm() / value.norm()).item() for key, value in reference.items()]
        print(f"| {option} | {' | '.join(f'{difference:.0e}' for difference in differences)} |", flush=True)
        if option.startswith("bf16"):
            write_figures(args, {f"{option}, relative change of the chain's move": f"{differences[1]:.0e}"})


if __name__ == "__main__":
    main()
