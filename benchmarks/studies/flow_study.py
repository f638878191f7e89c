#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train flows with and without calibration: `python benchmarks/studies/flow_study.py --fashion_mnist DATASET --output_dir STUDY`.

A flow for Fashion-MNIST at `--resolution` is trained on likelihood alone for 1,500 iterations, then trained further without
and with calibration, for equal iterations. Each row has the bits per dimension of 2,000 test images, and the Frechet and kernel
distance (EfficientNet-Lite0's features) of 5,000 samples to 10,000 training images. `--picture PNG` draws samples. Rows are kept
in STUDY/flow_<resolution>.jsonl, so an interrupted study resumes.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import ECFlowPipeline, FlowEC
from ecvae_diffusers.metrics import lite0_features
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.pictures import image_grid


PRETRAINING_STEPS = 1_500


def dual(value: float) -> list[str]:
    """Return the arguments that fix lambda, which trades likelihood for samples."""
    return ["--initial_dual", str(value), "--max_dual", str(value), "--dual_learning_rate", "0"]


PLAIN, TWO_SCALES = ["--calibration", "none"], ["--energy_num_scales", "2"]
# Arguments of runs that continue the flow trained on likelihood alone. `None` is that flow itself.
SETTINGS = {
    "as it was": None,
    "trained on": PLAIN,
    "calibrated": [],
    **{f"calibrated, lambda {value:g}": dual(value) for value in (10, 100, 200)},
    # An energy model at two scales, as in decoder_study.py, and one that learns four times as fast.
    "calibrated, two scales": TWO_SCALES,
    "calibrated, lambda 200, two scales": [*dual(200), *TWO_SCALES],
    "calibrated, energy's rate 2e-3": ["--energy_learning_rate", "2e-3"],
}
# Runs from scratch, for as many iterations in all, with the learning rate that suits likelihood (see docs/guides/flows.md).
FROM_THE_START = {"plain from the start": PLAIN, "calibrated from the start": []}
NAMES = [*SETTINGS, *FROM_THE_START]
COLUMNS = {
    "bits per dimension": study.each("bits_per_dimension", ".3f"),
    "mean": study.middle("bits_per_dimension", ".3f", statistics.mean),
    **study.FRECHET,
    "kernel distance": study.each("kernel_distance", ".4f"),
    "lambda": study.each("dual", ".0f"),
    "drift": study.each("drift", ".4f"),
    "rollbacks": study.each("rollbacks", "d"),
    "s per iteration": study.seconds_per_iteration,
}


class FlowData:
    """Fashion-MNIST at a resolution, over EfficientNet-Lite0's features."""

    num_samples = 5_000

    def __init__(self, args: argparse.Namespace):
        images = functools.partial(study.dataset_images, args.dataset, resolution=args.resolution, channels=1)
        self.device, self.name = args.device, f"flow_{args.resolution}"
        self.data_arguments = ["--dataset_name", args.dataset, "--image_column", "image"]
        channels = ["32", "64", "128"] if args.resolution <= 16 else ["16", "32", "64", "128"]
        self.arguments = [
            "--resolution", str(args.resolution), "--energy_block_out_channels", *channels,
            "--log_steps", "50", "--save_images_steps", "500", *study.precision(args.device),
        ]  # fmt: skip
        self.test = images("test", 2_000)
        self.metrics = study.reference(lite0_features().to(args.device), images("train", 10_000))
        self.about = f"test images are at {study.distances(self.metrics, images('test', self.num_samples))}"


@torch.no_grad()
def test_bits(flow: FlowEC, images: torch.Tensor) -> float:
    """Return the mean bits per dimension of held-out images, with the same dequantization for every flow."""
    generator, bits = torch.Generator().manual_seed(0), []
    for part in tqdm(images.split(250), desc="Likelihood"):
        real = dequantize(to_range(part), torch.rand(part.shape, generator=generator)).to(flow.device)
        bits.append(bits_per_dimension(flow(real).log_prob, flow.num_latents))
    return torch.cat(bits).mean().item()


def picture(folders: list[Path], path: Path) -> None:
    """Draw samples of each flow from the same latents, as blocks of 8 x 8, side by side."""
    blocks = []
    for folder in folders:
        images = sample_images(ECFlowPipeline.from_pretrained(folder), 64, seed=1, batch_size=64)
        blocks.append(to_range(images).unflatten(0, (8, 8)))
    image_grid(torch.cat(blocks, dim=1).flatten(0, 1), num_columns=8 * len(blocks)).save(path)


def main() -> None:
    made = study.parser(__doc__, NAMES, "fashion_mnist")
    made.add_argument("--resolution", type=int, choices=(16, 32), default=16)
    made.add_argument("--picture", type=Path, help="samples of the first seed: a block per setting")
    made.add_argument(
        "--likelihood_rate", default="1e-2",
        help="learning rate of runs from scratch, with a cosine schedule; at 32 px, some runs diverge at 1e-2",
    )  # fmt: skip
    args = made.parse_args()
    study_name, levels = f"flow_{args.resolution}", "2" if args.resolution <= 16 else "3"
    new = [
        "--num_levels", levels, "--steps_per_level", "4", "--hidden_channels", "64",
        "--learning_rate", args.likelihood_rate, "--lr_scheduler", "cosine",
    ]  # fmt: skip
    iterations = dict.fromkeys(SETTINGS, args.max_train_steps) | {"as it was": PRETRAINING_STEPS}
    iterations |= dict.fromkeys(FROM_THE_START, PRETRAINING_STEPS + args.max_train_steps)

    def folder_of(name: str, seed: int) -> Path:
        return study.run_folder(args.output_dir, study_name, name, seed)

    def make(data: FlowData, name: str, seed: int) -> dict:
        first, folder = name if name in FROM_THE_START else "as it was", folder_of(name, seed)
        start, own = folder_of(first, seed), FROM_THE_START.get(first, PLAIN)
        study.train(data, start, seed, iterations[first], *new, *own, script="train_flow.py")
        if SETTINGS.get(name) is not None:
            own = ["--pretrained_model_name_or_path", str(start), *SETTINGS[name]]
            study.train(data, folder, seed, args.max_train_steps, *own, script="train_flow.py")
        pipeline = ECFlowPipeline.from_pretrained(folder).to(data.device)
        row = study.against(data.metrics, sample_images(pipeline, data.num_samples, seed=1, batch_size=250))
        return row | {"bits_per_dimension": test_bits(pipeline.flow.eval(), data.test)} | study.logged(folder)

    arguments = {name: [*new, *(own or [])] for name, own in (SETTINGS | FROM_THE_START).items()}
    results = study.run(args, study_name, FlowData, make, iterations, arguments)
    print(results.table("flow", NAMES, COLUMNS))
    if args.picture is not None:
        picture([folder_of(name, args.seeds[0]) for name in args.settings], args.picture)


if __name__ == "__main__":
    main()
