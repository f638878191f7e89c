#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What calibration of the posterior is worth: `python benchmarks/posterior_study.py --output_dir STUDY`; `--fashion_mnist DATASET`.

Each row trains the demo's networks (or Fashion-MNIST's) with one `--calibration`, equal iterations, and measures on held-out images
the evidence lower bound, the importance-weighted one of 500 samples and the amortisation gap (q optimised for each image in 200 steps, less
the encoder's), and of prior samples the Frechet distance. Rows "..., then the encoder" go on from such a run for `--encoder_steps` with
its decoder held still; "..., as long" have as many iterations in all. Rows that STUDY/posterior_<data>.jsonl holds already are not made again.
"""

import statistics
from pathlib import Path

import torch
from chain_study import run_folder
from command_line import positive
from restoration import held_out
from study import Results, load_data, open_results, parser, train, trained_row, versions
from tqdm import tqdm

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.data.transforms import to_range


PART = 64  # images at a time

POSTERIOR, BOTH = ["--calibration", "posterior"], ["--calibration", "both"]
ALONE = ["--posterior_decoder_weight", "0"]
# One chain, of five steps, for encoder and decoder.
LONG = ["--posterior_langevin_steps", "5", "--posterior_drift_step", "0.1", "--posterior_decoder_langevin_steps", "0"]
LONG += ["--initial_posterior_dual", "1", "--max_posterior_dual", "10"]
LAMBDA_500 = ["--initial_posterior_dual", "500", "--max_posterior_dual", "500"]
FEW = ["--max_train_samples", "2000"]
AVERAGING = ["--adam_beta1", "0.9", "--adam_beta2", "0.999"]
SETTINGS = {
    "none": ["--calibration", "none"],
    "posterior": POSTERIOR,
    "posterior, squared error": [*POSTERIOR, "--posterior_constraint", "squared_error"],
    "posterior, encoder alone": [*POSTERIOR, *ALONE],
    "posterior, decoder alone": [*POSTERIOR, "--initial_posterior_dual", "0", "--posterior_tolerance", "1e9"],
    "posterior, one long chain": [*POSTERIOR, *LONG],
    "posterior, one long chain, encoder alone": [*POSTERIOR, *LONG, *ALONE],
    "posterior, one long chain, squared error": [*POSTERIOR, *LONG, "--posterior_constraint", "squared_error"],
    # The weight of data is what it is beside as many generated images.
    "posterior, data alone": [*POSTERIOR, "--no-posterior_generated_images", *LAMBDA_500],
    "posterior, decoder weight 1": [*POSTERIOR, "--posterior_decoder_weight", "1"],
    "posterior, decoder 15 steps": [*POSTERIOR, "--posterior_decoder_langevin_steps", "15"],
    "posterior, lambda 100": [*POSTERIOR, "--initial_posterior_dual", "100", "--max_posterior_dual", "100"],
    "energy": ["--calibration", "energy"],
    "both": BOTH,
    # Few images, each seen often: where an encoder knows those it was trained on better than others.
    "none, 2,000 images": ["--calibration", "none", *FEW],
    "posterior, 2,000 images": [*POSTERIOR, *FEW],
    # The Adam that suits likelihood, not an energy model's opponent.
    "none, averaging Adam": ["--calibration", "none", *AVERAGING],
    "posterior, averaging Adam": [*POSTERIOR, *AVERAGING],
}


# A short second run, of the encoder alone: the run that it goes on from, and its own `--calibration`.
ENCODER_ALONE = ["--freeze_decoder", *AVERAGING, "--lr_scheduler", "cosine"]
THEN_THE_ENCODER = {
    "none, then the encoder": ("none", "none"),
    "posterior, then the encoder": ("posterior", "posterior"),
    "energy, then the encoder": ("energy", "posterior"),
    "none, averaging Adam, then the encoder": ("none, averaging Adam", "none"),
    "posterior, averaging Adam, then the encoder": ("posterior, averaging Adam", "posterior"),
}
# What has as many iterations in all: the setting that goes on.
AS_LONG = {f"{name}, as long": name for name in ("none", "none, averaging Adam")}
NAMES = [*SETTINGS, *AS_LONG, *THEN_THE_ENCODER]


def then_the_encoder(name: str) -> list[str]:
    """The arguments of a second run."""
    return ["--calibration", THEN_THE_ENCODER[name][1], *ENCODER_ALONE]


def posterior_measures(folder: Path, images: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Means over held-out images, nats an image, of a pixel's variance of 1/2."""
    vae = ECVAEPipeline.from_pretrained(folder).vae.to(device)
    generator = torch.Generator(device).manual_seed(0)
    parts = tqdm(to_range(images).split(PART), "Bounds")
    found = [posterior_bounds(part.to(device), vae, generator=generator) for part in parts]
    return {name: torch.cat([bounds[name] for bounds in found]).mean().item() for name in found[0]}


def table(results: Results) -> str:
    lines = [
        "| calibration | importance-weighted bound | mean | ELBO | amortisation gap | mean | Frechet distance | median | s an iteration |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        rows = results.of(name)
        if not rows:
            continue

        def listed(key: str, digits: int, rows: list[dict] = rows) -> str:
            return ", ".join(f"{row[key]:.{digits}f}" for row in rows)

        def mean(key: str, rows: list[dict] = rows) -> str:
            return f"{statistics.mean(row[key] for row in rows):.2f}"

        seconds = statistics.median(row["training_seconds"] / row.get("step", row["iterations"]) for row in rows)
        lines.append(
            f"| {name} | {listed('importance_weighted', 2)} | {mean('importance_weighted')} | {mean('elbo')} | "
            f"{listed('amortisation_gap', 2)} | {mean('amortisation_gap')} | {listed('frechet_distance', 1)} | "
            f"{statistics.median(row['frechet_distance'] for row in rows):.1f} | {seconds:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__, NAMES)
    made.add_argument("--encoder_steps", type=positive, default=150, help="of the encoder alone")
    args = made.parse_args()
    results = open_results(args, "posterior")
    if not args.table:
        data = load_data(args)
        print(f"{data.about}; arguments {' '.join(data.arguments)}; {versions()}", flush=True)
        images = held_out(args.fashion_mnist)

        def make(name: str, seed: int) -> dict:
            folder = run_folder(args.output_dir, data.name, name, seed)
            if name in THEN_THE_ENCODER:
                start = run_folder(args.output_dir, data.name, first := THEN_THE_ENCODER[name][0], seed)
                train(data, start, seed, args.max_train_steps, *SETTINGS[first])
                own = ["--pretrained_model_name_or_path", str(start), *then_the_encoder(name)]
                train(data, folder, seed, args.encoder_steps, *own, steps="--encoder_steps")
            elif name in AS_LONG:
                steps = "--max_train_steps + --encoder_steps"
                train(data, folder, seed, iterations[name], *SETTINGS[AS_LONG[name]], steps=steps)
            else:
                train(data, folder, seed, args.max_train_steps, *SETTINGS[name])
            return trained_row(data, folder) | posterior_measures(folder, images, args.device)

        arguments = {name: [*data.arguments, *own] for name, own in SETTINGS.items()}
        arguments |= {name: arguments[longer] for name, longer in AS_LONG.items()}
        for name, (first, _) in THEN_THE_ENCODER.items():
            arguments[name] = [*arguments[first], "--encoder_steps", str(args.encoder_steps), *then_the_encoder(name)]
        iterations = dict.fromkeys(SETTINGS, args.max_train_steps)
        iterations |= dict.fromkeys([*AS_LONG, *THEN_THE_ENCODER], args.max_train_steps + args.encoder_steps)
        results.fill(args.settings, args.seeds, make, iterations, arguments)
    print(table(results))


if __name__ == "__main__":
    main()
