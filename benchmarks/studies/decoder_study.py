#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibration of other people's decoders: `python benchmarks/studies/decoder_study.py --cifar10 DATASET --output_dir STUDY`.

A small `AutoencoderKL` and a small `AutoencoderTiny` of CIFAR-10 (32 px, 4 latent channels at an eighth of the resolution, 64
numbers for 3,072, as the autoencoders of Stable Diffusion have it) are trained here on the squared error. Then their decoders
are trained further, equal iterations, without calibration and with it. Measured of 5,000 test images: PSNR of the
reconstructions, and their Frechet and kernel distance (EfficientNet-Lite0's features) to the originals. `--picture PNG`
shows some. Rows are kept in STUDY/decoder.jsonl and not made again.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.command_line import picture_file, positive
from ecvae_diffusers.metrics import lite0_features, reconstruction_metrics
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.run.pictures import image_grid
from ecvae_diffusers.training.tasks.autoencoders import CalibratedDecoder


NUM_TRAIN, NUM_TEST, RESOLUTION = 20_000, 5_000, 32
PRETRAINING_FILE = "pretraining.json"


def kl() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, latent_channels=4, sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )  # fmt: skip


def tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        # Its levels are joined by convolutions that keep the number of channels.
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, latent_channels=4,
    )  # fmt: skip


MODELS = {"AutoencoderKL": kl, "AutoencoderTiny": tiny}
# Two scales did better than one (docs/generators.md); how much PSNR this weight costs is in RESULTS.md.
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
    "Frechet distance, each seed": study.each("frechet_distance", ".1f"),
    "median": study.middle("frechet_distance", ".1f"),
    "kernel distance": study.each("kernel_distance", ".4f"),
    "PSNR, dB": study.each("psnr", ".2f"),
    "mean": study.middle("psnr", ".2f", statistics.mean),
    "lambda": study.each("dual", ".0f"),
}


class Cifar10:
    """CIFAR-10, its test images' features, and the autoencoders."""

    def __init__(self, folder: Path, dataset: str, batch_size: int, energy_channels: int, device: torch.device):
        self.folder, self.device, self.batch_size = folder, device, batch_size
        self.arguments = [
            "--resolution", str(RESOLUTION), "--max_train_samples", str(NUM_TRAIN), "--learning_rate", "5e-4",
            "--lr_scheduler", "cosine", "--log_steps", "50", "--save_images_steps", "1000", *study.precision(device),
            "--train_batch_size", str(batch_size),
            "--energy_block_out_channels", *(str(factor * energy_channels) for factor in (1, 2, 4, 8)),
        ]  # fmt: skip
        self.data_arguments = ["--dataset_name", dataset]
        self.train = study.dataset_images(dataset, "train", NUM_TRAIN, RESOLUTION, 3)
        self.test = study.dataset_images(dataset, "test", NUM_TEST, RESOLUTION, 3)
        self.metrics = study.reference(lite0_features().to(device), self.test, folder)

    def pretrained(self, model: str, seed: int, num_steps: int) -> Path:
        """Return the autoencoder to begin with, trained on the squared error and a trace of the KL divergence."""
        folder = self.folder / f"{model}_{seed}"
        wanted = {"num_steps": num_steps, "batch_size": self.batch_size, "network": repr(MODELS[model]())}
        if (folder / PRETRAINING_FILE).is_file():
            if json.loads((folder / PRETRAINING_FILE).read_text(encoding="utf-8")) != wanted:
                raise ValueError(f"{folder.name} is of another network or training: choose another --output_dir.")
            return folder
        torch.manual_seed(seed)
        network = MODELS[model]().train().to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, num_steps)
        batches = study.epochs(self.train, self.batch_size)
        for _ in tqdm(range(num_steps), desc=f"Training {model}"):
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
        network.save_pretrained(folder)
        # The last: a folder without it is not finished.
        (folder / PRETRAINING_FILE).write_text(json.dumps(wanted), encoding="utf-8")
        return folder


@torch.no_grad()
def reconstructions(model: str, folder: Path, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return uint8 images, of the mode of the posterior."""
    loaded = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[model].from_pretrained(folder)
    decoder = CalibratedDecoder(loaded.eval().to(device), str(folder))
    parts = (to_range(part.to(device)) for part in tqdm(images.split(250)))
    return torch.cat([to_uint8(decoder(decoder.encode(part))).cpu() for part in parts])


def main() -> None:
    made = study.parser(__doc__, list(SETTINGS), "cifar10")
    made.set_defaults(max_train_steps=3000)
    made.add_argument("--pretraining_steps", type=positive, default=2000)
    made.add_argument("--train_batch_size", type=positive, default=32, help="of all that is trained here")
    made.add_argument("--energy_channels", type=positive, default=16, help="of the energy model's first level")
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--picture", type=picture_file, help="reconstructions of the first seed: a row per setting")
    args = made.parse_args()
    results = study.Results(args.output_dir / "decoder.jsonl", NUM_TEST)
    if not args.table or args.picture is not None:
        data = Cifar10(args.output_dir, args.cifar10, args.train_batch_size, args.energy_channels, args.device)

    def folder_of(model: str, name: str, seed: int) -> Path:
        if SETTINGS[name] is None:
            return data.pretrained(model, seed, args.pretraining_steps)
        return study.run_folder(args.output_dir, model, name, seed)

    if not args.table:
        print(f"CIFAR-10, {NUM_TRAIN:,} images; arguments {' '.join(data.arguments)}; {study.versions()}", flush=True)

        def make(setting: str, seed: int) -> dict:
            model, _, name = setting.partition(", ")
            folder = folder_of(model, name, seed)
            if SETTINGS[name] is not None:
                start = data.pretrained(model, seed, args.pretraining_steps)
                own = ["--pretrained_model_name_or_path", str(start), *SETTINGS[name]]
                study.train(data, folder, seed, args.max_train_steps, *own, script="calibrate_decoder.py")
            found = reconstructions(model, folder, data.test, data.device)
            psnr = reconstruction_metrics(found / 255, data.test / 255)["psnr"].mean().item()
            return study.against(data.metrics, found) | {"psnr": psnr} | study.logged(folder)

        pretraining = ["--pretraining_steps", str(args.pretraining_steps)]
        arguments = {
            f"{model}, {name}": [*data.arguments, *pretraining, *(SETTINGS[name] or [])]
            for model in args.models
            for name in args.settings
        }
        results.fill(list(arguments), args.seeds, make, args.max_train_steps, arguments)
    names = [f"{model}, {name}" for model in MODELS for name in SETTINGS]
    print(study.results_table(results, names, "decoder", COLUMNS))
    if args.picture is not None:
        rows = [data.test[:12]]
        for model in args.models:
            folders = [folder_of(model, name, args.seeds[0]) for name in args.settings]
            rows += [reconstructions(model, folder, rows[0], args.device) for folder in folders]
        image_grid(to_range(torch.cat(rows)), num_columns=len(rows[0])).save(args.picture)


if __name__ == "__main__":
    main()
