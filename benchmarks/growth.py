#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""How time and memory of a training iteration grow: `python benchmarks/growth.py --plot growth.png`.

One quantity is varied at a time, the others stay at 32 px, batch 32, K 5, width 16. On a CPU each size runs alone in a process of
its own, for its peak memory; the law that is expected stands beside each table, with the exponent between the last two sizes.
On a CPU malloc keeps freed memory, as in the training script; `--hand_back` shows beside it what an iteration
takes where it does not. Ranks run the training script on random images, one thread each, and are measured by its own log.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from command_line import add_figures, picture_file, positive, write_figures
from command_line import device as device_here


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from ecvae_diffusers.training.run.launch import keep_freed_memory  # noqa: E402
from ecvae_diffusers.training.run.log import (  # noqa: E402
    METRICS_FILE,
    peak_memory,  # noqa: E402
    read_metrics,
)


BASE = {"resolution": 32, "batch_size": 32, "langevin_steps": 5, "width": 16}
SIZES = {
    "langevin_steps": (1, 5, 15, 30),
    "batch_size": (8, 16, 32, 64, 128),
    "resolution": (16, 32, 64, 128, 256),
    "width": (8, 16, 32, 64),
}
LAWS = {
    "langevin_steps": "time: a constant for both networks' steps, plus one pass and its gradient a step; memory: constant",
    "batch_size": "time and activations proportional (1)",
    "resolution": "time and activations as the number of pixels (2): the further levels cost little",
    "width": "time of convolutions as the square (2) where they compute, less where memory is the bound; activations 1",
}

EXPONENTS = {"batch_size": 1, "resolution": 2, "width": 2}  # of the time, at the end


def block_out_channels(resolution: int, width: int) -> tuple[int, ...]:
    """Doubled at each level down to 4 px, at most fourfold."""
    levels = int(math.log2(resolution)) - 1
    return tuple(width * min(2**level, 4) for level in range(levels))


def measure(
    device: torch.device, rounds: int, resolution: int, batch_size: int, langevin_steps: int, width: int
) -> dict:
    """Median milliseconds of an iteration, and the peak memory of this process, in GiB."""
    from training_step import CHANGES, GPU_CHANGES, Arrangement, Iteration, wait

    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ours = Arrangement(**{name: name not in (*GPU_CHANGES, "bf16") for name in CHANGES})
    channels = block_out_channels(resolution, width)
    sizes = {"sample_size": resolution, "in_channels": 3, "block_out_channels": channels}
    iteration = Iteration(ours, sizes, langevin_steps, weight=0.0, device=device)
    real = torch.rand(batch_size, 3, resolution, resolution, device=device) * 2 - 1
    seconds = []
    for index in range(rounds + 2):
        started = time.perf_counter()
        iteration.step(real)
        wait(device)
        if index >= 2:
            seconds.append(time.perf_counter() - started)
    return {"ms": 1e3 * statistics.median(seconds), "memory_gib": peak_memory(device)}


def measured(arguments: argparse.Namespace, sizes: dict, hand_back: bool = False) -> dict:
    """One size; on a CPU, whose peak of memory is that of the process, in a process of its own."""
    if arguments.device.type == "cuda":
        return measure(arguments.device, arguments.rounds, **sizes)
    command = [sys.executable, __file__, "--device", str(arguments.device), "--rounds", str(arguments.rounds)]
    command += ["--hand_back"] if hand_back else []
    result = subprocess.run([*command, "--one", json.dumps(sizes)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def ranks(counts: tuple[int, ...], num_steps: int = 40) -> dict[int, float]:
    """Images a second of the training script with as many processes, one thread each."""
    script, found = Path(__file__).resolve().parents[1] / "training" / "train_ecvae.py", {}
    with tempfile.TemporaryDirectory() as folder:
        images, rng = Path(folder) / "images", np.random.default_rng(0)
        images.mkdir()
        for i in range(256):
            PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{i}.png")
        for count in counts:
            output = Path(folder) / f"run-{count}"
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script),
                "--train_data_dir", str(images), "--output_dir", str(output), "--max_train_steps", str(num_steps),
                "--train_batch_size", str(BASE["batch_size"]), "--block_out_channels",
                *map(str, block_out_channels(BASE["resolution"], BASE["width"])), "--no-divergence_guard",
                "--save_images_steps", "1000000",
            ]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.run(command, capture_output=True, text=True, env=environment)
            if process.returncode != 0:
                raise RuntimeError(f"{count} rank(s) failed:\n{process.stderr[-2000:]}")
            records = {record["step"]: record for record in read_metrics(output / METRICS_FILE)}
            found[count] = records[num_steps]["images_per_second"]
    return found


def plot(found: dict[str, dict[int, dict]], path: Path) -> None:
    """Time and memory against each quantity; the law of the time as a dashed line through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6), layout="constrained", squeeze=False)
    for column, (name, rows) in zip(axes.T, found.items()):
        sizes = list(rows)
        for axis, key, title in zip(column, ("ms", "memory_gib"), ("ms an iteration", "peak memory, GiB")):
            values = [row[key] for row in rows.values()]
            axis.plot(sizes, values, "o-", label="measured")
            axis.set(xlabel=name.replace("_", " "), title=title)
            if name == "langevin_steps":  # a straight line, which a logarithm would bend
                axis.set_ylim(0, 1.1 * max(values))
            else:
                axis.loglog()
                low, high = axis.get_ylim()
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
            axis.set_xticks(sizes, map(str, sizes))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if name in EXPONENTS:
            law = [rows[sizes[-1]]["ms"] * (size / sizes[-1]) ** EXPONENTS[name] for size in sizes]
            column[0].plot(sizes, law, "--", color="gray", label=f"exponent {EXPONENTS[name]}")
            column[0].legend()
    figure.savefig(path, dpi=80)


def exponents(rows: dict[int, dict]) -> str:
    """Of time and memory between the last two sizes, in words; none of a single size."""
    if len(rows) < 2:
        return ""
    *_, (small, before), (large, after) = rows.items()
    time, memory = (math.log(after[key] / before[key]) / math.log(large / small) for key in ("ms", "memory_gib"))
    return f" Exponents between the last two: time {time:.2f}, memory {memory:.2f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--quantities", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", type=positive, nargs="+", help="instead of those in the file, of each quantity")
    parser.add_argument(
        "--ranks", type=positive, nargs="*", default=[], help="numbers of processes, on this machine's CPU"
    )
    parser.add_argument("--hand_back", action="store_true", help="a column more: malloc hands freed memory back")
    parser.add_argument("--plot", type=picture_file)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    add_figures(parser)
    args = parser.parse_args()
    if "resolution" in args.quantities and any(size not in SIZES["resolution"] for size in args.sizes or []):
        parser.error(f"--sizes must be of {SIZES['resolution']} with --quantities resolution, but are {args.sizes}.")
    if args.one is not None:
        if args.device.type == "cpu" and not args.hand_back:
            keep_freed_memory()
        print(json.dumps(measure(args.device, args.rounds, **args.one)))
        return
    print(
        f"{args.device}, {torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"{args.rounds} rounds; else {BASE}, channels {block_out_channels(BASE['resolution'], BASE['width'])}"
    )
    found: dict[str, dict[int, dict]] = {}
    for name in args.quantities:
        found[name] = {}
        more = (
            (" ms where memory is handed back | times slower | GiB there |", "---|---|---|")
            if args.hand_back
            else ("", "")
        )
        print(f"\n| {name.replace('_', ' ')} | ms an iteration | peak memory of the process, GiB |{more[0]}")
        print(f"|---|---|---|{more[1]}")
        for size in args.sizes or SIZES[name]:
            row = found[name][size] = measured(args, {**BASE, name: size})
            cells = [f"{size}", f"{row['ms']:.4g}", f"{row['memory_gib']:.3g}"]
            if args.hand_back:
                back = measured(args, {**BASE, name: size}, hand_back=True)
                cells += [f"{back['ms']:.0f}", f"{back['ms'] / row['ms']:.2f}", f"{back['memory_gib']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        print(f"\nExpected: {LAWS[name]}.{exponents(found[name])}", flush=True)
        largest = f"iteration with {name.replace('_', ' ')} {size}"
        write_figures(args, {largest: f"{row['ms']:.4g} ms, {row['memory_gib']:.3g} GiB"})
    if args.ranks:
        speeds = ranks(tuple(args.ranks))
        print("\n| ranks, one thread each | images a second | over one rank |\n|---|---|---|")
        for count, speed in speeds.items():
            print(f"| {count} | {speed:.1f} | {speed / speeds[args.ranks[0]]:.2f} |")
        print("\nExpected: proportional while there are cores, less what the gradients' average costs.")
    if args.plot is not None:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
