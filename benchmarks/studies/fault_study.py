#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Put faults into the energy model of a run, with and without the guard: `python benchmarks/studies/fault_study.py`.

Trains the demo's EC-VAE on digits, without a fault and with a fault at iteration 600, and measures the Frechet distance as
the demo does. The faults are a single NaN gradient of the energy model, and a learning rate that is 1,000 times too high for
50 iterations. Iterations after a rollback are counted too, so that a fault is not repeated. Rows are kept in
STUDY/faults_<data>.jsonl, so an interrupted study resumes.
"""

import functools
import subprocess
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.run import launch


FAULTY = range(600, 650)
RATE_FACTOR = 1000.0
# Fault and additional arguments, by name.
SETTINGS = {
    "undisturbed": (None, []),
    "gradient not a number, guard": ("nan", []),
    "rate 1,000 times too high, guard": ("rate", []),
    "gradient not a number, no guard": ("nan", ["--no-divergence_guard"]),
    "rate 1,000 times too high, no guard": ("rate", ["--no-divergence_guard"]),
}


def train_with_fault(fault: str, arguments: list[str]) -> None:
    """Run the training script with a fault, in this process."""

    class FaultyTrainer(launch.Trainer):
        iteration = 0

        def train_step(self, batches):
            parameter, hook = next(self.task.energy_model.parameters()), None
            if fault == "nan" and self.iteration == FAULTY[0]:
                hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
            if fault == "rate" and self.iteration in FAULTY:
                for group in self.energy.optimizer.param_groups:
                    group["lr"] *= RATE_FACTOR  # the schedule resets it after each step
            scalars = super().train_step(batches)
            if hook is not None:
                hook.remove()
            self.iteration += 1
            return scalars

    launch.Trainer = FaultyTrainer
    train_ecvae.run(train_ecvae.parse_args(arguments))


def make_row(args, data, name: str, seed: int) -> dict:
    fault, extra = SETTINGS[name]
    folder = args.output_dir / f"{fault}{'-'.join(extra)}-{seed}"
    arguments = [
        *data.data_arguments, *data.arguments, "--output_dir", folder, "--overwrite_output_dir", "--seed", seed,
        "--max_train_steps", args.max_train_steps, *extra,
    ]  # fmt: skip
    command = [sys.executable, __file__, "--train", str(fault), *map(str, arguments)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    row = study.logged(folder)
    if result.returncode:
        row["message"] = result.stderr.strip().splitlines()[-1]
    if (folder / "model_index.json").is_file():
        samples = sample_images(ECVAEPipeline.from_pretrained(folder), data.num_samples, seed=1)
        row |= study.against(data.metrics, samples)
    return row


def main() -> None:
    args = study.parser(__doc__, list(SETTINGS)).parse_args()
    results = study.run_on_either(args, "faults", functools.partial(make_row, args))
    undisturbed = {row["seed"]: row["frechet_distance"] for row in results.of("undisturbed")}

    def ratios(rows: list[dict]) -> str:
        found = [row for row in rows if "frechet_distance" in row and row["seed"] in undisturbed]
        return ", ".join(f"{row['frechet_distance'] / undisturbed[row['seed']]:.2f}" for row in found)

    columns = {
        **study.FRECHET,
        "over the undisturbed one of its seed": ratios,
        "rollbacks": study.each("rollbacks", "d"),
        "message": study.each("message", ""),
    }
    print(results.table("setting", list(SETTINGS), columns))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_with_fault(sys.argv[2], sys.argv[3:])
    else:
        main()
