#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""How near a chain and a decode come to the machine's convolutions: `python benchmarks/limit.py`.

Every convolution that a chain (or a decode) makes is recorded, forward and backward, and then run alone, on tensors of the
same shapes, layout and precision: operations over the sum of these times is the best rate at these shapes, and that sum over
the time of the whole is the fraction of it that is reached. The profile says where the rest goes.
"""

import argparse
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from command_line import add_figures, positive, resolution, write_figures
from command_line import device as device_here
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, EnergyModel, LangevinScheduler


CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def description(value):
    """What of an argument must be the same for its convolution to take as long."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, list) else value


class ConvolutionRecorder(TorchDispatchMode):
    """Counts the convolutions that run while it is open, and their operations (`FlopCounterMode` refuses `autograd.grad`)."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in CONVOLUTIONS:
            self.calls[(function, tuple(description(argument) for argument in args))] += 1
            self.flops += flop_registry[function.overloadpacket](*args, out_val=output)
        return output


def made(value, device: torch.device):
    if isinstance(value, tuple) and value[:1] == ("tensor",):
        _, shape, stride, dtype = value
        return torch.randn(shape, device=device).to(dtype).as_strided(shape, stride)
    return list(value) if isinstance(value, tuple) else value


def seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of a call."""
    found = []
    for index in range(rounds + 2):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 2:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def alone(calls: Counter, device: torch.device, rounds: int) -> float:
    """Seconds of all convolutions of `calls`, each measured alone."""
    total = 0.0
    for (function, descriptions), count in calls.items():
        arguments = [made(value, device) for value in descriptions]
        with torch.inference_mode():
            total += count * seconds(lambda: function(*arguments), device, rounds)
    return total


def largest_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """GFLOP/s of a convolution that is easy to do fast: 256 to 256 channels, 3x3, 64 images of 16 px."""
    sample = torch.randn(64, 256, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        taken = seconds(lambda: torch.nn.functional.conv2d(sample, weight, padding=1), device, rounds)
    return 2 * 64 * 16**2 * 256**2 * 9 / taken / 1e9


def shares(function: Callable[[], object], device: torch.device, count: int = 6) -> str:
    """The operations that take the most time, with their share of it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        function()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [(getattr(event, key), event.key, event.count) for event in profiler.key_averages()]
    total = sum(time for time, _, _ in found)
    return ", ".join(
        f"{name.removeprefix('aten::')} {t / total:.0%} ({n})" for t, name, n in sorted(found)[::-1][:count]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--resolution", type=resolution, default=32)
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--langevin_steps", type=positive, default=15)
    parser.add_argument("--block_out_channels", type=positive, nargs="+", default=[32, 64, 128, 128])
    parser.add_argument("--rounds", type=positive, default=10)
    add_figures(parser)
    args = parser.parse_args()
    device = args.device
    torch.manual_seed(0)
    sizes = {"sample_size": args.resolution, "block_out_channels": tuple(args.block_out_channels)}
    vae = AutoencoderEC(**sizes).to(device, memory_format=torch.channels_last).eval()
    energy = EnergyModel(**sizes).to(device, memory_format=torch.channels_last)
    calibrator = EnergyCalibrator(energy, LangevinScheduler(num_steps=args.langevin_steps))
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    images = images.to(memory_format=torch.channels_last)
    latents = torch.randn(args.batch_size, vae.config.latent_channels, 1, 1, device=device)

    @torch.no_grad()
    def decode() -> torch.Tensor:
        return vae.decode(latents).sample

    print(
        f"{args.resolution} px, batch {args.batch_size}, K {args.langevin_steps}, channels {args.block_out_channels}; {device}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    )
    print(
        "| what | precision | GFLOP | ms | GFLOP/s | its convolutions alone, ms | fraction of their rate | an easy "
        "convolution, GFLOP/s |\n|---|---|---|---|---|---|---|---|"
    )
    profiles, figures = [], {}
    for what, function in (("chain", lambda: calibrator.run_chain(images)), ("decode", decode)):
        for name, dtype in DTYPES.items():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                with ConvolutionRecorder() as recorder:
                    function()
                taken = seconds(function, device, args.rounds)
                profiles.append(f"{what} in {name}: {shares(function, device)}")
            convolutions = alone(recorder.calls, device, args.rounds)
            giga = recorder.flops / 1e9
            print(
                f"| {what} | {name} | {giga:.1f} | {1e3 * taken:.1f} | {giga / taken:.0f} | {1e3 * convolutions:.1f} | "
                f"{convolutions / taken:.2f} | {largest_rate(device, dtype, args.rounds):.0f} |",
                flush=True,
            )
            figures[f"{what} in {name}, of its convolutions' rate"] = f"{convolutions / taken:.2f}"
    write_figures(args, figures)
    print("Shares of the time, with the number of calls: " + "; ".join(profiles) + ".")


if __name__ == "__main__":
    main()
