#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure oversampling of a model of digits: `python benchmarks/studies/oversample.py model_cards/digits`.

Prints a row per setting: `oversample` draws per image of which the one of lowest energy is kept, and, to compare with, draws of a
lower temperature. 10,000 samples are measured against the 1,500 training digits over the features of a digit classifier. With
`--fashion_mnist DATASET`, they are measured against 10,000 images of Fashion-MNIST over EfficientNet-Lite0's features.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.machine import machine
from common.results import table
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import lite0_features
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits, train_digit_features


SETTINGS = {
    **{f"oversample {count}": {"oversample": count} for count in (1, 2, 4, 8)},
    **{f"temperature {scale}": {"temperature": scale} for scale in (0.9, 0.8)},
}
COLUMNS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
NUM_SAMPLES, BATCH = 10_000, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--fashion_mnist", dest="dataset", metavar="DATASET", help="Hub id or folder")
    parser.add_argument("--seed", type=int, default=0)
    study.add_device(parser)
    args = parser.parse_args()
    print(machine(args.device), flush=True)
    if args.dataset is None:
        features, real = train_digit_features()[0], load_digits()[0][:NUM_TRAIN]
    else:
        features, real = lite0_features(), study.fashion_images(args.dataset, "train", NUM_SAMPLES)
    metrics = study.reference(features.to(args.device), real)
    pipeline, rows = ECVAEPipeline.from_pretrained(args.model).to(args.device), []
    for name, arguments in SETTINGS.items():
        generator, images = torch.Generator().manual_seed(args.seed), []
        for _ in tqdm(range(NUM_SAMPLES // BATCH), desc=name):
            drawn = pipeline(BATCH, generator, output_type="pt", **arguments).images
            images.append((drawn * 255).round().to(torch.uint8).cpu())
        found = study.against(metrics, torch.cat(images))
        rows.append([name, *(f"{found[column]:.4g}" for column in COLUMNS)])
        print(table(["setting", *COLUMNS], rows), flush=True)


if __name__ == "__main__":
    main()
