#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One training iteration in the published arrangement against ours: `python benchmarks/training_step.py`.

The published arrangement (written here from the paper's equations): two chains an iteration, one for the decoder and one
for the energy model; the energy in training mode, so that spectral normalization takes a power iteration at each of its
forwards, and with parameter gradients recorded; the pull towards the start as a term of the energy, differentiated with
it; data and samples through the energy model one after the other; float32 in contiguous layout; every loss read back at
every step. Each line of the table makes ONE of our changes to it; the last one makes all. Same networks, batch and K;
the arrangements take turns in one process, and the figure is the median over rounds of the ratio of their times.
"""

import argparse
import dataclasses
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

import ecvae_diffusers
from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy
from ecvae_diffusers.variational import elbo_loss


NOISE = 1e-3
DRIFT_STEP = 0.2


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Which of our changes are made to the published arrangement."""

    single_chain: bool = False
    frozen_energy: bool = False
    closed_form: bool = False
    one_pass: bool = False
    channels_last: bool = False
    bf16: bool = False
    no_wait: bool = False
    fused_optimizer: bool = False


CHANGES = [field.name for field in dataclasses.fields(Arrangement)]


class Iteration:
    """Networks, optimizers and one training step in an arrangement."""

    def __init__(
        self, arrangement: Arrangement, resolution: int, channels: list[int], num_steps: int, weight: float, device
    ):
        torch.manual_seed(0)
        self.arrangement, self.device = arrangement, device
        sizes = {"sample_size": resolution, "in_channels": 3, "block_out_channels": tuple(channels)}
        self.vae = AutoencoderEC(**sizes, latent_channels=128).to(device)
        self.energy = EnergyModel(**sizes).to(device)
        self.layout = torch.channels_last if arrangement.channels_last else torch.contiguous_format
        for network in (self.vae, self.energy):
            network.to(memory_format=self.layout)
        fused = {"fused": True} if arrangement.fused_optimizer else {}
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=1e-5, betas=(0.0, 0.9), **fused)
            for network in (self.vae, self.energy)
        ]
        scheduler = LangevinScheduler(
            num_steps=num_steps, drift_step_size=DRIFT_STEP, noise_scale=NOISE, conditioning_weight=weight
        )
        self.calibrator = EnergyCalibrator(self.energy, scheduler)

    def chain(self, samples: torch.Tensor) -> torch.Tensor:
        """The chain with what of the published arrangement is left in it."""
        if self.arrangement.frozen_energy and self.arrangement.closed_form:
            return self.calibrator.run_chain(samples)
        if self.arrangement.frozen_energy:
            from ecvae_diffusers.energy import frozen

            with frozen(self.energy):
                return self.chain_by_autograd(samples)
        return self.chain_by_autograd(samples)

    def chain_by_autograd(self, samples: torch.Tensor) -> torch.Tensor:
        scheduler, start = self.calibrator.scheduler, samples.detach()
        sample, closed_form = start, self.arrangement.closed_form
        for k in range(len(scheduler)):
            sample = sample.detach().requires_grad_()
            energy = compute_energy(self.energy, sample).sum()
            pull = scheduler.conditioning_coefficient(k)
            if not closed_form:
                energy = energy + pull / DRIFT_STEP * (sample - start).square().sum() / 2
            (gradient,) = torch.autograd.grad(energy, sample)
            with torch.no_grad():
                sample = sample - DRIFT_STEP * gradient + NOISE * torch.randn_like(sample)
                if closed_form:
                    sample = sample - pull * (sample - start)
        return sample.detach()

    def read(self, *losses: torch.Tensor) -> None:
        if not self.arrangement.no_wait:
            for loss in losses:
                loss.item()

    def step(self, real: torch.Tensor) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.arrangement.bf16):
            self.autoencoder_step(real)

    def autoencoder_step(self, real: torch.Tensor) -> None:
        arrangement, (vae_optimizer, energy_optimizer) = self.arrangement, self.optimizers
        latents = torch.randn(len(real), 128, 1, 1, device=self.device)
        output = self.vae(real, sample_posterior=True, prior_latents=latents)
        samples = output.prior_sample
        targets = self.chain(samples)
        constraint = (samples.float() - targets).square().flatten(1).sum(1).mean()
        elbo = elbo_loss(real, output.sample, output.latent_dist)
        loss = elbo.loss + self.calibrator.dual.to(self.device) * constraint
        loss.backward()
        vae_optimizer.step()
        vae_optimizer.zero_grad()
        self.read(loss, elbo.reconstruction, elbo.kl, constraint)
        if not arrangement.single_chain:
            with torch.no_grad():
                samples = self.vae.decode(torch.randn_like(latents)).sample
            targets = self.chain(samples)
        if arrangement.one_pass:
            loss = self.calibrator.energy_loss(real, targets).loss
        else:
            loss = compute_energy(self.energy, real).mean() - compute_energy(self.energy, targets).mean()
        loss.backward()
        energy_optimizer.step()
        energy_optimizer.zero_grad()
        self.read(loss)


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(iterations: dict[str, Iteration], real: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each arrangement, taking turns."""
    found = {name: [] for name in iterations}
    for index in range(rounds + 1):
        for name, iteration in iterations.items():
            batch = real.contiguous(memory_format=iteration.layout)
            wait(real.device)
            started = time.perf_counter()
            iteration.step(batch)
            wait(real.device)
            if index:  # the first round warms up
                found[name].append(time.perf_counter() - started)
    return found


def peak_memory(arguments: list[str]) -> float:
    """GiB of a process that runs one arrangement alone for three iterations."""
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--langevin_steps", type=int, default=15)
    parser.add_argument("--conditioning_weight", type=float, default=1.0)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64, 128, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=CHANGES, help="lines of the table")
    parser.add_argument("--without", nargs="*", choices=CHANGES, default=[], help="what the last line leaves out")
    parser.add_argument("--memory_of", choices=("published", "all"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    real = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    shape = (args.resolution, args.block_out_channels, args.langevin_steps, args.conditioning_weight, device)
    everything = Arrangement(**{name: name not in args.without for name in CHANGES})

    if args.memory_of is not None:
        iteration = Iteration(everything if args.memory_of == "all" else Arrangement(), *shape)
        for _ in range(3):
            iteration.step(real.contiguous(memory_format=iteration.layout))
        if device.type == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**30)
        else:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return

    iterations = {"published": Iteration(Arrangement(), *shape)}
    for name in args.changes:
        iterations[name] = Iteration(Arrangement(**{name: True}), *shape)
    iterations["all"] = Iteration(everything, *shape)
    seconds = times(iterations, real, args.rounds)
    print(
        f"{args.resolution} px, batch {args.batch_size}, K {args.langevin_steps}, channels {args.block_out_channels}, "
        f"weight {args.conditioning_weight:g}, {args.rounds} rounds; {device}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}, ecvae-diffusers {ecvae_diffusers.__version__}"
    )
    print("| arrangement | ms an iteration (median) | times faster |\n|---|---|---|")
    for name in iterations:
        ratios = [slow / fast for slow, fast in zip(seconds["published"], seconds[name])]
        title = name.replace("_", " ") + (f" but {', '.join(args.without)}" if name == "all" and args.without else "")
        print(f"| {title} | {1e3 * statistics.median(seconds[name]):.0f} | {statistics.median(ratios):.2f} |")
    memory = {which: peak_memory([*sys.argv[1:], "--memory_of", which]) for which in ("published", "all")}
    print(
        f"Peak memory of a process with one alone: published {memory['published']:.2f} GiB, all {memory['all']:.2f} GiB."
    )


if __name__ == "__main__":
    main()
