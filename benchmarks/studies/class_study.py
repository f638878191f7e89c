#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train with and without classes: `python benchmarks/studies/class_study.py --fashion_mnist DATASET --output_dir STUDY`.

The same EC-VAE is trained with and without classes, for equal iterations. A row has the distance of samples to the training
images, over EfficientNet-Lite0 and over the features of a classifier of the data's classes. For the model with classes, it also
has the share of samples that the classifier recognises as the class asked for. A good share is near the classifier's accuracy on
test images.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import load_dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import ClassifierFeatures
from ecvae_diffusers.training.data.images import classes_of_column


SETTINGS = {"without classes": [], "classes": ["--class_conditional", "--class_column", "label"]}
COLUMNS = {
    **study.FRECHET,
    "kernel distance": study.middle("kernel_distance", ".4f"),
    "Frechet distance over the classifier": study.middle("classifier_frechet_distance", ".1f"),
    "recall": study.middle("recall", ".2f"),
    "named as asked": study.each("named_as_asked", ".1%"),
    "lambda": study.middle("dual", ".0f"),
    "seconds per iteration": study.seconds_per_iteration,
}


def labels_of(dataset: str, split: str, count: int) -> tuple[torch.Tensor, list[str]]:
    """Return the classes of the images that `study.fashion_images` returns, and their names."""
    rows = load_dataset(dataset, split=split).shuffle(seed=0).select(range(count))
    labels, names = classes_of_column(rows, dataset, "label")
    return torch.tensor(labels), names


class Classes(study.FashionMNIST):
    """Fashion-MNIST with a classifier of its classes."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        labels, names = labels_of(args.dataset, "train", len(self.train))
        self.classifier = ClassifierFeatures(self.train, labels, names).to(self.device)
        labels, _ = labels_of(args.dataset, "test", 10_000)
        features = self.classifier(study.fashion_images(args.dataset, "test", 10_000))
        right = self.classifier.classify(features) == labels.to(self.device)
        self.about += f"; the classifier names {right.float().mean():.1%} of test images right"
        self.by_classifier = study.reference(self.classifier, self.train)

    def measure(self, folder: Path) -> dict:
        row, pipeline = study.trained_row(self, folder), ECVAEPipeline.from_pretrained(folder).to(self.device)
        count, classes = self.num_samples, {}
        generator = torch.Generator().manual_seed(1)
        if (labels := pipeline.draw_labels([None] * count, generator)) is not None:
            classes = {"class_labels": labels}
        latents = torch.randn(count, pipeline.vae.config.latent_channels, 1, 1, generator=generator)
        images = pipeline(count, latents=latents, output_type="pt", **classes).images
        images = (images * 255).round().to(torch.uint8)
        row |= {f"classifier_{name}": value for name, value in study.against(self.by_classifier, images).items()}
        if labels is not None:
            found = torch.cat([self.classifier.classify(self.classifier(part)) for part in images.split(500)])
            row["named_as_asked"] = (found == labels).float().mean().item()
        return row


def main() -> None:
    args = study.parser(__doc__, list(SETTINGS), "fashion_mnist").parse_args()

    def make(data: Classes, name: str, seed: int) -> dict:
        folder = study.run_folder(args.output_dir, data.name, name, seed)
        study.train(data, folder, seed, args.max_train_steps, *SETTINGS[name])
        return data.measure(folder)

    results = study.run(args, "class", Classes, make, arguments=SETTINGS)
    print(results.table("setting", list(SETTINGS), COLUMNS))


if __name__ == "__main__":
    main()
