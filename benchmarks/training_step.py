#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One training iteration in the published arrangement against ours: `python benchmarks/training_step.py`.

The published arrangement (written here from the paper's equations): two chains an iteration, one for the decoder and one
for the energy model; the energy in training mode, so that spectral normalization takes a power iteration at each of its
forwards, and with parameter gradients recorded; the pull towards the start as a term of the energy, differentiated with
it; data and samples through the energy model one after the other; convolution and pooling one after the other; float32
in contiguous layout; every loss read back at every step. Each line of the table makes ONE of our changes to it; the last
ones make all that the training script makes; on a GPU one more compiles them. Same networks, batch and K; the arrangements take turns in one process, and the figure is the median over
rounds of the ratio of their times.
"""

import argparse
import contextlib
import dataclasses
import gc
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from command_line import add_figures, positive, resolution, write_figures
from command_line import device as device_here

import ecvae_diffusers
from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.models import energy_model
from ecvae_diffusers.variational import elbo_loss


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from ecvae_diffusers.training.run.log import peak_memory  # noqa: E402


NOISE = 1e-3
DRIFT_STEP = 0.2
LATENTS = 128


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Which of our changes are made to the published arrangement."""

    single_chain: bool = False
    frozen_energy: bool = False
    closed_form: bool = False
    one_pass: bool = False
    fused_pooling: bool = False
    channels_last: bool = False
    bf16: bool = False
    no_wait: bool = False
    fused_optimizer: bool = False
    compiled: bool = False


CHANGES = [field.name for field in dataclasses.fields(Arrangement)]
# Inductor's code was slower than oneDNN's on the CPUs measured; on a GPU it also makes CUDA graphs of the chain's steps.
GPU_CHANGES = ["compiled"]


@contextlib.contextmanager
def separate_pooling() -> Iterator[None]:
    """Convolution and pooling as the two operations that they are."""

    def forward(conv: nn.Conv2d, sample: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(nn.Conv2d.forward(conv, sample), 2)

    with mock.patch.object(energy_model.PooledConv2d, "forward", forward):
        yield


class Iteration:
    """
    Networks, optimizers and one training step in an arrangement.

    Args:
        arrangement ([`Arrangement`]): Which of our changes are made.
        sizes (`dict`): `sample_size`, `in_channels` and `block_out_channels` of both networks.
        num_steps (`int`): K.
        weight (`float`): The chain's conditioning weight.
        device (`torch.device`): Where.
        latent_channels (`int`): Of the autoencoder.
        learning_rate (`float`): Of both networks.
        adapts_drift (`bool`): Whether the chain's drift step is adapted, as the training script does by default.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        sizes: dict,
        num_steps: int,
        weight: float,
        device: torch.device,
        latent_channels: int = LATENTS,
        learning_rate: float = 1e-5,
        adapts_drift: bool = False,
    ):
        self.adapts_drift = adapts_drift
        self.arrangement, self.device, self.latent_channels = arrangement, device, latent_channels
        self.vae = AutoencoderEC(**sizes, latent_channels=latent_channels).to(device)
        self.energy = EnergyModel(**sizes).to(device)
        self.layout = torch.channels_last if arrangement.channels_last else torch.contiguous_format
        for network in (self.vae, self.energy):
            network.to(memory_format=self.layout)
        if arrangement.compiled:
            self.vae.compile()
            self.energy.compile(mode="reduce-overhead" if device.type == "cuda" else None)
        fused = {"fused": True} if arrangement.fused_optimizer else {}
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.0, 0.9), weight_decay=0.0, **fused)
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
        with frozen(self.energy) if self.arrangement.frozen_energy else contextlib.nullcontext():
            return self.chain_by_autograd(samples)

    def chain_by_autograd(self, samples: torch.Tensor) -> torch.Tensor:
        scheduler, start = self.calibrator.scheduler, samples.detach().float()
        sample, closed_form = start, self.arrangement.closed_form
        drift_step = self.calibrator.drift_step_size
        for k in range(len(scheduler)):
            sample = sample.detach().requires_grad_()
            energy = compute_energy(self.energy, sample).sum()
            pull = scheduler.conditioning_coefficient(k)
            if not closed_form:
                energy = energy + pull / drift_step * (sample - start).square().sum() / 2
            (gradient,) = torch.autograd.grad(energy, sample)
            with torch.no_grad():
                moved = sample - drift_step * gradient + NOISE * torch.randn_like(sample)
                sample = moved - pull * (sample - start) if closed_form else moved
        return sample.detach()

    def read(self, *losses: torch.Tensor) -> None:
        if not self.arrangement.no_wait:
            for loss in losses:
                loss.item()

    def step(self, real: torch.Tensor) -> None:
        """One iteration on images in [-1, 1]."""
        pooling = contextlib.nullcontext() if self.arrangement.fused_pooling else separate_pooling()
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.arrangement.bf16)
        with pooling, autocast:
            self.train_both(real.contiguous(memory_format=self.layout))

    def train_both(self, real: torch.Tensor) -> None:
        arrangement, (vae_optimizer, energy_optimizer) = self.arrangement, self.optimizers
        latents = torch.randn(len(real), self.latent_channels, 1, 1, device=self.device)
        output = self.vae(real, sample_posterior=True, prior_latents=latents)
        samples = output.prior_sample
        self.calibrator.num_entries = samples[0].numel()
        targets = self.chain(samples)
        constraint = (samples.float() - targets).square().flatten(1).sum(1).mean()
        elbo = elbo_loss(real, output.sample, output.latent_dist)
        self.calibrator.dual = self.calibrator.dual.to(self.device)
        loss = elbo.loss + self.calibrator.dual * constraint
        loss.backward()
        vae_optimizer.step()
        vae_optimizer.zero_grad()
        self.calibrator.dual_step(constraint.detach())
        if self.adapts_drift:
            self.calibrator.adapt_drift_step(constraint.detach())
        self.read(loss, elbo.reconstruction, elbo.kl, constraint)
        if not arrangement.single_chain:
            with torch.no_grad():
                samples = self.vae.decode(torch.randn_like(latents)).sample
            targets = self.chain(samples)
        if arrangement.one_pass:
            loss = self.calibrator.energy_loss(real, targets).loss
        else:
            energies = compute_energy(self.energy, real), compute_energy(self.energy, targets)
            loss = self.calibrator.contrast(*energies).loss
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
    for index in range(rounds + 2):
        for name, iteration in iterations.items():
            wait(real.device)
            started = time.perf_counter()
            iteration.step(real)
            wait(real.device)
            if index >= 2:  # the first rounds warm up
                found[name].append(time.perf_counter() - started)
    return found


def memory_alone(arguments: list[str]) -> float:
    """GiB of a process that runs one arrangement alone for three iterations."""
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--resolution", type=resolution, default=32)
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--langevin_steps", type=positive, default=15)
    parser.add_argument("--conditioning_weight", type=float, default=1.0)
    parser.add_argument("--block_out_channels", type=positive, nargs="+", default=[32, 64, 128, 128])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument(
        "--changes", nargs="*", choices=CHANGES, help="lines of the table; on a CPU all but `compiled` if not given"
    )
    parser.add_argument("--memory_of", choices=("published", "ours", "ours in fp32"), help=argparse.SUPPRESS)
    add_figures(parser)
    args = parser.parse_args()
    if not 0 <= args.conditioning_weight <= 1 / DRIFT_STEP:
        parser.error(f"--conditioning_weight must be from 0 to {1 / DRIFT_STEP:g}, but is {args.conditioning_weight}.")
    if len(args.block_out_channels) > math.log2(args.resolution) - 1:
        parser.error(
            f"--block_out_channels must be at most {int(math.log2(args.resolution)) - 1} at --resolution {args.resolution}, "
            f"but are {len(args.block_out_channels)}."
        )
    device = args.device
    torch.manual_seed(0)
    real = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    sizes = {
        "sample_size": args.resolution,
        "in_channels": 3,
        "block_out_channels": tuple(args.block_out_channels),
    }
    shape = (sizes, args.langevin_steps, args.conditioning_weight, device)
    changes = args.changes
    if changes is None:
        changes = [name for name in CHANGES if device.type == "cuda" or name not in GPU_CHANGES]
    ours = Arrangement(**{name: name not in GPU_CHANGES for name in CHANGES})
    whole = {"published": Arrangement(), "ours in fp32": dataclasses.replace(ours, bf16=False), "ours": ours}

    def peak(which: str) -> float:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats(device)
        iteration = Iteration(whole[which], *shape)
        for _ in range(3):
            iteration.step(real)
        return peak_memory(device)

    if args.memory_of is not None:
        print(peak(args.memory_of))
        return

    arrangements = {"published": whole["published"]}
    arrangements |= {name.replace("_", " "): Arrangement(**{name: True}) for name in changes}
    arrangements |= whole
    if device.type == "cuda" and "compiled" in changes:
        arrangements["ours, compiled"] = dataclasses.replace(ours, compiled=True)
    iterations, refused = {}, {}
    for name, made in arrangements.items():
        iteration = Iteration(made, *shape)
        try:
            for _ in range(2):  # compiles, where it is compiled
                iteration.step(real)
            iterations[name] = iteration
        except RuntimeError as error:
            if not made.compiled:
                raise
            refused[name] = str(error).strip().splitlines()[0]
    seconds = times(iterations, real, args.rounds)
    print(
        f"{args.resolution} px, batch {args.batch_size}, K {args.langevin_steps}, channels {args.block_out_channels}, "
        f"weight {args.conditioning_weight:g}, {args.rounds} rounds; {device}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}, ecvae-diffusers {ecvae_diffusers.__version__}"
    )
    print("| arrangement | ms an iteration (median) | times faster |\n|---|---|---|")
    faster = {}
    for name in arrangements:
        if name in refused:
            print(f"| {name} | does not run: {refused[name]} | |")
            continue
        faster[name] = statistics.median(slow / fast for slow, fast in zip(seconds["published"], seconds[name]))
        print(f"| {name} | {1e3 * statistics.median(seconds[name]):.4g} | {faster[name]:.2f} |")
    if device.type == "cuda":
        iterations.clear()
        memory = {which: peak(which) for which in whole}
    else:
        # The peak is that of a process.
        memory = {which: memory_alone([*sys.argv[1:], "--memory_of", which]) for which in whole}
    print(
        "Peak memory of a process with one alone: "
        + ", ".join(f"{which} {gib:.2f} GiB" for which, gib in memory.items())
        + "."
    )
    shown = [name for name in (*whole, "ours, compiled") if name in seconds]
    figures = {f"training iteration, {name}": f"{1e3 * statistics.median(seconds[name]):.4g} ms" for name in shown}
    figures |= {
        f"training iteration, {name}, over published": f"{faster[name]:.2f} times faster" for name in shown[1:]
    }
    write_figures(args, figures | {f"peak memory, {name}": f"{gib:.2f} GiB" for name, gib in memory.items()})


if __name__ == "__main__":
    main()
