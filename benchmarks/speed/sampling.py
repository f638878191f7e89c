#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compare the speed of `ECVAEPipeline` with that of diffusers' pipelines: `python benchmarks/speed/sampling.py`.

All weights are random, since only cost is measured. `ECVAEPipeline` has an autoencoder of 37 M parameters for RGB images of
32 px. The other pipelines are those of diffusers, around the UNet of the CIFAR-10 DDPM (`google/ddpm-cifar10-32`, 36 M).
Second-order DPM-Solver++ runs as a scheduler of `DDPMPipeline`, since diffusers has no unconditional pipeline for it. Each step
of the score SDE has two evaluations, of a corrector and a predictor. Each Langevin step of `ECVAEPipeline` has a forward and a
backward pass of the energy model.

Of a sampler with more than `--timed_steps` steps, only that many are run. Its time, evaluations and operations are multiplied by
the factor in the last column. Operations are counted by `torch.utils.flop_counter` for one image; a GMAC is 2e9 of its FLOPs.
Samplers take turns in one process, and the first round warms up. Figures are medians over rounds; "times slower" is the median
of the ratios within a round.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import device, machine, seconds_of
from common.results import table
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler


OURS = "ECVAEPipeline"
LANGEVIN_STEPS = 16
# The config.json of google/ddpm-cifar10-32.
UNET = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
SIZES = {
    "vae": {"sample_size": 32, "block_out_channels": (128, 256, 512, 512), "latent_channels": 128},
    "energy": {"sample_size": 32, "block_out_channels": (128, 256, 256, 256)},
    "unet": UNET,
}


@dataclasses.dataclass
class Sampler:
    """
    A pipeline and the arguments of its call.

    Args:
        pipeline ([`DiffusionPipeline`]): The pipeline, on the device to measure.
        arguments (`dict`): The arguments of a call, except the batch size.
        share (`float`): The sampler's number of steps, divided by that of a timed call.
    """

    pipeline: diffusers.DiffusionPipeline
    arguments: dict
    share: float = 1.0

    @property
    def is_peer(self) -> bool:
        return not isinstance(self.pipeline, ECVAEPipeline)

    def __call__(self, batch_size: int) -> None:
        self.pipeline(batch_size=batch_size, **self.arguments)

    def cost(self) -> tuple[float, float]:
        """Return network evaluations and GMAC per image."""
        pipeline, evaluations = self.pipeline, []
        networks = [pipeline.unet] if self.is_peer else [pipeline.vae.decoder, pipeline.energy_model]
        hooks = [network.register_forward_hook(lambda *_: evaluations.append(1)) for network in networks]
        # Attention runs unfused, since the counter does not know the fused kernel for CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            # The counter's hooks on modules, for counts per module, fail if a module's input needs a gradient.
            counter.mod_tracker.__exit__()
            self(1)
        for hook in hooks:
            hook.remove()
        return len(evaluations) * self.share, counter.get_total_flops() / 2e9 * self.share


def make_samplers(sizes: dict, timed_steps: int, device: torch.device) -> dict[str, Sampler]:
    unet = diffusers.UNet2DModel(**sizes["unet"]).eval()
    ours = ECVAEPipeline(
        vae=AutoencoderEC(**sizes["vae"]).eval(),
        energy_model=EnergyModel(**sizes["energy"]).eval(),
        scheduler=LangevinScheduler(),
    )
    arguments = {"output_type": "pt"}
    samplers = {
        OURS: Sampler(ours, arguments),
        f"{OURS}, {LANGEVIN_STEPS} Langevin steps": Sampler(
            ours, arguments | {"num_refinement_steps": LANGEVIN_STEPS}
        ),
    }
    for name, pipeline_class, scheduler, steps in (
        ("DDPM, 1000 steps", diffusers.DDPMPipeline, diffusers.DDPMScheduler(), 1000),
        ("DDIM, 50 steps", diffusers.DDIMPipeline, diffusers.DDIMScheduler(), 50),
        ("DPM-Solver++, 20 steps", diffusers.DDPMPipeline, diffusers.DPMSolverMultistepScheduler(), 20),
        ("score SDE (VE), 2000 steps", diffusers.ScoreSdeVePipeline, diffusers.ScoreSdeVeScheduler(), 2000),
        (
            "consistency model, 1 step",
            diffusers.ConsistencyModelPipeline,
            diffusers.CMStochasticIterativeScheduler(),
            1,
        ),
        (
            "consistency model, 2 steps",
            diffusers.ConsistencyModelPipeline,
            diffusers.CMStochasticIterativeScheduler(),
            2,
        ),
    ):
        timed = min(steps, timed_steps)
        own = {"output_type": "np"} if pipeline_class is diffusers.ScoreSdeVePipeline else arguments
        pipeline = pipeline_class(unet=unet, scheduler=scheduler)
        samplers[name] = Sampler(pipeline, own | {"num_inference_steps": timed}, steps / timed)
    for sampler in samplers.values():
        sampler.pipeline.to(device)
        sampler.pipeline.set_progress_bar_config(disable=True)
    return samplers


def measure(samplers: dict[str, Sampler], batch_size: int, device: torch.device, rounds: int, least: float) -> dict:
    """Return the seconds per batch, for all steps, of each sampler in each round: means over at least `least` seconds of calls."""
    found = {name: [] for name in samplers}
    for index in range(rounds + 1):
        for name, sampler in samplers.items():
            calls = [seconds_of(lambda: sampler(batch_size), device)]
            while sum(calls) < least:
                calls.append(seconds_of(lambda: sampler(batch_size), device))
            if index > 0:  # the first round warms up
                found[name].append(statistics.mean(calls) * sampler.share)
    return found


def compare(
    samplers: dict[str, Sampler], batch_sizes: list[int], peer_batch_sizes: list[int], device: torch.device, rounds: int,
    least_seconds: float = 0.2,
) -> Iterator[dict]:  # fmt: skip
    """Yield a row per sampler and batch size. Samplers with the UNet run at `peer_batch_sizes` only."""
    costs = {name: sampler.cost() for name, sampler in samplers.items()}
    for batch_size in batch_sizes:
        with_peers = batch_size in peer_batch_sizes
        present = {name: sampler for name, sampler in samplers.items() if with_peers or not sampler.is_peer}
        times = measure(present, batch_size, device, rounds, least_seconds)
        for name, sampler in present.items():
            seconds = statistics.median(times[name])
            slower = statistics.median(theirs / ours for theirs, ours in zip(times[name], times[OURS]))
            promised = costs[name][1] / costs[OURS][1]
            yield {
                "sampler": name,
                "batch": batch_size,
                "evaluations per image": costs[name][0],
                "GMAC per image": costs[name][1],
                "ms per batch": 1e3 * seconds,
                "ms per image": 1e3 * seconds / batch_size,
                "images per second": batch_size / seconds,
                f"times slower than {OURS}": slower,
                "promised by operations": promised,
                "measured / promised": slower / promised,
                "timed steps x": sampler.share,
            }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument(
        "--peer_batch_sizes", type=int, nargs="*", help="batch sizes for samplers with the UNet; default: all"
    )
    parser.add_argument("--timed_steps", type=int, default=20)
    args = parser.parse_args(argv)
    peer_batch_sizes = args.batch_sizes if args.peer_batch_sizes is None else args.peer_batch_sizes
    torch.manual_seed(0)
    samplers = make_samplers(SIZES, args.timed_steps, args.device)
    networks = [
        samplers[OURS].pipeline.vae,
        samplers[OURS].pipeline.energy_model,
        samplers["DDIM, 50 steps"].pipeline.unet,
    ]
    counts = ", ".join(f"{type(one).__name__} {one.num_parameters() / 1e6:.2f} M" for one in networks)
    print(f"Parameters: {counts}; {args.rounds} rounds; {machine(args.device)}")
    for index, row in enumerate(compare(samplers, args.batch_sizes, peer_batch_sizes, args.device, args.rounds)):
        lines = table(list(row), [[cell if isinstance(cell, str) else f"{cell:.5g}" for cell in row.values()]])
        print(lines if index == 0 else lines.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
