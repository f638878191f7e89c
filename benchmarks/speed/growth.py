#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure time and memory of `ecvae train` by image size: `python benchmarks/speed/growth.py`.

Each size is trained for a few steps on random colour images, in a process of its own. Time and peak memory are those that the
run itself logs. `--arguments` are passed to `ecvae train`, for example `--arguments --block_out_channels 16 32 64`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import machine
from common.results import table
from ecvae_diffusers.training.run.log import METRICS_FILE, read_metrics


def measure(size: int, args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Return the seconds per step of the second half of a run, and its peak memory in GiB."""
    pictures, run = folder / f"pictures_{size}", folder / f"run_{size}"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for i in range(args.train_batch_size):
        Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(pictures / f"{i}.png")
    command = [sys.executable, "-m", "ecvae_diffusers.cli", "train", str(pictures), "--resolution", str(size)]
    command += ["--train_batch_size", str(args.train_batch_size), "--max_train_steps", str(2 * args.steps)]
    command += ["--log_steps", str(args.steps), "--output_dir", str(run), *args.arguments]
    subprocess.run(command, check=True)
    last = read_metrics(run / METRICS_FILE)[-1]
    return args.train_batch_size / last["images_per_second"], last["peak_memory_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="Image sizes in pixels.")
    parser.add_argument("--train_batch_size", type=int, default=32, help="Images per step.")
    parser.add_argument("--steps", type=int, default=20, help="Steps before the measurement, and in it.")
    parser.add_argument(
        "--arguments", nargs=argparse.REMAINDER, default=[], help="Further arguments of `ecvae train`; must come last."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [(size, *measure(size, args, Path(folder))) for size in args.sizes]
    print(machine("cpu"))
    columns = ["size", "ms per step", "peak memory, GiB"]
    print(table(columns, [[str(size), f"{1000 * seconds:.0f}", f"{memory:.2f}"] for size, seconds, memory in rows]))


if __name__ == "__main__":
    main()
