#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train a smaller decoder for the same latents: `python benchmarks/studies/small_decoder.py --cifar10 DATASET --output_dir STUDY`.

A small `AutoencoderKL` is trained on CIFAR-10 at 32 px, with 4 latent channels at a quarter of the resolution. Then
`calibrate_decoder.py --decoder_config` trains an `AutoencoderTiny` for its latents, without and with calibration, for equal
iterations. The rows have the decoder's parameters, its time per image as a ratio to the old decoder's, the PSNR of
reconstructions of 5,000 test images, and their distances to the originals, as `decoder_study.py` measures them. `--picture PNG`
draws some. Rows are kept in STUDY/small_decoder.jsonl, so an interrupted study resumes.
"""

import sys
import time
from pathlib import Path

import diffusers
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.metrics import reconstruction_metrics
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.pictures import image_grid
from ecvae_diffusers.training.tasks.autoencoders import CalibratedDecoder
from ecvae_diffusers.training.tasks.distillation import StudentDecoder
from studies.decoder_study import BATCH, ENERGY, K_1, Cifar10, reconstructions


RATE = ["--learning_rate", "1e-3"]
SETTINGS = {
    "old decoder": None,
    "new decoder, without calibration": ["--calibration", "none", *RATE],
    **{
        f"new decoder, calibrated, reconstruction weight {weight}": [
            *ENERGY,
            weight,
            *K_1,
            *RATE,
            "--distillation_weight",
            weight,
        ]
        for weight in ("1", "2", "4")
    },
}
COLUMNS = {
    "parameters": study.middle("parameters", ",.0f"),
    "time per image": study.middle("time_ratio", ".2f"),
    **study.FRECHET,
    "kernel distance": study.each("kernel_distance", ".4f"),
    "PSNR, dB": study.each("psnr", ".2f"),
    "lambda": study.each("dual", ".0f"),
}
ROUNDS = 20


def old() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, latent_channels=4, sample_size=32,
        mid_block_add_attention=False,
    )  # fmt: skip


def new() -> diffusers.AutoencoderTiny:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(28,) * 3, decoder_block_out_channels=(28,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3, latent_channels=4, scaling_factor=old().config.scaling_factor,
    )  # fmt: skip


@torch.no_grad()
def time_ratio(autoencoder: torch.nn.Module, other: torch.nn.Module, device: torch.device) -> float:
    """Return the time that `autoencoder` takes to decode a batch over that of `other`, run alternately."""
    latents, spent = torch.randn(BATCH, 4, 8, 8, device=device), [0.0, 0.0]
    for round in range(ROUNDS + 1):
        for which, network in enumerate((autoencoder, other)):
            started = time.perf_counter()
            network.decode(latents).sample.sum().item()
            if round > 0:  # the first one warms up
                spent[which] += time.perf_counter() - started
    return spent[0] / spent[1]


def main() -> None:
    made = study.parser(__doc__, list(SETTINGS), "cifar10")
    made.set_defaults(max_train_steps=3000)
    made.add_argument("--picture", type=Path, help="reconstructions of the first seed: a row per setting")
    args = made.parse_args()

    def folder_of(name: str, seed: int) -> Path:
        if SETTINGS[name] is None:
            return args.output_dir / f"old_{seed}"
        return study.run_folder(args.output_dir, "new", name, seed)

    def load(name: str, seed: int) -> CalibratedDecoder:
        start = folder_of("old decoder", seed)
        teacher = CalibratedDecoder(diffusers.AutoencoderKL.from_pretrained(start), str(start))
        if SETTINGS[name] is None:
            return teacher
        return StudentDecoder(teacher, diffusers.AutoencoderTiny.from_pretrained(folder_of(name, seed)))

    def make(data: Cifar10, name: str, seed: int) -> dict:
        start = folder_of("old decoder", seed)
        data.pretrain(old, start, seed)
        if SETTINGS[name] is not None:
            config = args.output_dir / "new.json"
            write_text(config, new().to_json_string())
            own = ["--pretrained_model_name_or_path", str(start), "--decoder_config", str(config), *SETTINGS[name]]
            study.train(data, folder_of(name, seed), seed, args.max_train_steps, *own, script="calibrate_decoder.py")
        decoder = load(name, seed)
        found = reconstructions(decoder, data.test, data.device)
        psnr = reconstruction_metrics(found / 255, data.test / 255)["psnr"].mean().item()
        network, other = (each.autoencoder.eval() for each in (decoder, load("old decoder", seed).to(data.device)))
        about = {
            "parameters": sum(weight.numel() for weight in network.decoder.parameters()),
            "time_ratio": time_ratio(network, other, data.device),
        }
        return study.against(data.metrics, found) | about | {"psnr": psnr} | study.logged(folder_of(name, seed))

    arguments = {name: own or [] for name, own in SETTINGS.items()}
    results = study.run(args, "small_decoder", Cifar10, make, arguments=arguments)
    print(results.table("decoder", list(SETTINGS), COLUMNS))
    if args.picture is not None:
        rows = [study.dataset_images(args.dataset, "test", 12, 32, 3)]
        rows += [reconstructions(load(name, args.seeds[0]), rows[0], args.device) for name in args.settings]
        image_grid(to_range(torch.cat(rows)), len(rows[0]), scale=2).save(args.picture)


if __name__ == "__main__":
    main()
