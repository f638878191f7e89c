#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images a second of `ECVAEPipeline` and of diffusers' pipelines of many passes: `python benchmarks/sampling.py`.

All weights are random: what is measured is cost, not quality. Ours is an autoencoder of 37 M parameters at 32 px, RGB; the
peers are diffusers' own loops around one UNet, that of the CIFAR-10 DDPM (`google/ddpm-cifar10-32`, 36 M):

- DDPM, 1,000 steps; DDIM, 50; consistency model, 1 and 2 (`DDPMPipeline`, `DDIMPipeline`, `ConsistencyModelPipeline`).
- DPM-Solver++ of second order, 20 steps: diffusers has no pipeline of it without a text, so it is the scheduler in
  `DDPMPipeline`.
- Score SDE, variance exploding (the family of NCSN), 2,000 steps, each with a corrector's and a predictor's evaluation:
  `ScoreSdeVePipeline`, which diffusers keeps in `pipelines/deprecated` and still exports.
- Ours with 16 Langevin steps at test time (`num_refinement_steps`): a forward and a backward pass of the energy model each.

Every pipeline gives what is cheapest for it: tensors (`output_type="pt"`), but arrays from `ScoreSdeVePipeline`, which can't.
A sampler of more than `--timed_steps` steps runs so many of its steps, and its time (what it does once a call included),
evaluations and operations are multiplied up to its number of steps; the table says which. Operations are those that `torch.utils.flop_counter` sees while
one image is made, a GMAC being 2e9 of its FLOPs. Samplers take turns in one process, the first round warms up, and figures
are medians over rounds; "times slower" is the median of the ratios within a round.

`--overhead` measures instead what the pipeline costs beyond its decoder: `ECVAEPipeline` and the bare `vae.decode`, called
alternately, ratio pair by pair.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from command_line import add_figures, place, positive, write_figures
from command_line import device as device_here
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

import ecvae_diffusers
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler


OURS = "ECVAEPipeline"
LANGEVIN_STEPS = 16
VAE = {"sample_size": 32, "block_out_channels": (128, 256, 512, 512), "latent_channels": 128}
ENERGY = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256)}
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
SMALL = {
    "vae": {"sample_size": 16, "block_out_channels": (8, 16), "latent_channels": 8},
    "energy": {"sample_size": 16, "block_out_channels": (8, 16)},
    "unet": UNET | {"sample_size": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}


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
        """Network evaluations and GMAC of one image."""
        pipeline, evaluations = self.pipeline, []
        networks = [pipeline.unet] if self.peer else [pipeline.vae.decoder, pipeline.energy_model]
        hooks = [network.register_forward_hook(lambda *_: evaluations.append(1)) for network in networks]
        # Attention by its definition: the counter does not know its fused kernel for CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            # Its hooks on modules, for counts a module, fail where a gradient to a module's input is asked for.
            counter.mod_tracker.__exit__()
            self(1)
        for hook in hooks:
            hook.remove()
        return len(evaluations) * self.share, counter.get_total_flops() / 2e9 * self.share


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], None], device: torch.device, at_least: float = 0.0) -> float:
    """Mean time of as many calls as fill `at_least` seconds."""
    wait(device)
    started, calls, elapsed = time.perf_counter(), 0, -1.0
    while elapsed < at_least:
        call()
        wait(device)
        calls, elapsed = calls + 1, time.perf_counter() - started
    return elapsed / calls


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


def measure(samplers: dict[str, Sampler], batch_size: int, device: torch.device, rounds: int, at_least: float) -> dict:
    """Seconds a batch of each sampler in each round, all of their steps."""
    found = {name: [] for name in samplers}
    for index in range(rounds + 1):
        for name, sampler in samplers.items():
            seconds = seconds_of(lambda: sampler(batch_size), device, at_least) * sampler.share
            if index > 0:  # the first round warms up
                found[name].append(seconds)
    return found


def compare(samplers: dict[str, Sampler], args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Print the table of samplers; its rows."""
    rows, costs = [], {name: sampler.cost() for name, sampler in samplers.items()}
    print(
        "| sampler | batch | evaluations an image | GMAC an image | ms a batch | ms an image | images a second "
        f"| times slower than {OURS} | promised by operations | measured / promised | time |\n" + "|---" * 11 + "|"
    )
    for batch_size in args.batch_sizes:
        with_peers = args.peer_batch_sizes is None or batch_size in args.peer_batch_sizes
        present = {name: sampler for name, sampler in samplers.items() if with_peers or not sampler.peer}
        times = measure(present, batch_size, device, args.rounds, args.least_seconds)
        for name, sampler in present.items():
            evaluations, gmac = costs[name]
            seconds = statistics.median(times[name])
            slower = statistics.median(theirs / ours for theirs, ours in zip(times[name], times[OURS]))
            promised = gmac / costs[OURS][1]
            row = {
                "sampler": name,
                "batch_size": batch_size,
                "evaluations": evaluations,
                "gmac": gmac,
                "ms_a_batch": 1e3 * seconds,
                "ms_an_image": 1e3 * seconds / batch_size,
                "images_a_second": batch_size / seconds,
                "times_slower": slower,
                "promised": promised,
                "measured_over_promised": slower / promised,
                "steps_timed_times": sampler.share,
            }
            rows.append(row)
            time_is = "measured" if sampler.share == 1 else f"{args.timed_steps} steps x {sampler.share:g}"
            print(
                f"| {name} | {batch_size} | {evaluations:g} | {gmac:.5g} | {row['ms_a_batch']:.5g} | "
                f"{row['ms_an_image']:.4g} | {row['images_a_second']:.4g} | {slower:.4g} | {promised:.4g} | "
                f"{row['measured_over_promised']:.2f} | {time_is} |",
                flush=True,
            )
    return rows


def overhead(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Print the table of the pipeline's overhead; its rows."""
    demo = {"sample_size": 16, "in_channels": 1, "latent_channels": 32, "block_out_channels": (16, 32, 64)}
    rows = []
    print(
        "| decoder | batch | output | decode, ms | pipeline, ms | pipeline / decode | over a decode in the same parts |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, config in {"demo, 16 px": demo, "defaults, 32 px": {}}.items():
        vae = AutoencoderEC(**config).eval().to(device, dtype)
        pipeline = ECVAEPipeline(vae=vae)
        for batch_size in args.batch_sizes:
            latents = torch.randn(batch_size, vae.config.latent_channels, 1, 1, device=device, dtype=dtype)
            for output_type in ("pt", "pil"):

                @torch.no_grad()
                def decode():
                    vae.decode(latents)

                def sample():
                    pipeline(batch_size=batch_size, output_type=output_type)

                def decode_in_parts():
                    # As the pipeline does, so that what is left is overhead alone.
                    with torch.no_grad():
                        pipeline.decode(latents)

                times = {decode: [], decode_in_parts: [], sample: []}
                for repeat in range(args.pairs + 3):
                    for call in list(times) if repeat % 2 else reversed(list(times)):
                        seconds = seconds_of(call, device)
                        if repeat >= 3:  # the first three warm up
                            times[call].append(seconds)
                row = {
                    "decoder": name,
                    "batch_size": batch_size,
                    "output_type": output_type,
                    "decode_ms": 1e3 * statistics.median(times[decode]),
                    "pipeline_ms": 1e3 * statistics.median(times[sample]),
                    "ratio": statistics.median(b / a for a, b in zip(times[decode], times[sample])),
                    "ratio_in_parts": statistics.median(b / a for a, b in zip(times[decode_in_parts], times[sample])),
                }
                rows.append(row)
                print(
                    f"| {name} | {batch_size} | {output_type} | {row['decode_ms']:.2f} | {row['pipeline_ms']:.2f} | "
                    f"{row['ratio']:.3f} | {row['ratio_in_parts']:.3f} |",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights")
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument(
        "--peer_batch_sizes", type=positive, nargs="*", help="those of them for the UNet's; all if not given"
    )
    parser.add_argument("--timed_steps", type=positive, default=20)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--least_seconds", type=float, default=0.2, help="of calls of a sampler, in each round")
    parser.add_argument("--overhead", action="store_true", help="the pipeline against its bare decoder instead")
    parser.add_argument("--pairs", type=positive, default=30, help="of calls, with --overhead")
    parser.add_argument("--small", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--output", type=place, help="file for the rows, as JSON lines")
    add_figures(parser)
    args = parser.parse_args()
    device, dtype = args.device, getattr(torch, args.dtype)
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()  # casting weights warns about an empty list of exceptions
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    setting = {
        "device": str(args.device),
        "machine": where,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ecvae_diffusers": ecvae_diffusers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    if args.overhead:
        rows = overhead(args, device, dtype)
        figures = {
            f"pipeline over decode, {row['decoder']}, batch {row['batch_size']}, {row['output_type']}": f"{row['ratio']:.3f}"
            for row in rows
        }
    else:
        sizes = SMALL if args.small else {"vae": VAE, "energy": ENERGY, "unet": UNET}
        samplers = make_samplers(sizes, args.timed_steps, device, dtype)
        networks = {}
        for sampler in samplers.values():
            networks |= {n: part for n, part in sampler.pipeline.components.items() if hasattr(part, "num_parameters")}
        counts = ", ".join(f"{name} {part.num_parameters() / 1e6:.2f} M" for name, part in networks.items())
        print(f"Parameters: {counts}; {args.rounds} rounds.")
        rows = compare(samplers, args, device)
        figures = {
            f"{row['sampler']}, batch {row['batch_size']}": f"{row['ms_an_image']:.4g} ms an image, {row['times_slower']:.4g} "
            f"times ours, {row['measured_over_promised']:.2f} of what operations promise"
            for row in rows
            if row["batch_size"] == rows[-1]["batch_size"]
        }
    write_figures(args, figures)
    if args.output is not None:
        args.output.write_text("".join(json.dumps(row | setting) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
