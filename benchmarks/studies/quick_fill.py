#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The page's quick way to fill a hole against `ECVAERestorationPipeline`: `python benchmarks/studies/quick_fill.py --ecvae RUN`.

The middle of 64 held-out images (digits; Fashion-MNIST with `--fashion_mnist DATASET`), a quarter of their pixels, is filled by
rounds of encoding and decoding, as in `ecvae_diffusers/page/index.html`, and by the pipeline's Langevin steps with its defaults,
one answer per image. The feature distance is the mean Euclidean distance between the features of an answer and of the image.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.machine import machine
from common.results import table
from ecvae_diffusers import AutoencoderEC
from ecvae_diffusers.evaluation.evaluate_restoration import load
from ecvae_diffusers.evaluation.restoration import Task, restore
from ecvae_diffusers.metrics import lite0_features, reconstruction_metrics
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits, train_digit_features
from ecvae_diffusers.training.data.transforms import to_range, to_uint8


NUM_IMAGES = 64
ROUNDS = (1, 5, 20, 100)


@torch.no_grad()
def quick_fill(vae: AutoencoderEC, clean: torch.Tensor, known: torch.Tensor, rounds: int) -> torch.Tensor:
    """Fill what is not `known` (1, 1, H, W) of images (N, C, H, W) in [-1, 1]: encode, decode, put the known pixels back."""
    known = known.expand_as(clean)
    mean = (clean * known).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True)
    filled = torch.where(known > 0, clean, mean)
    for _ in range(rounds):
        decoded = vae.decode(vae.encode(filled).latent_dist.mean).sample
        filled = torch.where(known > 0, clean, decoded)
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecvae", required=True, help="pipeline's folder")
    parser.add_argument("--fashion_mnist", dest="dataset", metavar="DATASET", help="this instead of digits")
    args = parser.parse_args()
    if args.dataset is None:
        images, features = load_digits()[0][NUM_TRAIN:][:NUM_IMAGES], train_digit_features()[0]
    else:
        images, features = study.fashion_images(args.dataset, "test", NUM_IMAGES), lite0_features()
    pipeline, clean = load(args.ecvae, "cpu"), to_range(images)
    task = Task("box_inpainting", clean, 0.0)
    known = (task.operator.A_dagger(task.operator.A(torch.ones_like(clean[:1]))) > 0.5).float()[:, :1]
    print(f"{NUM_IMAGES} images of {args.dataset or 'digits'}; {machine('cpu')}")
    real, rows = features(images), []

    def add(name: str, filled: torch.Tensor) -> None:
        psnr = reconstruction_metrics((filled.clamp(-1, 1) + 1) / 2, (clean + 1) / 2)["psnr"].mean().item()
        distance = (features(to_uint8(filled.clamp(-1, 1))) - real).norm(dim=1).mean().item()
        rows.append([name, f"{psnr:.2f}", f"{distance:.3f}"])

    for rounds in ROUNDS:
        add(f"encode and decode, {rounds} rounds", quick_fill(pipeline.vae, clean, known, rounds))
    add("Langevin, one answer", restore(pipeline, task, 1, 32, seed=0).single)
    print(table(["method", "PSNR, dB", "feature distance"], rows))


if __name__ == "__main__":
    main()
