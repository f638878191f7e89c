#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images per second of `ECVAEPipeline` and of diffusers' pipelines of many passes: `python benchmarks/speed/sampling.py`.

All weights are random: cost is measured, not quality. Ours is an autoencoder of 37 M parameters at 32 px, RGB; the peers are
diffusers' own loops around one UNet, that of the CIFAR-10 DDPM (`google/ddpm-cifar10-32`, 36 M):

- DDPM, 1,000 steps; DDIM, 50; consistency model, 1 and 2 (`DDPMPipeline`, `DDIMPipeline`, `ConsistencyModelPipeline`).
- DPM-Solver++ of second order, 20 steps: diffusers has no pipeline of it without a text, so the scheduler is in
  `DDPMPipeline`.
- Score SDE, variance exploding (the family of NCSN), 2,000 steps, each with a corrector's and a predictor's evaluation:
  `ScoreSdeVePipeline`, which diffusers keeps in `pipelines/deprecated` and still exports.
- Ours with 16 Langevin steps at test time (`num_refinement_steps`): a forward and a backward pass of the energy model each.

Every pipeline returns what is cheapest for it: tensors, except arrays from `ScoreSdeVePipeline`, which has no tensors. A
sampler of more than `--timed_steps` steps runs that many, and its time, evaluations and operations are multiplied up to its
number of steps; the table says which. Operations are those that `torch.utils.flop_counter` sees while one image is made, a
GMAC being 2e9 of its FLOPs. Samplers take turns in one process, the first round warms up, and figures are medians over
rounds; "times slower" is the median of the ratios within a round.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import machine, positive, print_table, seconds_of, speed_parser, write_figures
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
LARGE = {
    "vae": {"sample_size": 32, "block_out_channels": (128, 256, 512, 512), "latent_channels": 128},
    "energy": {"sample_size": 32, "block_out_channels": (128, 256, 256, 256)},
    "unet": UNET,
}
SMALL = {
    "vae": {"sample_size": 16, "block_out_channels": (8, 16), "latent_channels": 8},
    "energy": {"sample_size": 16, "block_out_channels": (8, 16)},
    "unet": UNET | {"sample_size": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}
COLUMNS = [
    "sampler", "batch", "evaluations per image", "GMAC per image", "ms per batch", "ms per image", "images per second",
    f"times slower than {OURS}", "promised by operations", "measured / promised", "time",
]  # fmt: skip


@dataclasses.dataclass
class Sampler:
    """
    A pipeline and how it is called.

    Args:
        pipeline ([`DiffusionPipeline`]): With networks on the device and of the dtype to measure.
        arguments (`dict`): Of its call, beside the batch size.
        share (`int`): Its number of steps over that of a timed call.
        peer (`bool`): Whether it is another method's.
    """

    pipeline: DiffusionPipeline
    arguments: dict
    share: float = 1.0
    peer: bool = True

    def __call__(self, batch_size: int) -> None:
        self.pipeline(batch_size=batch_size, **self.arguments)

    def cost(self) -> tuple[float, float]:
        """Return network evaluations and GMAC per image."""
        pipeline, evaluations = self.pipeline, []
        networks = [pipeline.unet] if self.peer else [pipeline.vae.decoder, pipeline.energy_model]
        hooks = [network.register_forward_hook(lambda *_: evaluations.append(1)) for network in networks]
        # Attention by its definition: the counter does not know its fused kernel for CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            # Its hooks on modules, for counts per module, fail where a gradient to a module's input is asked for.
            counter.mod_tracker.__exit__()
            self(1)
        for hook in hooks:
            hook.remove()
        return len(evaluations) * self.share, counter.get_total_flops() / 2e9 * self.share


def make_samplers(sizes: dict, timed_steps: int, device: torch.device, dtype: torch.dtype) -> dict[str, Sampler]:
    unet = UNet2DModel(**sizes["unet"]).eval()
    if dtype != torch.float32:
        # ScoreSdeVePipeline keeps its images in float32 whatever its network is in.
        unet.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    ours = ECVAEPipeline(
        vae=AutoencoderEC(**sizes["vae"]).eval(),
        energy_model=EnergyModel(**sizes["energy"]).eval(),
        scheduler=LangevinScheduler(),
    )
    peers = {
        "DDPM": (DDPMPipeline, DDPMScheduler(), 1000),
        "DDIM": (DDIMPipeline, DDIMScheduler(), 50),
        "DPM-Solver++": (DDPMPipeline, DPMSolverMultistepScheduler(), 20),
        "score SDE (VE)": (ScoreSdeVePipeline, ScoreSdeVeScheduler(), 2000),
        "consistency model, 1 step": (ConsistencyModelPipeline, CMStochasticIterativeScheduler(), 1),
        "consistency model, 2 steps": (ConsistencyModelPipeline, CMStochasticIterativeScheduler(), 2),
    }
    samplers = {
        OURS: Sampler(ours, {"output_type": "pt"}, peer=False),
        f"{OURS}, {LANGEVIN_STEPS} Langevin steps": Sampler(
            ours, {"output_type": "pt", "num_refinement_steps": LANGEVIN_STEPS}, peer=False
        ),
    }
    for name, (pipeline_class, scheduler, steps) in peers.items():
        timed = min(steps, timed_steps)
        arguments = {
            "output_type": "np" if pipeline_class is ScoreSdeVePipeline else "pt",
            "num_inference_steps": timed,
        }
        name = name if "step" in name else f"{name}, {steps} steps"
        samplers[name] = Sampler(pipeline_class(unet=unet, scheduler=scheduler), arguments, steps / timed)
    for sampler in samplers.values():
        sampler.pipeline.to(device, dtype)
        sampler.pipeline.set_progress_bar_config(disable=True)
    return samplers


def measure(samplers: dict[str, Sampler], batch_size: int, device: torch.device, rounds: int, least: float) -> dict:
    """Return the seconds per batch of each sampler in each round, all of its steps; the mean over `least` seconds of calls."""
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
    samplers: dict[str, Sampler], batch_sizes: list[int], peer_batch_sizes: list[int] | None, device: torch.device,
    rounds: int, least_seconds: float,
) -> Iterator[dict]:  # fmt: skip
    """Yield a row per sampler and batch size. `peer_batch_sizes` are those of the UNet's samplers, by default all."""
    costs = {name: sampler.cost() for name, sampler in samplers.items()}
    for batch_size in batch_sizes:
        with_peers = peer_batch_sizes is None or batch_size in peer_batch_sizes
        present = {name: sampler for name, sampler in samplers.items() if with_peers or not sampler.peer}
        times = measure(present, batch_size, device, rounds, least_seconds)
        for name, sampler in present.items():
            seconds = statistics.median(times[name])
            yield {
                "sampler": name,
                "batch_size": batch_size,
                "evaluations": costs[name][0],
                "gmac": costs[name][1],
                "ms_per_batch": 1e3 * seconds,
                "ms_per_image": 1e3 * seconds / batch_size,
                "images_per_second": batch_size / seconds,
                "times_slower": statistics.median(theirs / ours for theirs, ours in zip(times[name], times[OURS])),
                "promised": costs[name][1] / costs[OURS][1],
                "share": sampler.share,
            }


def cells(row: dict, timed_steps: int) -> list[str]:
    return [
        row["sampler"], str(row["batch_size"]), f"{row['evaluations']:g}", f"{row['gmac']:.5g}",
        f"{row['ms_per_batch']:.5g}", f"{row['ms_per_image']:.4g}", f"{row['images_per_second']:.4g}",
        f"{row['times_slower']:.4g}", f"{row['promised']:.4g}", f"{row['times_slower'] / row['promised']:.2f}",
        "measured" if row["share"] == 1 else f"{timed_steps} steps x {row['share']:g}",
    ]  # fmt: skip


def main() -> None:
    parser = speed_parser(__doc__, rounds=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights")
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument(
        "--peer_batch_sizes", type=positive, nargs="*", help="those of them for the UNet's; default: all"
    )
    parser.add_argument("--timed_steps", type=positive, default=20)
    parser.add_argument("--least_seconds", type=float, default=0.2, help="of calls of a sampler, in each round")
    parser.add_argument("--small", action="store_true", help="tiny networks, to try the script")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = SMALL if args.small else LARGE
    samplers = make_samplers(sizes, args.timed_steps, args.device, getattr(torch, args.dtype))
    networks = {}
    for sampler in samplers.values():
        networks |= {n: part for n, part in sampler.pipeline.components.items() if hasattr(part, "num_parameters")}
    counts = ", ".join(f"{name} {part.num_parameters() / 1e6:.2f} M" for name, part in networks.items())
    print(f"Parameters: {counts}; {args.dtype}, {args.rounds} rounds; {machine(args.device)}")
    rows = []

    def measured() -> Iterator[list[str]]:
        sizes = (args.batch_sizes, args.peer_batch_sizes)
        for row in compare(samplers, *sizes, args.device, args.rounds, args.least_seconds):
            rows.append(row)
            yield cells(row, args.timed_steps)

    print_table(COLUMNS, measured())
    for row in rows:
        if row["batch_size"] == rows[-1]["batch_size"]:
            what = f"{row['ms_per_image']:.4g} ms per image, {row['times_slower']:.4g} times ours"
            write_figures(args, {f"{row['sampler']}, batch {row['batch_size']}": what})


if __name__ == "__main__":
    main()
