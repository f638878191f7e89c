#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far equally many images are from the training digits: held-out digits, training digits, and samples of a model.

`python benchmarks/studies/sample_size.py --pretrained_model_name_or_path model_cards/digits` prints a line for each.
"""

import argparse
import statistics

import torch

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import GenerationMetrics
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits, sample_images, train_digit_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline of 16 px gray images.")
    parser.add_argument("--num_sets", type=int, default=8, help="Sets of images. Default: 8.")
    args = parser.parse_args()
    features, accuracy = train_digit_features()
    digits = load_digits()[0]
    train, held_out = digits[:NUM_TRAIN], digits[NUM_TRAIN:]
    metrics = GenerationMetrics(features)
    for batch in train.split(250):
        metrics.update(batch, real=True)

    def distance(images: torch.Tensor) -> float:
        for batch in images.split(250):
            metrics.update(batch, real=False)
        measures = metrics.compute()
        metrics.reset(keep_real=True)
        return measures["frechet_distance"]

    size, generator = len(held_out), torch.Generator().manual_seed(0)
    pipeline = ECVAEPipeline.from_pretrained(args.pretrained_model_name_or_path)
    sets = {
        "training digits": [
            train[torch.randperm(NUM_TRAIN, generator=generator)[:size]] for _ in range(args.num_sets)
        ],
        "the model": sample_images(pipeline, size * args.num_sets, seed=1).split(size),
        "held-out digits": [held_out],
    }
    print(f"classifier: {accuracy:.1%} on held-out digits")
    for name, images in sets.items():
        distances = [distance(one) for one in images]
        shown = ", ".join(f"{one:.1f}" for one in distances)
        print(f"{size} images of {name}: {shown}; median {statistics.median(distances):.1f}")


if __name__ == "__main__":
    main()
