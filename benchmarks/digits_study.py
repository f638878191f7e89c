#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The demo's comparison over seeds and settings: `python benchmarks/digits_study.py --output_dir STUDY`.

Each row trains the demo's networks on the digits for the demo's number of iterations, and measures the Frechet distance
as the demo does. Rows that STUDY/results.jsonl holds already are not run again, so that the study can be cut off.
`--table` prints the table from what is there.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from demo import ARGUMENTS, NUM_SAMPLES, train  # noqa: E402
from ecvae_diffusers import ECVAEPipeline  # noqa: E402
from ecvae_training.digits import (  # noqa: E402
    NUM_TRAIN,
    load_digits,
    measure,
    sample_images,
    train_digit_features,
    write_digits,
)
from ecvae_training.output import METRICS_FILE, read_metrics  # noqa: E402


# name -> (calibration, arguments beside the demo's)
SETTINGS = {
    "VAE, beta 1": ("none", []),
    "VAE, beta 0.3": ("none", ["--kl_weight", "0.3"]),
    "VAE, beta 0.1": ("none", ["--kl_weight", "0.1"]),
    "EC-VAE (defaults)": ("energy", []),
    "VAE, beta 1, Adam betas 0.9, 0.999": ("none", ["--adam_beta1", "0.9", "--adam_beta2", "0.999"]),
    "VAE, beta 1, batch norm": ("none", ["--norm_type", "batch"]),
    "EC-VAE, batch norm": ("energy", ["--norm_type", "batch"]),
    "EC-VAE, beta 0.3": ("energy", ["--kl_weight", "0.3"]),
    "EC-VAE, lambda fixed at 30": ("energy", ["--dual_learning_rate", "0"]),
    "EC-VAE, K 1, a 1.0": ("energy", ["--langevin_steps", "1", "--langevin_drift_step", "1.0"]),
    "EC-VAE, no spectral norm, alpha 0.1": (
        "energy",
        ["--no-energy_spectral_norm", "--energy_regularization", "0.1"],
    ),
    "EC-VAE, conditioning weight 1": ("energy", ["--conditioning_weight", "1"]),
    "EC-VAE, energy act_fn silu": ("energy", ["--energy_act_fn", "silu"]),
}


def run(name: str, seed: int, output_dir: Path, max_train_steps: int, features, digits: torch.Tensor) -> dict:
    calibration, arguments = SETTINGS[name]
    folder = output_dir / "run"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.time()
    train(folder, output_dir / "digits" / "train", calibration, seed, max_train_steps, *arguments)
    seconds = time.time() - started
    pipeline = ECVAEPipeline.from_pretrained(folder)
    samples = sample_images(pipeline, NUM_SAMPLES, seed=1)
    row = {
        "setting": name,
        "seed": seed,
        "iterations": max_train_steps,
        **measure(features, digits[:NUM_TRAIN], samples),
        "reconstruction_variance": pipeline.vae.config.reconstruction_variance,
        "training_seconds": round(seconds, 1),
    }
    if calibration == "energy":
        last = read_metrics(folder / METRICS_FILE)[-1]
        row |= {key: last[key] for key in ("dual", "drift", "constraint", "tolerance")}
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| setting | Frechet distance, each seed | median | reconstruction MSE | lambda at the end |",
        "|---|---|---|---|---|",
    ]
    for name in SETTINGS:
        mine = sorted((row for row in rows if row["setting"] == name), key=lambda row: row["seed"])
        if mine:
            distances = [row["frechet_distance"] for row in mine]
            error = statistics.median(row["reconstruction_variance"] for row in mine)
            duals = ", ".join(f"{row['dual']:.0f}" for row in mine if "dual" in row)
            lines.append(
                f"| {name} | {', '.join(f'{d:.1f}' for d in distances)} | {statistics.median(distances):.1f} | "
                f"{error:.4f} | {duals} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = args.output_dir / "results.jsonl"

    def rows() -> list[dict]:
        return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []

    if not args.table:
        write_digits(args.output_dir / "digits")
        digits = load_digits()[0]
        features, accuracy = train_digit_features()
        print(
            f"classifier {accuracy:.1%} on held-out digits, whose distance to the training digits is "
            f"{measure(features, digits[:NUM_TRAIN], digits[NUM_TRAIN:])['frechet_distance']:.1f}; demo arguments {ARGUMENTS}; "
            f"torch {torch.__version__}, diffusers {diffusers.__version__}, {os.cpu_count()} cores, "
            f"{platform.machine()}",
            flush=True,
        )
        for seed in args.seeds:
            for name in args.settings:
                if not any(row["setting"] == name and row["seed"] == seed for row in rows()):
                    row = run(name, seed, args.output_dir, args.max_train_steps, features, digits)
                    with open(results, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)
    print(table(rows()))


if __name__ == "__main__":
    main()
