#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure posterior calibration: `python benchmarks/studies/posterior_study.py --output_dir STUDY`; `--fashion_mnist DATASET`.

Each row trains the networks of the demo (or of Fashion-MNIST) with one value of `--calibration`, for equal iterations. It has
the evidence lower bound, the importance-weighted bound of 500 samples and the amortisation gap (the bound with q optimised per
image in 200 steps, minus that of the encoder) of held-out images, and the Frechet distance of prior samples. Rows "..., then the
encoder" continue a run for 150 iterations with its decoder frozen; rows "..., as long" have as many iterations in all. Rows are
kept in STUDY/posterior_<data>.jsonl, so an interrupted study resumes.
"""

import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.data.transforms import to_range
from studies.restoration import held_out


POSTERIOR, FEW = ["--calibration", "posterior"], ["--max_train_samples", "2000"]
# The Adam that suits likelihood. The defaults suit training with an energy model.
AVERAGING = ["--adam_beta1", "0.9", "--adam_beta2", "0.999"]
SETTINGS = {
    "none": ["--calibration", "none"],
    "posterior": POSTERIOR,
    "posterior, encoder alone": [*POSTERIOR, "--posterior_decoder_weight", "0"],
    "posterior, decoder weight 1": [*POSTERIOR, "--posterior_decoder_weight", "1"],
    "energy": ["--calibration", "energy"],
    "both": ["--calibration", "both"],
    # Few images, each seen often, so that the encoder overfits them.
    "none, 2,000 images": ["--calibration", "none", *FEW],
    "posterior, 2,000 images": [*POSTERIOR, *FEW],
    "none, averaging Adam": ["--calibration", "none", *AVERAGING],
    "posterior, averaging Adam": [*POSTERIOR, *AVERAGING],
}
ENCODER_STEPS = 150
ENCODER_ALONE = ["--freeze_decoder", *AVERAGING, "--lr_scheduler", "cosine"]
# Short second runs that train the encoder alone: the setting that they continue, and their --calibration.
THEN_THE_ENCODER = {
    "none, then the encoder": ("none", "none"),
    "posterior, then the encoder": ("posterior", "posterior"),
    "energy, then the encoder": ("energy", "posterior"),
    "none, averaging Adam, then the encoder": ("none, averaging Adam", "none"),
    "posterior, averaging Adam, then the encoder": ("posterior, averaging Adam", "posterior"),
}
# Settings that are trained for as many iterations as first and second run together.
AS_LONG = {f"{name}, as long": name for name in ("none", "none, averaging Adam")}
NAMES = [*SETTINGS, *AS_LONG, *THEN_THE_ENCODER]
COLUMNS = {
    "importance-weighted bound": study.each("importance_weighted", ".2f"),
    "its mean": study.middle("importance_weighted", ".2f", statistics.mean),
    "ELBO, mean": study.middle("elbo", ".2f", statistics.mean),
    "amortisation gap": study.each("amortisation_gap", ".2f"),
    "mean": study.middle("amortisation_gap", ".2f", statistics.mean),
    **study.FRECHET,
    "s per iteration": study.seconds_per_iteration,
}


def posterior_measures(folder: Path, images: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Return the mean bounds over held-out images, in nats per image, for a decoder variance of 1/2."""
    vae = ECVAEPipeline.from_pretrained(folder).vae.to(device)
    generator = torch.Generator(device).manual_seed(0)
    parts = tqdm(to_range(images).split(64), "Bounds")
    found = [posterior_bounds(part.to(device), vae, generator=generator) for part in parts]
    return {name: torch.cat([bounds[name] for bounds in found]).mean().item() for name in found[0]}


def main() -> None:
    args = study.parser(__doc__, NAMES).parse_args()
    iterations = {name: args.max_train_steps + (0 if name in SETTINGS else ENCODER_STEPS) for name in NAMES}
    second = {name: ["--calibration", own, *ENCODER_ALONE] for name, (_, own) in THEN_THE_ENCODER.items()}
    arguments = SETTINGS | {name: SETTINGS[longer] for name, longer in AS_LONG.items()}
    for name, (first, _) in THEN_THE_ENCODER.items():
        arguments[name] = [*SETTINGS[first], *second[name]]

    def make(data, name: str, seed: int) -> dict:
        folder = study.run_folder(args.output_dir, data.name, name, seed)
        if name in THEN_THE_ENCODER:
            first = THEN_THE_ENCODER[name][0]
            start = study.run_folder(args.output_dir, data.name, first, seed)
            study.train(data, start, seed, args.max_train_steps, *SETTINGS[first])
            own = ["--pretrained_model_name_or_path", str(start), *second[name]]
            study.train(data, folder, seed, ENCODER_STEPS, *own)
        else:
            study.train(data, folder, seed, iterations[name], *arguments[name])
        return study.trained_row(data, folder) | posterior_measures(folder, held_out(args.dataset), args.device)

    results = study.run_on_either(args, "posterior", make, iterations, arguments)
    print(results.table("calibration", NAMES, COLUMNS))


if __name__ == "__main__":
    main()
