#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Does calibration hold at every size? `python benchmarks/size_study.py --emoji DATASET --output_dir STUDY --sizes 16 32 64`.

One data set at many sizes, gray and in colour, is a controlled experiment: a VAE and an EC-VAE are trained at each with the same
arguments, the script's defaults but for networks and batch. A row says where lambda came to rest, how long the gradients were that
images received from both losses, and how far samples are from the training images over two layers of EfficientNet-Lite0.
The data set is a Hub id or a folder that `datasets` loads, of RGB images of 256 px, such as Fluent emoji on white.
"""

import json
import statistics
from pathlib import Path

import torch
import torch.nn as nn
from command_line import positive
from study import (
    METRICS_FILE,
    RememberedFeatures,
    Results,
    against,
    parser,
    precision,
    read_metrics,
    reference,
    sample_images,
    train,
    versions,
)

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import FeatureExtractor, lite0_features
from ecvae_diffusers.training.data.images import ImageDataset, load_images


NUM_SAMPLES = 5000
# Of the run, what is left out of the share of steps with calibration on, and the part at its end whose medians are stated.
SETTLING_STEPS, LAST_PART = 200, 0.25
SETTINGS = {"VAE": ["--calibration", "none"], "EC-VAE": [], "EC-VAE, K 1": ["--langevin_steps", "1"]}
CHANNELS = (16, 32, 64, 64, 64, 64, 64)
LOGGED = (
    "dual", "drift", "drift_tolerance", "langevin_drift_step", "calibration_gradient_norm", "reconstruction_gradient_norm",
)  # fmt: skip


class MiddleFeatures(nn.Module):
    """Pooled features of the first blocks of EfficientNet-Lite0, to stride 16: textures rather than objects."""

    def __init__(self, network: nn.Module, num_blocks: int = 11):
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.Sequential(*network._blocks[:num_blocks])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(images)).mean((2, 3))


class Emoji:
    """The data set at one size and number of channels, over two layers of EfficientNet-Lite0: all its training images."""

    def __init__(self, dataset: str, size: int, channels: int, batch_size: int, output_dir: Path, device):
        self.device, self.name = device, f"{channels}x{size}x{size}"
        blocks = [str(width) for width in CHANNELS[: size.bit_length() - 2]]
        self.data_arguments = ["--dataset_name", dataset, "--image_column", "image"]
        self.arguments = [
            "--resolution", str(size), "--in_channels", str(channels), "--latent_channels", "64",
            "--block_out_channels", *blocks, "--train_batch_size", str(batch_size), *precision(device),
        ]  # fmt: skip
        images = ImageDataset(load_images(dataset, None, None, "image", None, None), size, channels)
        images = torch.stack([images[i] for i in range(len(images))])
        lite0 = lite0_features()
        middle = FeatureExtractor(
            MiddleFeatures(lite0.network.network), "Lite0, stride 16", 128, mean=127 / 255, std=128 / 255
        )
        self.metrics = {}
        for name, features in (("", lite0), ("middle_", middle)):
            self.metrics[name] = reference(
                RememberedFeatures(features.to(device), output_dir / f"{name}features"), images
            )
            self.metrics[name].features = features

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        return {
            f"{name}{measure}": value
            for name, metrics in self.metrics.items()
            for measure, value in against(metrics, images).items()
        }


def calibration_row(records: list[dict]) -> dict:
    """Return where calibration came to rest, from the logged steps of a run: medians over its last quarter."""
    last = records[-max(1, int(LAST_PART * len(records))) :]
    row = {name: statistics.median(record[name] for record in last) for name in LOGGED if name in last[0]}
    if "constraint" in last[0]:
        row["violation"] = statistics.median(record["constraint"] / record["tolerance"] for record in last)
        settled = [record["calibrating"] for record in records if record["step"] > SETTLING_STEPS]
        row["share_on"] = statistics.mean(settled) if settled else None
    return row


def table(results: Results, names: list[str]) -> str:
    lines = [
        "| size | lambda | C / tolerance | drift | step a | gradient of calibration | of reconstruction | on | Frechet distance, VAE | EC-VAE | "
        "ratio | middle layer, ratio |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    ]

    def median(rows: list[dict], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    for name in names:
        plain, calibrated = results.of(f"VAE, {name}"), results.of(f"EC-VAE, {name}")
        if plain and calibrated:
            cells = [f"{median(calibrated, key):.3g}" for key in ("dual", "violation", *LOGGED[1:2], *LOGGED[3:])]
            distances = [[row["frechet_distance"] for row in rows] for rows in (plain, calibrated)]
            ratios = [
                median(plain, key) / median(calibrated, key) for key in ("frechet_distance", "middle_frechet_distance")
            ]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {median(calibrated, 'share_on'):.0%} | "
                + " | ".join(", ".join(f"{d:.0f}" for d in some) for some in distances)
                + " | "
                + " | ".join(f"{ratio:.2f}" for ratio in ratios)
                + " |"
            )
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__, list(SETTINGS))
    made.add_argument("--emoji", required=True, metavar="DATASET", help="Hub id or folder")
    made.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64], choices=(16, 32, 64, 128, 256))
    made.add_argument("--channels", type=int, nargs="+", default=[1, 3], choices=(1, 3))
    made.add_argument("--train_batch_size", type=positive, default=32)
    args = made.parse_args()
    results = Results(args.output_dir / "size.jsonl", NUM_SAMPLES)
    names = [f"{channels}x{size}x{size}" for size in args.sizes for channels in args.channels]
    if not args.table:
        print(versions(), flush=True)
        for size in args.sizes:
            for channels in args.channels:
                data = Emoji(args.emoji, size, channels, args.train_batch_size, args.output_dir, args.device)

                def make(name: str, seed: int) -> dict:
                    setting = name.removesuffix(f", {data.name}")
                    folder = args.output_dir / data.name / f"{setting.replace(', ', '_').replace(' ', '-')}_{seed}"
                    train(data, folder, seed, args.max_train_steps, *SETTINGS[setting])
                    pipeline = ECVAEPipeline.from_pretrained(folder).to(data.device)
                    measures = data.measure(sample_images(pipeline, NUM_SAMPLES, seed=1, batch_size=100))
                    return measures | calibration_row(read_metrics(folder / METRICS_FILE))

                wanted = {f"{name}, {data.name}": [*data.arguments, *SETTINGS[name]] for name in args.settings}
                results.fill(list(wanted), args.seeds, make, args.max_train_steps, wanted)
    print(table(results, names))
    print(json.dumps({"command": "size_study.py", "versions": versions()}))


if __name__ == "__main__":
    main()
