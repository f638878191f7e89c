#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compare a training iteration with the published arrangement: `python benchmarks/speed/training_step.py`.

The published arrangement is written here from the paper's equations:

- Two chains per iteration: one for the decoder and one for the energy model.
- The chain runs the energy model in training mode, with a power iteration of spectral normalization at each forward pass, and
  records parameter gradients.
- The pull towards the start of the chain is a term of the energy, and is differentiated with it.
- Data and samples pass through the energy model one after the other.
- Convolution and pooling are separate. Everything is float32 in contiguous layout. Every loss is read back at every step.

Each line of the table makes one change to it. The last lines make all changes of the training script:

- in float32,
- in bf16, with normalizations in channels_last,
- in bf16, which is what the script does,
- in bf16 and compiled, if `--changes` names that.

Networks, batch and K are the same. The arrangements take turns in one process, and a figure
is the median over rounds of the ratio of their times.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import device, machine, seconds_of
from common.results import table
from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.models import energy_model
from ecvae_diffusers.training.tasks.networks import use_contiguous_norms
from ecvae_diffusers.variational import elbo_loss


NOISE, DRIFT_STEP, LATENTS, LEARNING_RATE = 1e-3, 0.2, 128, 1e-5


CHANGES = (
    "single_chain", "frozen_energy", "closed_form", "one_pass", "fused_pooling", "channels_last", "bf16", "no_wait",
    "fused_optimizer", "compiled",
)  # fmt: skip
# Only channels_last and bf16 together make normalizations slow, so they have no line alone.
NORMS = "contiguous_norms"
# On CPUs, the code of Inductor is slower than that of oneDNN. On a GPU, compiling also makes CUDA graphs of the chain's steps.
OURS = set(CHANGES) - {"compiled"} | {NORMS}


@contextlib.contextmanager
def separate_pooling() -> Iterator[None]:
    """Run convolution and pooling as two operations."""

    def forward(conv: nn.Conv2d, sample: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(nn.Conv2d.forward(conv, sample), 2)

    with mock.patch.object(energy_model.PooledConv2d, "forward", forward):
        yield


class Iteration:
    """Networks, optimizers and a training step with K = `num_steps` and `changes` to the published arrangement."""

    def __init__(self, changes: set[str], sizes: dict, num_steps: int, device: torch.device, weight: float = 1.0):
        self.changes, self.device = changes, device
        self.vae = AutoencoderEC(**sizes, latent_channels=LATENTS).to(device)
        self.energy = EnergyModel(**sizes).to(device)
        self.layout = torch.channels_last if "channels_last" in changes else torch.contiguous_format
        for network in (self.vae, self.energy):
            network.to(memory_format=self.layout)
        if NORMS in changes and "bf16" in changes and device.type == "cpu":
            use_contiguous_norms(self.vae)
        if "compiled" in changes:
            self.vae.compile()
            self.energy.compile(mode="reduce-overhead" if device.type == "cuda" else None)
        fused = {"fused": True} if "fused_optimizer" in changes else {}
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.9), weight_decay=0.0, **fused)
            for network in (self.vae, self.energy)
        ]
        scheduler = LangevinScheduler(
            num_steps=num_steps, drift_step_size=DRIFT_STEP, noise_scale=NOISE, conditioning_weight=weight
        )
        self.calibrator = EnergyCalibrator(self.energy, scheduler)

    def chain(self, samples: torch.Tensor) -> torch.Tensor:
        """Run the chain as published, except for `changes`."""
        closed_form, drift_step = "closed_form" in self.changes, self.calibrator.drift_step_size
        if closed_form and "frozen_energy" in self.changes:
            return self.calibrator.run_chain(samples)
        sample = start = samples.detach().float()
        with frozen(self.energy) if "frozen_energy" in self.changes else contextlib.nullcontext():
            for k in range(len(self.calibrator.scheduler)):
                sample = sample.detach().requires_grad_()
                energy = compute_energy(self.energy, sample).sum()
                pull = self.calibrator.scheduler.conditioning_coefficient(k)
                if not closed_form:
                    energy = energy + pull / drift_step * (sample - start).square().sum() / 2
                (gradient,) = torch.autograd.grad(energy, sample)
                with torch.no_grad():
                    moved = sample - drift_step * gradient + NOISE * torch.randn_like(sample)
                    sample = moved - pull * (sample - start) if closed_form else moved
        return sample.detach()

    def read(self, *losses: torch.Tensor) -> None:
        if "no_wait" not in self.changes:
            for loss in losses:
                loss.item()

    def step(self, real: torch.Tensor) -> None:
        """Run one iteration on images (B, C, H, W) in [-1, 1]."""
        pooling = contextlib.nullcontext() if "fused_pooling" in self.changes else separate_pooling()
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled="bf16" in self.changes)
        with pooling, autocast:
            self.train_both(real.contiguous(memory_format=self.layout))

    def train_both(self, real: torch.Tensor) -> None:
        vae_optimizer, energy_optimizer = self.optimizers
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
        if "single_chain" not in self.changes:
            with torch.no_grad():
                samples = self.vae.decode(torch.randn_like(latents)).sample
            targets = self.chain(samples)
        if "one_pass" in self.changes:
            loss = self.calibrator.energy_loss(real, targets).loss
        else:
            energies = compute_energy(self.energy, real), compute_energy(self.energy, targets)
            loss = self.calibrator.contrast(*energies).loss
        loss.backward()
        energy_optimizer.step()
        energy_optimizer.zero_grad()
        self.read(loss)


def times(iterations: dict[str, Iteration], real: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each arrangement in each round. Arrangements take turns; two more rounds warm up and compile."""
    found = {name: [] for name in iterations}
    for index in range(rounds + 2):
        for name, iteration in iterations.items():
            seconds = seconds_of(lambda: iteration.step(real), real.device)
            if index >= 2:
                found[name].append(seconds)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--langevin_steps", type=int, default=15)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64, 128, 128])
    parser.add_argument(
        "--changes", nargs="*", choices=CHANGES, help="lines of the table; default: the changes of the training script"
    )
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    real = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device) * 2 - 1
    sizes = {"sample_size": args.resolution, "in_channels": 3, "block_out_channels": tuple(args.block_out_channels)}
    changes = [name for name in CHANGES if name in OURS] if args.changes is None else args.changes
    arrangements = {"published": set()} | {name.replace("_", " "): {name} for name in changes}
    arrangements |= {"ours in fp32": OURS - {"bf16"}, "ours, norms in channels_last": OURS - {NORMS}, "ours": OURS}
    if "compiled" in changes:
        arrangements["ours, compiled"] = OURS | {"compiled"}
    iterations = {
        name: Iteration(made, sizes, args.langevin_steps, args.device) for name, made in arrangements.items()
    }
    print(
        f"{args.resolution} px, batch {args.batch_size}, K {args.langevin_steps}, channels {args.block_out_channels}, "
        f"{args.rounds} rounds; {machine(args.device)}"
    )
    seconds = times(iterations, real, args.rounds)
    rows = []
    for name, found in seconds.items():
        faster = statistics.median(slow / fast for slow, fast in zip(seconds["published"], found))
        rows.append([name, f"{1e3 * statistics.median(found):.4g}", f"{faster:.2f}"])
    print(table(["arrangement", "ms per iteration (median)", "times faster"], rows))


if __name__ == "__main__":
    main()
