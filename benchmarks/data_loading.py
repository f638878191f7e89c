#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What of a training iteration is waiting for data: `python benchmarks/data_loading.py -- ARGUMENTS of train_ecvae.py`.

Runs the training script in this process, with a watch around the next batch and its way to the device.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from ecvae_diffusers.training import train_ecvae  # noqa: E402
from ecvae_diffusers.training.run import session  # noqa: E402
from ecvae_diffusers.training.train_ecvae import parse_args  # noqa: E402


class WatchedTrainer(session.Trainer):
    """Notes how long each batch takes to come, and each step with it."""

    batch_seconds: list[float] = []
    step_seconds: list[float] = []

    def new_batches(self):
        batches = super().new_batches()
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.batch_seconds.append(time.perf_counter() - started)
            yield batch

    def train_step(self, batches):
        started = time.perf_counter()
        scalars = super().train_step(batches)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - started)
        return scalars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", help="of train_ecvae.py")
    arguments = parser.parse_args().arguments
    session.Trainer = WatchedTrainer
    train_ecvae.run(parse_args(arguments))
    # The first iteration warms up.
    batches, steps = sum(WatchedTrainer.batch_seconds[1:]), sum(WatchedTrainer.step_seconds[1:])
    count = len(WatchedTrainer.step_seconds) - 1
    print(
        f"{count} iterations: {1e3 * steps / count:.1f} ms each, of which {1e3 * batches / count:.2f} ms are data: "
        f"{batches / steps:.2%}. {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads."
    )


if __name__ == "__main__":
    main()
