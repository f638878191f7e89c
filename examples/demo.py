#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train a VAE and an energy-calibrated VAE on handwritten digits, and compare their samples: `make demo`.

Both have the same autoencoder, seed, data order and number of iterations. The output folder gets the two pipelines
(`vae/`, `ecvae/`), `comparison.png` (real | VAE | EC-VAE), `interpolation.png`, `restoration.png` (held-out digits whose
lower half was painted over), `calibration.png` (lambda, constraint, drift and energy gap during training) and
`metrics.json`.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import PIL.Image
import PIL.ImageDraw
import torch

import ecvae_diffusers
from ecvae_diffusers import ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.atomic import write_json
from ecvae_diffusers.command import ArgumentParser
from ecvae_diffusers.report.curves import plot_curves
from ecvae_diffusers.training.data.digits import (
    NUM_TRAIN,
    SIZE,
    load_digits,
    measure,
    sample_images,
    train_digit_features,
    write_digits,
)
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.log import METRICS_FILE, read_metrics
from ecvae_diffusers.training.run.pictures import image_grid


# The networks of the studies in docs/results/digits.
ARGUMENTS = ["--resolution", "16", "--latent_channels", "32", "--block_out_channels", "16", "32", "64"]
NUM_SAMPLES = 50_000


def train(output_dir: Path, data_dir: Path, calibration: str, args: argparse.Namespace) -> None:
    """Train in a separate process, as the command `ecvae train` does."""
    print(f"\n=== {output_dir.name}: --calibration {calibration} ===", flush=True)
    command = [
        sys.executable, "-m", "ecvae_diffusers.training.train_ecvae", "--train_data_dir", data_dir, "--output_dir", output_dir,
        "--overwrite_output_dir", "--calibration", calibration, "--seed", args.seed, "--max_train_steps", args.max_train_steps,
    ]  # fmt: skip
    process = subprocess.run([*map(str, command), *ARGUMENTS])
    if process.returncode != 0:
        sys.exit(process.returncode)  # the last line says why


def labelled_row(parts: dict[str, PIL.Image.Image]) -> PIL.Image.Image:
    """Place pictures of one size side by side, with a title above each."""
    size = next(iter(parts.values())).size
    row = PIL.Image.new("RGB", (len(parts) * (size[0] + 16) - 16, size[1] + 24), "white")
    draw = PIL.ImageDraw.Draw(row)
    for i, (title, picture) in enumerate(parts.items()):
        draw.text((i * (size[0] + 16), 4), title, fill="black", font_size=16)
        row.paste(picture.convert("RGB"), (i * (size[0] + 16), 24))
    return row


def restore_digits(pipeline: ECVAEPipeline, clean: torch.Tensor, output_dir: Path) -> None:
    """
    Paint over the lower half of held-out digits and restore them. `restoration.png` has one row per digit: clean, damaged, four
    answers, and their standard deviation per pixel. `damaged.png` and `mask.png` belong to the first digit, to try restoration.
    """
    damaged = clean.clone()
    damaged[:, :, SIZE // 2 :] = 128
    pictures = [PIL.Image.fromarray(digit.numpy()) for digit in damaged[:, 0]]
    mask = PIL.Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, SIZE // 2, SIZE, SIZE))
    pictures[0].save(output_dir / "damaged.png")
    mask.save(output_dir / "mask.png")
    restoration = ECVAERestorationPipeline.from_pipe(pipeline)
    restoration.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = restoration(pictures, mask_image=mask, num_restorations=4, generator=generator, output_type="pt")
    answers = (2 * output.images - 1).unflatten(0, (-1, 4)).unbind(1)
    columns = [to_range(clean), to_range(damaged), *answers, 2 * (4 * output.std).clamp(max=1) - 1]
    image_grid(torch.stack(columns, 1).flatten(0, 1), len(columns), scale=3).save(output_dir / "restoration.png")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started, output_dir = time.time(), args.output_dir
    write_digits(output_dir / "digits")
    train(output_dir / "vae", output_dir / "digits" / "train", "none", args)
    train(output_dir / "ecvae", output_dir / "digits" / "train", "energy", args)

    print("\n=== comparison ===", flush=True)
    features, accuracy = train_digit_features()
    digits = load_digits()[0]
    real, held_out = digits[:NUM_TRAIN], digits[NUM_TRAIN:]
    metrics = {
        "protocol": {
            "features": f"64 features of a digit classifier ({accuracy:.1%} on held-out digits)",
            "samples": NUM_SAMPLES,
            "reference": f"{NUM_TRAIN} training digits",
            "iterations": args.max_train_steps,
            "seed": args.seed,
            "versions": {
                "ecvae_diffusers": ecvae_diffusers.__version__,
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
        "held_out_digits": measure(features, real, held_out),
    }
    grids = {"real": image_grid(to_range(held_out[:64]), 8, scale=3)}
    for name, title in (("vae", "VAE"), ("ecvae", "EC-VAE")):
        pipeline = ECVAEPipeline.from_pretrained(output_dir / name)
        samples = sample_images(pipeline, NUM_SAMPLES, seed=1)
        metrics[name] = measure(features, real, samples)
        metrics[name]["reconstruction_variance"] = pipeline.vae.config.reconstruction_variance
        grids[f"{title}: {metrics[name]['frechet_distance']:.0f}"] = image_grid(to_range(samples[:64]), 8, scale=3)
    distances = [metrics[name]["frechet_distance"] for name in ("vae", "ecvae")]
    metrics["ratio"] = distances[0] / distances[1]

    # `pipeline` is now the calibrated one.
    ends = held_out[:16].float() / 255
    path = pipeline.interpolate(ends[:8], ends[8:], num_steps=10, output_type="pt").images
    image_grid(path * 2 - 1, 10, scale=3).save(output_dir / "interpolation.png")
    labelled_row(grids).save(output_dir / "comparison.png")
    plot_curves(read_metrics(output_dir / "ecvae" / METRICS_FILE), output_dir / "calibration.png")
    restore_digits(pipeline, held_out[:8], output_dir)
    metrics["seconds"] = round(time.time() - started)
    write_json(output_dir / "metrics.json", metrics)
    print(
        f"\nFrechet distance to the digits: VAE {distances[0]:.1f}, EC-VAE {distances[1]:.1f} "
        f"({metrics['ratio']:.1f} times smaller). Look at {output_dir / 'comparison.png'}."
    )


if __name__ == "__main__":
    main()
