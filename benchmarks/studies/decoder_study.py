#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibrate decoders of diffusers: `python benchmarks/studies/decoder_study.py --cifar10 DATASET --output_dir STUDY`.

A small `AutoencoderKL` and a small `AutoencoderTiny` are trained on the squared error for CIFAR-10 at 32 px. Like the
autoencoders of Stable Diffusion, they have 4 latent channels at an eighth of the resolution. Then their decoders are trained
further without and with calibration, for equal iterations. The rows have the PSNR of reconstructions of 5,000 test images, and
their Frechet and kernel distance (EfficientNet-Lite0's features) to the originals. `--picture PNG` draws some. Rows are kept in
STUDY/decoder.jsonl, so an interrupted study resumes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers.atomic import replacing
from ecvae_diffusers.metrics import lite0_features, reconstruction_metrics
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.run.pictures import image_grid
from ecvae_diffusers.training.tasks.autoencoders import CalibratedDecoder


BATCH, PRETRAINING_STEPS = 32, 2_000


def kl() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, latent_channels=4, sample_size=32,
        mid_block_add_attention=False,
    )  # fmt: skip


def tiny() -> diffusers.AutoencoderTiny:
    return diffusers.AutoencoderTiny(
        # The convolutions between its levels keep the number of channels.
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, latent_channels=4,
    )  # fmt: skip


MODELS = {"AutoencoderKL": kl, "AutoencoderTiny": tiny}
# Two scales do better than one, and each weight costs PSNR (docs/results/decoders).
ENERGY = ["--calibration", "energy", "--energy_num_scales", "2", "--reconstruction_weight"]
K_1 = ["--langevin_steps", "1"]
SETTINGS = {
    "as it was": None,
    "trained on": ["--calibration", "none"],
    "calibrated": [*ENERGY, "2.5"],
    "calibrated, K 1": [*ENERGY, "2.5", *K_1],
    **{f"calibrated, K 1, reconstruction weight {w}": [*ENERGY, w, *K_1] for w in ("1", "2", "3", "4", "6")},
}
COLUMNS = {
    **study.FRECHET,
    "kernel distance": study.each("kernel_distance", ".4f"),
    "PSNR, dB": study.each("psnr", ".2f"),
    "mean": study.middle("psnr", ".2f", statistics.mean),
    "lambda": study.each("dual", ".0f"),
}


class Cifar10:
    """CIFAR-10 with the features of its test images, and the training of autoencoders on it."""

    name, num_samples = "CIFAR-10", 5_000

    def __init__(self, args: argparse.Namespace):
        self.device = args.device
        self.arguments = [
            "--resolution", "32", "--max_train_samples", "20000", "--learning_rate", "5e-4", "--lr_scheduler", "cosine",
            "--log_steps", "50", "--save_images_steps", "1000", *study.precision(args.device),
            "--train_batch_size", str(BATCH), "--energy_block_out_channels", "16", "32", "64", "128",
        ]  # fmt: skip
        self.data_arguments = ["--dataset_name", args.dataset]
        self.train = study.dataset_images(args.dataset, "train", 20_000, 32, 3)
        self.test = study.dataset_images(args.dataset, "test", self.num_samples, 32, 3)
        self.metrics = study.reference(lite0_features().to(args.device), self.test)
        self.about = f"{len(self.train):,} images"

    def pretrain(self, build: Callable[[], torch.nn.Module], folder: Path, seed: int) -> None:
        """Train an autoencoder without calibration, on the squared error and a lightly weighted KL divergence."""
        if folder.is_dir():
            return
        torch.manual_seed(seed)
        network: Any = build().train().to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, PRETRAINING_STEPS)
        batches = study.epochs(self.train, BATCH)
        for _ in tqdm(range(PRETRAINING_STEPS), desc=f"Training {type(network).__name__}"):
            real = next(batches).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cpu"):
                encoded, divergence = network.encode(real), 0.0
                if "latent_dist" in encoded:
                    latents, divergence = encoded.latent_dist.sample(), 1e-3 * encoded.latent_dist.kl().mean()
                else:
                    latents = encoded.latents
                decoded = network.decode(latents).sample.float()
            loss = (decoded - real).square().flatten(1).sum(1).mean() + divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with replacing(folder) as temporary:
            network.save_pretrained(temporary)


@torch.no_grad()
def reconstructions(decoder: CalibratedDecoder, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return reconstructions from the mode of the posterior, as uint8 images (N, C, H, W)."""
    decoder = decoder.eval().to(device)
    parts = (to_range(part.to(device)) for part in tqdm(images.split(250)))
    return torch.cat([to_uint8(decoder(decoder.encode(part))).cpu() for part in parts])


def main() -> None:
    made = study.parser(__doc__, list(SETTINGS), "cifar10")
    made.set_defaults(max_train_steps=3000)
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--picture", type=Path, help="reconstructions of the first seed: a row per setting")
    args = made.parse_args()
    names = {f"{model}, {name}": (model, name) for model in args.models for name in args.settings}
    args.settings = list(names)

    def folder_of(model: str, name: str, seed: int) -> Path:
        if SETTINGS[name] is None:
            return args.output_dir / f"{model}_{seed}"
        return study.run_folder(args.output_dir, model, name, seed)

    def load(model: str, name: str, seed: int) -> CalibratedDecoder:
        folder = folder_of(model, name, seed)
        return CalibratedDecoder(getattr(diffusers, model).from_pretrained(folder), str(folder))

    def make(data: Cifar10, setting: str, seed: int) -> dict:
        model, name = names[setting]
        start, folder = folder_of(model, "as it was", seed), folder_of(model, name, seed)
        data.pretrain(MODELS[model], start, seed)
        if SETTINGS[name] is not None:
            own = ["--pretrained_model_name_or_path", str(start), *SETTINGS[name]]
            study.train(data, folder, seed, args.max_train_steps, *own, script="calibrate_decoder.py")
        found = reconstructions(load(model, name, seed), data.test, data.device)
        psnr = reconstruction_metrics(found / 255, data.test / 255)["psnr"].mean().item()
        return study.against(data.metrics, found) | {"psnr": psnr} | study.logged(folder)

    arguments = {setting: SETTINGS[name] or [] for setting, (_, name) in names.items()}
    results = study.run(args, "decoder", Cifar10, make, arguments=arguments)
    print(results.table("decoder", [f"{model}, {name}" for model in MODELS for name in SETTINGS], COLUMNS))
    if args.picture is not None:
        rows = [study.dataset_images(args.dataset, "test", 12, 32, 3)]
        for model, name in names.values():
            rows.append(reconstructions(load(model, name, args.seeds[0]), rows[0], args.device))
        image_grid(to_range(torch.cat(rows)), num_columns=len(rows[0])).save(args.picture)


if __name__ == "__main__":
    main()
