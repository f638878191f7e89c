#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Test calibration at several sizes: `python benchmarks/studies/size_study.py --emoji DATASET --output_dir STUDY --sizes 16 32 64`.

A VAE and an EC-VAE are trained on one data set at several sizes, gray and in colour. All arguments except networks and batch
are the defaults of the script. A row has the final lambda, the norms of the gradients that images receive from both losses, and
the distance of samples to the training images over two layers of EfficientNet-Lite0. The data set has RGB images of 256 px, such
as Fluent emoji on white.
"""

import argparse
import functools
import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn as nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.results import table
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import FeatureExtractor, lite0_features
from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.images import ImageDataset, load_images


# The share of steps with calibration on leaves out the first steps. Medians are over the last part of a run.
SETTLING_STEPS, LAST_PART = 200, 0.25
SETTINGS = {"VAE": ["--calibration", "none"], "EC-VAE": []}
# The final lambda should not depend on these.
VARIED = {
    **{f"K {steps}": ["--langevin_steps", str(steps)] for steps in (1, 15)},
    **{f"batch {size}": ["--train_batch_size", str(size)] for size in (8, 16, 64, 128)},
    "two scales": ["--energy_num_scales", "2"],
    "spectral norm": ["--energy_spectral_norm", "--energy_gradient_penalty", "0"],
    "gradient penalty 0.1": ["--energy_gradient_penalty", "0.1"],
}
SETTINGS |= {f"EC-VAE, {name}": arguments for name, arguments in VARIED.items()}
CHANNELS = (16, 32, 64, 64, 64, 64, 64)
LOGGED = ("dual", "drift", "langevin_drift_step", "calibration_gradient_norm", "reconstruction_gradient_norm")


class Emoji:
    """The training images at one size and number of channels, with their features over two layers of EfficientNet-Lite0."""

    num_samples = 5_000

    def __init__(self, args: argparse.Namespace, size: int, channels: int):
        self.device, self.name = args.device, f"{channels}x{size}x{size}"
        self.data_arguments = ["--dataset_name", args.dataset, "--image_column", "image"]
        blocks = [str(width) for width in CHANNELS[: size.bit_length() - 2]]
        self.arguments = [
            "--resolution", str(size), "--in_channels", str(channels), "--latent_channels", "64",
            "--block_out_channels", *blocks, "--train_batch_size", "32", *study.precision(args.device),
        ]  # fmt: skip
        images = ImageDataset(load_images(DataConfig(dataset_name=args.dataset, image_column="image")), size, channels)
        images = torch.stack([images[i] for i in range(len(images))])
        lite0 = lite0_features().to(args.device)
        network = lite0.network.network
        # The first blocks, up to stride 16, see textures rather than objects.
        middle = [network._conv_stem, network._bn0, network._swish, *network._blocks[:11]]
        middle = nn.Sequential(*middle, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        middle = FeatureExtractor(middle, "Lite0, stride 16", 128, mean=127 / 255, std=128 / 255)
        self.about = f"{len(images)} images"
        self.metrics = {"": study.reference(lite0, images), "middle_": study.reference(middle.to(args.device), images)}

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        found = {name: study.against(metrics, images) for name, metrics in self.metrics.items()}
        return {f"{name}{key}": value for name, measures in found.items() for key, value in measures.items()}


def calibration_row(records: list[dict]) -> dict:
    """Return medians of logged values over the last quarter of a run, and the share of steps with calibration on."""
    last = records[-max(1, int(LAST_PART * len(records))) :]
    row = {name: study.median(last, name) for name in LOGGED if name in last[0]}
    if "constraint" in last[0]:
        row["violation"] = statistics.median(record["constraint"] / record["tolerance"] for record in last)
        settled = [record for record in records if record["step"] > SETTLING_STEPS] or last
        row["share_on"] = statistics.mean(record["calibrating"] for record in settled)
    return row


def sizes_table(results: study.Results, names: list[str]) -> str:
    rows = []
    for name, setting in itertools.product(names, SETTINGS):
        plain, calibrated = results.of(f"VAE, {name}"), results.of(f"{setting}, {name}")
        if setting == "VAE" or not (plain and calibrated):
            continue
        cells = [f"{study.median(calibrated, key):.3g}" for key in ("violation", *LOGGED)]
        cells.append(f"{study.median(calibrated, 'share_on'):.0%}")
        cells += [", ".join(f"{row['frechet_distance']:.0f}" for row in some) for some in (plain, calibrated)]
        for key in ("frechet_distance", "kernel_distance", "middle_frechet_distance"):
            cells.append(f"{study.median(plain, key) / study.median(calibrated, key):.2f}")
        rows.append([name, setting, *cells])
    columns = [
        "size", "setting", "C / tolerance", "lambda", "drift", "step a", "gradient of calibration", "of reconstruction",
        "on", "Frechet distance, VAE", "EC-VAE", "ratio", "kernel distance, ratio", "Frechet distance over the middle layer, ratio",
    ]  # fmt: skip
    return table(columns, rows)


def main() -> None:
    made = study.parser(__doc__, list(SETTINGS), "emoji")
    made.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64], choices=(16, 32, 64, 128, 256))
    made.add_argument("--channels", type=int, nargs="+", default=[1, 3], choices=(1, 3))
    args = made.parse_args()
    settings, names = args.settings, []
    for size, channels in itertools.product(args.sizes, args.channels):
        names.append(f"{channels}x{size}x{size}")
        own = {f"{setting}, {names[-1]}": SETTINGS[setting] for setting in settings}
        args.settings = list(own)

        def make(data: Emoji, name: str, seed: int) -> dict:
            setting, _, _ = name.rpartition(", ")
            folder = study.run_folder(args.output_dir, data.name, setting, seed)
            study.train(data, folder, seed, args.max_train_steps, *SETTINGS[setting])
            pipeline = ECVAEPipeline.from_pretrained(folder).to(data.device)
            measures = data.measure(study.sample_images(pipeline, data.num_samples, seed=1, batch_size=100))
            return measures | calibration_row(study.read_metrics(folder / study.METRICS_FILE))

        load = functools.partial(Emoji, size=size, channels=channels)
        results = study.run(args, "size", load, make, arguments=own)
    print(sizes_table(results, names))


if __name__ == "__main__":
    main()
