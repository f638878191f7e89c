#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One training iteration in the published arrangement against ours: `python benchmarks/speed/training_step.py`.

The published arrangement, written here from the paper's equations, has two chains per iteration, one for the decoder and one
for the energy model; the energy model in training mode, so that spectral normalization takes a power iteration at each
forward pass, and with parameter gradients recorded; the pull towards the start as a term of the energy, differentiated with
it; data and samples through the energy model one after the other; convolution and pooling one after the other; float32 in
contiguous layout; every loss read back at every step. Each line of the table makes ONE of our changes to it. The last two
make all changes of the training script, one of them without bf16; on a GPU one more compiles them. Networks, batch and K are
the same, the arrangements take turns in one process, and the figure is the median over rounds of the ratio of their times.
"""

import contextlib
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import add_networks, machine, print_table, seconds_of, speed_parser, write_figures
from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.models import energy_model
from ecvae_diffusers.variational import elbo_loss


NOISE, DRIFT_STEP, LATENTS, LEARNING_RATE = 1e-3, 0.2, 128, 1e-5


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The changes of ours that are made to the published arrangement."""

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
OURS = Arrangement(**{name: name != "compiled" for name in CHANGES})
WHOLE = {"published": Arrangement(), "ours in fp32": dataclasses.replace(OURS, bf16=False), "ours": OURS}


@contextlib.contextmanager
def separate_pooling() -> Iterator[None]:
    """Make convolution and pooling two operations."""

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
    """

    def __init__(self, arrangement: Arrangement, sizes: dict, num_steps: int, weight: float, device: torch.device):
        self.arrangement, self.device = arrangement, device
        self.vae = AutoencoderEC(**sizes, latent_channels=LATENTS).to(device)
        self.energy = EnergyModel(**sizes).to(device)
        self.layout = torch.channels_last if arrangement.channels_last else torch.contiguous_format
        for network in (self.vae, self.energy):
            network.to(memory_format=self.layout)
        if arrangement.compiled:
            self.vae.compile()
            self.energy.compile(mode="reduce-overhead" if device.type == "cuda" else None)
        fused = {"fused": True} if arrangement.fused_optimizer else {}
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.9), weight_decay=0.0, **fused)
            for network in (self.vae, self.energy)
        ]
        scheduler = LangevinScheduler(
            num_steps=num_steps, drift_step_size=DRIFT_STEP, noise_scale=NOISE, conditioning_weight=weight
        )
        self.calibrator = EnergyCalibrator(self.energy, scheduler)

    def chain(self, samples: torch.Tensor) -> torch.Tensor:
        """Run the chain with what is left in it of the published arrangement."""
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
        """Run one iteration on images in [-1, 1]."""
        pooling = contextlib.nullcontext() if self.arrangement.fused_pooling else separate_pooling()
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.arrangement.bf16)
        with pooling, autocast:
            self.train_both(real.contiguous(memory_format=self.layout))

    def train_both(self, real: torch.Tensor) -> None:
        arrangement, (vae_optimizer, energy_optimizer) = self.arrangement, self.optimizers
        latents = torch.randn(len(real), LATENTS, 1, 1, device=self.device)
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


def times(iterations: dict[str, Iteration], real: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each arrangement, taking turns. Two rounds warm up, and compile."""
    found = {name: [] for name in iterations}
    for index in range(rounds + 2):
        for name, iteration in iterations.items():
            seconds = seconds_of(lambda: iteration.step(real), real.device)
            if index >= 2:
                found[name].append(seconds)
    return found


def main() -> None:
    parser = speed_parser(__doc__, rounds=7)
    add_networks(parser)
    parser.add_argument("--conditioning_weight", type=float, default=1.0)
    parser.add_argument(
        "--changes", nargs="*", choices=CHANGES, help="lines of the table; by default those that we make"
    )
    args = parser.parse_args()
    if not 0 <= args.conditioning_weight <= 1 / DRIFT_STEP:
        parser.error(f"--conditioning_weight must be from 0 to {1 / DRIFT_STEP:g}, but is {args.conditioning_weight}.")
    if len(args.block_out_channels) > (most := int(math.log2(args.resolution)) - 1):
        parser.error(
            f"--block_out_channels must be at most {most} at --resolution {args.resolution}, but are {args.block_out_channels}."
        )
    torch.manual_seed(0)
    real = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device) * 2 - 1
    sizes = {"sample_size": args.resolution, "in_channels": 3, "block_out_channels": tuple(args.block_out_channels)}
    changes = [name for name in CHANGES if name != "compiled"] if args.changes is None else args.changes
    arrangements = {"published": WHOLE["published"]}
    arrangements |= {name.replace("_", " "): Arrangement(**{name: True}) for name in changes} | WHOLE
    if "compiled" in changes:
        arrangements["ours, compiled"] = dataclasses.replace(OURS, compiled=True)
    shape = (sizes, args.langevin_steps, args.conditioning_weight, args.device)
    iterations = {name: Iteration(made, *shape) for name, made in arrangements.items()}
    print(
        f"{args.resolution} px, batch {args.batch_size}, K {args.langevin_steps}, channels {args.block_out_channels}, "
        f"weight {args.conditioning_weight:g}, {args.rounds} rounds; {machine(args.device)}"
    )
    seconds = times(iterations, real, args.rounds)
    medians = {name: f"{1e3 * statistics.median(found):.4g}" for name, found in seconds.items()}
    faster = {
        name: f"{statistics.median(slow / fast for slow, fast in zip(seconds['published'], found)):.2f}"
        for name, found in seconds.items()
    }
    rows = [[name, medians[name], faster[name]] for name in seconds]
    print_table(["arrangement", "ms per iteration (median)", "times faster"], rows)
    for name in (*WHOLE, *(["ours, compiled"] if "compiled" in changes else [])):
        write_figures(args, {f"iteration, {name}": f"{medians[name]} ms, {faster[name]} times faster than published"})


if __name__ == "__main__":
    main()
