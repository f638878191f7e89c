#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Does adaptive augmentation help with few pictures? `python benchmarks/studies/few_pictures.py --data DATASET --output_dir STUDY`.

The script trains on a few images of a data set, for a thousand epochs or more, with adaptive augmentation and without. A row says how far
samples are from the whole data set, and whether they are copies: how far they lie from the nearest training image, over the distance
of images that were not trained on (memorisation, 0 for copies).
"""

import argparse
import sys
from pathlib import Path

import PIL.Image
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import lite0_features, nearest_neighbours
from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.images import ImageDataset, load_images


HELD_OUT = ["--validation_fraction", "0.1"]
SETTINGS = {
    "VAE": [*HELD_OUT, "--calibration", "none"],
    "EC-VAE": HELD_OUT,
    "adaptive augmentation": [*HELD_OUT, "--adaptive_augmentation"],
}
COLUMNS = {
    **study.FRECHET,
    "kernel distance": study.middle("kernel_distance", ".4f"),
    "memorisation": study.each("memorisation", ".2f"),
    "overfitting": study.each("overfitting", ".2f"),
    "probability of augmentations": study.each("augmentation_probability", ".2f"),
}
LOGGED = ("overfitting", "augmentation_probability", "dual")
MOST_REAL, MOST_COMPARED = 10_000, 2_000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class FewPictures:
    """A few images of a data set, drawn at random, in a folder; and features of all of them."""

    num_samples = 5_000

    def __init__(self, args: argparse.Namespace):
        self.device, size = args.device, args.resolution
        images = ImageDataset(load_images(DataConfig(dataset_name=args.dataset, image_column="image")), size)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        shown = images.images(order[:MOST_REAL])
        folder = args.output_dir / f"images_{args.num_images}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(shown[: args.num_images]):
            PIL.Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy(), MODES[images.channels]).save(
                folder / f"{i:05d}.png"
            )
        self.name = f"{args.num_images} images"
        self.data_arguments = ["--train_data_dir", str(folder)]
        blocks = [str(width) for width in (16, 32, 64, 64, 64)[: size.bit_length() - 3]]
        self.arguments = [
            "--resolution", str(size), "--latent_channels", "64", "--block_out_channels", *blocks, "--train_batch_size", "32",
            *study.precision(args.device),
        ]  # fmt: skip
        self.features = lite0_features().to(args.device)
        self.metrics = study.reference(self.features, shown)
        self.training = self.features_of(shown[: args.num_images])
        others = self.features_of(shown[args.num_images :][:MOST_COMPARED])
        self.new = nearest_neighbours(others, self.training)[0].median().item()
        self.about = f"{args.num_images} of {len(images)} images"

    def features_of(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.features(part).cpu() for part in images.split(250)])

    def measure(self, folder: Path) -> dict:
        pipeline = ECVAEPipeline.from_pretrained(folder).to(self.device)
        images = study.sample_images(pipeline, self.num_samples, seed=1)
        nearest = nearest_neighbours(self.features_of(images[:MOST_COMPARED]), self.training)[0].median().item()
        last = study.read_metrics(folder / study.METRICS_FILE)[-1]
        row = study.against(self.metrics, images) | {"memorisation": nearest / self.new}
        return row | {name: last[name] for name in LOGGED if name in last}


def main() -> None:
    made = study.parser(__doc__, list(SETTINGS), "data")
    made.add_argument("--num_images", type=int, default=300)
    made.add_argument("--resolution", type=int, default=32)
    args = made.parse_args()

    def make(data: FewPictures, name: str, seed: int) -> dict:
        folder = study.run_folder(args.output_dir, data.name, name, seed)
        study.train(data, folder, seed, args.max_train_steps, *SETTINGS[name])
        return data.measure(folder)

    results = study.run(args, f"few_{args.num_images}", FewPictures, make, arguments=SETTINGS)
    print(results.table("setting", list(SETTINGS), COLUMNS))


if __name__ == "__main__":
    main()
