#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Is a class that was not trained on found? `python benchmarks/studies/anomaly_study.py --output_dir STUDY` (or `--fashion_mnist DATASET`).

A setting leaves one class out. An EC-VAE and a VAE are trained on images of the other nine. Further images of the nine measure what is
normal for the EC-VAE, as `ecvae calibrate-threshold` does. A row has the area under the ROC curve of scores of images of the class that
was left out, against other normal images of 16 px. `anomaly` is the score of `ECVAEPipeline.anomaly`, and `residual`, `largest` and
`energy` are its parts. `vae` is the squared error of the VAE's reconstructions, `pca` that of a projection onto as many principal
components as there are latents, and `forest` is an isolation forest of the pixels.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F
from datasets import load_dataset
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.machine import machine
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.evaluation.anomaly import measure_normal
from ecvae_diffusers.metrics import out_of_distribution_auroc
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits


SETTINGS = [f"without {label}" for label in range(10)]
MODELS = {"EC-VAE": [], "VAE": ["--calibration", "none"]}
METHODS = ("anomaly", "residual", "largest", "energy", "vae", "pca", "forest")
FALSE_ALARM_RATE = 0.05


def load(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """Return uint8 images (N, 1, 16, 16), labels, and where the images end that train, measure what is normal, and test."""
    if args.dataset is None:
        images, labels = load_digits()
        return images, labels, (1200, NUM_TRAIN, len(images))
    ends = (20_000, 22_000, 24_000)
    labels = torch.tensor(load_dataset(args.dataset, split="train").shuffle(seed=0)[: ends[-1]]["label"])
    images = study.fashion_images(args.dataset, "train", ends[-1])
    return F.avg_pool2d(images.float(), 2).round().byte(), labels, ends


class NineClasses:
    """Images of a data set without one class: for training, to measure what is normal, and to test."""

    def __init__(self, args: argparse.Namespace, name: str, loaded: tuple, left_out: int):
        images, labels, ends = loaded
        self.arguments = [*study.Digits.arguments, *study.precision(args.device)]
        self.num_latents, normal = study.Digits.latent_channels, labels != left_out
        self.anomalous = images[~normal][: ends[2] - ends[1]]
        starts = (0, *ends)
        self.train, self.calibrate, self.test = (
            images[start:end][normal[start:end]] for start, end in zip(starts, ends)
        )
        folder = args.output_dir / name / f"data_{left_out}"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for i, image in enumerate(self.train):
                PIL.Image.fromarray(image[0].numpy()).save(folder / f"{i:05d}.png")
        self.data_arguments = ["--train_data_dir", str(folder)]

    def auroc(self, score) -> float:
        return out_of_distribution_auroc(score(self.test), score(self.anomalous))


def measure(data: NineClasses, folders: dict[str, Path]) -> dict[str, float]:
    """Return the AUROC of each method, and the share of false alarms."""
    ours, plain = (ECVAEPipeline.from_pretrained(folder) for folder in folders.values())
    ours.register_to_config(anomaly_threshold=measure_normal(ours, data.calibrate, FALSE_ALARM_RATE))

    def reconstruction_error(images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255
        found = [plain.reconstruct(part, output_type="pt").images - part for part in images.split(500)]
        return torch.cat(found).square().flatten(1).mean(1)

    def pixels(images: torch.Tensor):
        return images.flatten(1).numpy() / 255

    pca = PCA(data.num_latents, random_state=0).fit(pixels(data.train))
    forest = IsolationForest(random_state=0).fit(pixels(data.train))

    def pca_error(images: torch.Tensor) -> torch.Tensor:
        found = pixels(images)
        return torch.from_numpy((pca.inverse_transform(pca.transform(found)) - found) ** 2).sum(1)

    @functools.cache
    def parts(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return ours.anomaly_parts(images.float() / 255)

    scores = {
        "anomaly": lambda images: ours.anomaly(images.float() / 255).score,
        "residual": lambda images: parts(images)["residual"],
        "largest": lambda images: parts(images)["largest"],
        "energy": lambda images: parts(images)["energy"],
        "vae": reconstruction_error,
        "pca": pca_error,
        "forest": lambda images: -torch.from_numpy(forest.score_samples(pixels(images))),
    }
    row = {name: data.auroc(scores[name]) for name in METHODS}
    alarms = ours.anomaly(data.test.float() / 255).is_anomalous
    return row | {"false_alarms": int(alarms.sum()), "num_normal": len(alarms)}


def main() -> None:
    args = study.parser(__doc__, SETTINGS).parse_args()
    name = "digits" if args.dataset is None else "fashion_mnist"
    loaded = None if args.table else load(args)
    results = study.Results(args.output_dir / f"anomaly_{name}.jsonl")

    def make(setting: str, seed: int) -> dict[str, float]:
        data, folders = NineClasses(args, name, loaded, int(setting.split()[-1])), {}
        for model, own in MODELS.items():
            folders[model] = study.run_folder(args.output_dir, name, f"{model}, {setting}", seed)
            study.train(data, folders[model], seed, args.max_train_steps, *own)
        return measure(data, folders)

    if not args.table:
        print(machine(args.device), flush=True)
        results.fill(args.settings, args.seeds, make, iterations=args.max_train_steps)
    found = [row for setting in SETTINGS for row in results.of(setting)]
    columns = {method: study.middle(method, ".3f", statistics.fmean) for method in METHODS}
    print(results.table("setting", SETTINGS, columns))
    if found:
        means = ", ".join(f"{method} {statistics.fmean(row[method] for row in found):.3f}" for method in METHODS)
        alarms, normal = (sum(row[key] for row in found) for key in ("false_alarms", "num_normal"))
        print(
            f"mean over {len(found)} rows: {means}; false alarms {alarms} of {normal}, asked for {FALSE_ALARM_RATE:.0%}"
        )


if __name__ == "__main__":
    main()
