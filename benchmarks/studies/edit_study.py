#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Do edits change the class? `python benchmarks/studies/edit_study.py --ecvae RUN` (digits; Fashion-MNIST with `--fashion_mnist`).

For each ordered pair of classes, `ECVAEPipeline.direction` is found from training images and applied to held-out images of the first
class. An independent classifier, trained on the training images, names the edited images. A row has the share that it names as the
second class, and the distance of the edited images to the originals. Images that it names wrong without an edit are left out.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import load_dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.machine import machine
from common.results import table
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import ClassifierFeatures
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits


STRENGTHS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
NUM_CLASSES, MOST_PER_CLASS = 10, 30


def read(dataset: str | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return images, uint8, and classes: those for training, and the held-out ones."""
    if dataset is None:
        images, labels = load_digits()
        return [(images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])]
    found = []
    for split, count in (("train", 10_000), ("test", 2_000)):
        rows = load_dataset(dataset, split=split).shuffle(seed=0).select(range(count))
        found.append((study.fashion_images(dataset, split, count), torch.tensor(rows["label"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecvae", required=True, help="pipeline's folder")
    parser.add_argument("--fashion_mnist", dest="dataset", metavar="DATASET", help="this instead of digits")
    parser.add_argument("--no_residual", action="store_true", help="leave out what the reconstruction lost")
    args = parser.parse_args()
    pipeline = ECVAEPipeline.from_pretrained(args.ecvae)
    (train, classes), (held_out, truth) = read(args.dataset)
    classifier = ClassifierFeatures(train, classes, [str(i) for i in range(NUM_CLASSES)])

    def name(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([classifier.classify(classifier(part)) for part in images.split(500)])

    print(f"{args.dataset or 'digits'}; classifier {(name(held_out) == truth).float().mean():.1%}; {machine('cpu')}")
    rows = []
    for method in ("means", "classifier"):
        moved, distance, accuracy, count = torch.zeros(len(STRENGTHS)), torch.zeros(len(STRENGTHS)), 0.0, 0
        for a in range(NUM_CLASSES):
            shown = held_out[(truth == a) & (name(held_out) == a)][:MOST_PER_CLASS]
            originals = shown.float() / 255
            for b in set(range(NUM_CLASSES)) - {a}:
                sets = [train[classes == one].float() / 255 for one in (a, b)]
                found = pipeline.direction(*sets, method)
                edited = pipeline.edit(
                    originals, found.direction, STRENGTHS, keep_residual=not args.no_residual, output_type="pt"
                ).images
                levels = (edited * 255).round().to(torch.uint8)
                moved += (name(levels).view(-1, len(STRENGTHS)) == b).float().sum(0)
                change = levels.unflatten(0, (-1, len(STRENGTHS))).float() - shown.unsqueeze(1)
                distance += change.square().flatten(2).mean(2).sqrt().sum(0)
                accuracy, count = accuracy + found.accuracy, count + len(shown)
        print(
            f"{method}: held-out accuracy of directions {accuracy / NUM_CLASSES / (NUM_CLASSES - 1):.3f}, {count} edits"
        )
        for strength, share, far in zip(STRENGTHS, (moved / count).tolist(), (distance / count).tolist()):
            rows.append([method, f"{strength:g}", f"{share:.1%}", f"{far:.1f}"])
    print(table(["direction", "strength", "named as the second class", "distance, 8-bit levels"], rows))


if __name__ == "__main__":
    main()
