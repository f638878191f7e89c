#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Normalizing flows with and without calibration: `python benchmarks/studies/flow_study.py --fashion_mnist DATASET --output_dir STUDY`.

A flow of Fashion-MNIST at `--resolution` is trained on likelihood alone (`--pretraining_steps`), then trained further, equal
iterations, without calibration and with it. Each row has the bits per dimension of 2,000 test images, and Frechet and kernel
distance (EfficientNet-Lite0's features) of 5,000 samples against 10,000 training images. `--picture PNG` draws samples.
Rows are kept in STUDY/flow_<resolution>.jsonl and not made again.
"""

import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.command_line import RESOLUTIONS, picture_file, positive
from ecvae_diffusers import ECFlowPipeline, FlowEC
from ecvae_diffusers.metrics import lite0_features
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.folder import is_finished
from ecvae_diffusers.training.run.pictures import image_grid


NUM_REFERENCE, NUM_TEST, NUM_SAMPLES = 10_000, 2_000, 5_000
SCRIPT = "train_flow.py"


def dual(value: float) -> list[str]:
    """Fix lambda: a point of the trade-off between likelihood and samples."""
    return ["--initial_dual", str(value), "--max_dual", str(value), "--dual_learning_rate", "0"]


PLAIN, TWO_SCALES = ["--calibration", "none"], ["--energy_num_scales", "2"]
# What continues the flow that was trained on likelihood alone; None: that flow itself.
SETTINGS = {
    "as it was": None,
    "trained on": PLAIN,
    "calibrated": [],
    **{f"calibrated, lambda {value:g}": dual(value) for value in (10, 100, 200)},
    # An energy model at two scales, as in the decoders' study, and one that learns four times as fast.
    "calibrated, two scales": TWO_SCALES,
    "calibrated, lambda 200, two scales": [*dual(200), *TWO_SCALES],
    "calibrated, energy's rate 2e-3": ["--energy_learning_rate", "2e-3"],
}
# What begins anew, for as many iterations in all, at likelihood's own rate (docs/flows.md: why it is not that of calibration).
FROM_THE_START = {"plain from the start": PLAIN, "calibrated from the start": []}
NAMES = [*SETTINGS, *FROM_THE_START]
COLUMNS = {
    "bits per dimension": study.each("bits_per_dimension", ".3f"),
    "mean": study.middle("bits_per_dimension", ".3f", statistics.mean),
    "Frechet distance": study.each("frechet_distance", ".1f"),
    "median": study.middle("frechet_distance", ".1f"),
    "kernel distance": study.each("kernel_distance", ".4f"),
    "lambda": study.each("dual", ".0f"),
    "drift": study.each("drift", ".4f"),
    "rollbacks": study.each("rollbacks", "d"),
    "s per iteration": study.seconds_per_iteration,
}


class FlowData:
    """Fashion-MNIST at a resolution, over EfficientNet-Lite0's features."""

    def __init__(self, folder: Path, dataset: str, size: int, device: torch.device):
        self.device, self.name = device, f"flow_{size}"
        self.data_arguments = ["--dataset_name", dataset, "--image_column", "image"]
        levels, channels = ("2", ["32", "64", "128"]) if size <= 16 else ("3", ["16", "32", "64", "128"])
        self.size = ["--num_levels", levels, "--steps_per_level", "4", "--hidden_channels", "64"]
        self.arguments = [
            "--resolution", str(size), "--energy_block_out_channels", *channels, "--log_steps", "50",
            "--save_images_steps", "500", *study.precision(device),
        ]  # fmt: skip
        self.test = study.dataset_images(dataset, "test", NUM_TEST, size, 1)
        real = study.dataset_images(dataset, "train", NUM_REFERENCE, size, 1)
        self.metrics = study.reference(lite0_features().to(device), real, folder)
        floor = study.against(self.metrics, study.dataset_images(dataset, "test", NUM_SAMPLES, size, 1))
        self.about = (
            f"Fashion-MNIST at {size} px; {NUM_SAMPLES:,} test images are at Frechet distance "
            f"{floor['frechet_distance']:.1f}, kernel distance {floor['kernel_distance']:.4f}"
        )


@torch.no_grad()
def test_bits(flow: FlowEC, images: torch.Tensor) -> float:
    """Return bits per dimension of held-out images, with the same dequantization for every flow."""
    generator, bits = torch.Generator().manual_seed(0), []
    for part in tqdm(images.split(250), desc="Likelihood"):
        real = dequantize(to_range(part), torch.rand(part.shape, generator=generator)).to(flow.device)
        bits.append(bits_per_dimension(flow(real).log_prob, flow.num_latents))
    return torch.cat(bits).mean().item()


def measured_row(data: FlowData, folder: Path) -> dict:
    pipeline = ECFlowPipeline.from_pretrained(folder).to(data.device)
    row = study.against(data.metrics, sample_images(pipeline, NUM_SAMPLES, seed=1, batch_size=250))
    return row | {"bits_per_dimension": test_bits(pipeline.flow.eval(), data.test)} | study.logged(folder)


def picture(folders: list[Path], path: Path) -> None:
    """Draw samples of each flow, of the same latents: blocks of 8 x 8, side by side."""
    blocks = []
    for folder in folders:
        images = sample_images(ECFlowPipeline.from_pretrained(folder), 64, seed=1, batch_size=64)
        blocks.append(to_range(images).unflatten(0, (8, 8)))
    image_grid(torch.cat(blocks, dim=1).flatten(0, 1), num_columns=8 * len(blocks)).save(path)


def main() -> None:
    made = study.parser(__doc__, NAMES, "fashion_mnist")
    made.add_argument("--resolution", type=int, choices=RESOLUTIONS, default=16)
    made.add_argument("--pretraining_steps", type=positive, default=1500, help="before, on likelihood alone")
    made.add_argument("--picture", type=picture_file, help="samples of the first seed: a block per setting")
    made.add_argument(
        "--likelihood_rate", default="1e-2",
        help="learning rate of what begins anew, with a cosine schedule; 1e-2 is quick at 16 px, at 32 px some runs diverge",
    )  # fmt: skip
    args = made.parse_args()
    likelihood_rate = ["--learning_rate", args.likelihood_rate, "--lr_scheduler", "cosine"]
    results = study.Results(args.output_dir / f"flow_{args.resolution}.jsonl", NUM_SAMPLES)
    if not args.table:
        data = FlowData(args.output_dir, args.fashion_mnist, args.resolution, args.device)
        print(f"{data.about}; arguments {' '.join(data.arguments)}; {study.versions()}", flush=True)
        iterations = dict.fromkeys(SETTINGS, args.max_train_steps) | {"as it was": args.pretraining_steps}
        iterations |= dict.fromkeys(FROM_THE_START, args.pretraining_steps + args.max_train_steps)

        def make(name: str, seed: int) -> dict:
            folder = study.run_folder(args.output_dir, data.name, name, seed)
            if name in FROM_THE_START:
                own = [*data.size, *FROM_THE_START[name], *likelihood_rate]
                study.train(data, folder, seed, iterations[name], *own, script=SCRIPT)
            else:
                start = study.run_folder(args.output_dir, data.name, "as it was", seed)
                own = [*data.size, *PLAIN, *likelihood_rate]
                study.train(data, start, seed, args.pretraining_steps, *own, script=SCRIPT)
            if SETTINGS.get(name) is not None:
                own = ["--pretrained_model_name_or_path", str(start), *SETTINGS[name]]
                study.train(data, folder, seed, args.max_train_steps, *own, script=SCRIPT)
            return measured_row(data, folder)

        common = [*data.size, *data.arguments]
        pretraining = ["--pretraining_steps", str(args.pretraining_steps), *PLAIN, *likelihood_rate]
        arguments = {name: [*common, *pretraining, *(SETTINGS[name] or [])] for name in SETTINGS}
        arguments |= {name: [*common, *FROM_THE_START[name], *likelihood_rate] for name in FROM_THE_START}
        results.fill(args.settings, args.seeds, make, iterations, arguments)
    print(study.results_table(results, NAMES, "flow", COLUMNS))
    if args.picture is not None:
        folders = [study.run_folder(args.output_dir, results.path.stem, name, args.seeds[0]) for name in args.settings]
        if missing := [folder.name for folder in folders if not is_finished(folder)]:
            made.error(f"--picture needs the flows of --settings, but there is no {', '.join(missing)}.")
        picture(folders, args.picture)


if __name__ == "__main__":
    main()
