#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train a VAE and an energy-calibrated VAE on handwritten digits, and compare what they make: `make demo`.

Both have the same autoencoder, seed, data order and number of iterations. Writes, into the output folder: the two
pipelines (`vae/`, `ecvae/`), `comparison.png` (real | VAE | EC-VAE), `interpolation.png`, `restoration.png`
(held-out digits of which half was painted over), `calibration.png` (lambda, constraint and energies while training) and
`metrics.json`.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

import ecvae_diffusers
from ecvae_diffusers import ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.atomic import write_json
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
from ecvae_diffusers.training.run.command import ArgumentParser, fail, local_path
from ecvae_diffusers.training.run.folder import locked
from ecvae_diffusers.training.run.log import METRICS_FILE, read_metrics
from ecvae_diffusers.training.run.pictures import image_grid


# Chosen by the study in benchmarks/RESULTS.md.
ARGUMENTS = ["--resolution", "16", "--latent_channels", "32", "--block_out_channels", "16", "32", "64"]
NUM_SAMPLES = 50_000


def train(output_dir: Path, data_dir: Path, calibration: str, seed: int, max_train_steps: int, *extra: str) -> None:
    """Run the training script as a user would."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", str(torch.get_num_threads()),  # Accelerate's default is one
        str(Path(__file__).with_name("train_ecvae.py")),
        "--train_data_dir", str(data_dir), "--output_dir", str(output_dir), "--overwrite_output_dir",
        "--calibration", calibration, "--seed", str(seed), "--max_train_steps", str(max_train_steps), *ARGUMENTS, *extra,
    ]  # fmt: skip
    process = subprocess.run(command)
    if process.returncode != 0:
        sys.exit(process.returncode)  # the last line says why


def labelled_row(parts: list[tuple[str, PIL.Image.Image]]) -> PIL.Image.Image:
    """Pictures side by side with a title above each."""
    gap, title = 16, 24
    width = sum(picture.width for _, picture in parts) + gap * (len(parts) - 1)
    row = PIL.Image.new("RGB", (width, title + max(picture.height for _, picture in parts)), "white")
    draw, x = PIL.ImageDraw.Draw(row), 0
    for text, picture in parts:
        draw.text((x, 4), text, fill="black", font_size=16)
        row.paste(picture.convert("RGB"), (x, title))
        x += picture.width + gap
    return row


def restore_digits(pipeline: ECVAEPipeline, clean: torch.Tensor, output_dir: Path) -> None:
    """
    Half of each held-out digit is painted over and restored: `restoration.png` has a row a digit, clean, damaged, four answers
    and how far off each pixel may be. `damaged.png` and `mask.png` are the first one's, to try it on.
    """
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[SIZE // 2 :] = 255
    damaged = clean.numpy().copy()
    damaged[:, 0, SIZE // 2 :] = 128
    pictures = [PIL.Image.fromarray(digit[0]) for digit in damaged]
    pictures[0].save(output_dir / "damaged.png")
    PIL.Image.fromarray(mask).save(output_dir / "mask.png")
    restoration = ECVAERestorationPipeline.from_pipe(pipeline)
    restoration.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = restoration(
        pictures, mask_image=PIL.Image.fromarray(mask), num_restorations=4, generator=generator, output_type="pt"
    )
    rows = [
        to_range(clean),
        to_range(torch.from_numpy(damaged)),
        *(2 * output.images - 1).unflatten(0, (-1, 4)).unbind(1),
    ]
    rows.append(2 * (4 * output.std).clamp(max=1) - 1)
    image_grid(torch.stack(rows, dim=1).flatten(0, 1), len(rows), scale=3).save(output_dir / "restoration.png")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=local_path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with locked(args.output_dir):
            compare(args)
    except (ValueError, OSError) as error:
        fail(f"demo.py: error: {error}")
    except KeyboardInterrupt:
        fail("demo.py: interrupted.")


def compare(args: argparse.Namespace) -> None:
    """Train both and compare them, where no other demo has the folder."""
    started = time.time()

    data_dir = args.output_dir / "digits"
    write_digits(data_dir)
    names = {"none": "vae", "energy": "ecvae"}
    for calibration, name in names.items():
        print(f"\n=== {name}: --calibration {calibration} ===", flush=True)
        train(args.output_dir / name, data_dir / "train", calibration, args.seed, args.max_train_steps)

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
    grids = [("real", image_grid(to_range(held_out[:64]), 8, scale=3))]
    for calibration, name in names.items():
        pipeline = ECVAEPipeline.from_pretrained(args.output_dir / name)
        samples = sample_images(pipeline, NUM_SAMPLES, seed=1)
        metrics[name] = {
            **measure(features, real, samples),
            "reconstruction_variance": pipeline.vae.config.reconstruction_variance,
        }
        title = f"{'EC-VAE' if name == 'ecvae' else 'VAE'}: {metrics[name]['frechet_distance']:.0f}"
        grids.append((title, image_grid(to_range(samples[:64]), 8, scale=3)))
    metrics["ratio"] = metrics["vae"]["frechet_distance"] / metrics["ecvae"]["frechet_distance"]

    # `pipeline` is now the calibrated one.
    ends = held_out[:16].float() / 255
    path = pipeline.interpolate(ends[:8], ends[8:], num_steps=10, output_type="pt").images
    image_grid(path * 2 - 1, 10, scale=3).save(args.output_dir / "interpolation.png")
    labelled_row(grids).save(args.output_dir / "comparison.png")
    plot_curves(read_metrics(args.output_dir / "ecvae" / METRICS_FILE), args.output_dir / "calibration.png")
    restore_digits(pipeline, held_out[:8], args.output_dir)
    metrics["seconds"] = round(time.time() - started)
    write_json(args.output_dir / "metrics.json", metrics)
    print(
        f"\nFrechet distance to the digits: VAE {metrics['vae']['frechet_distance']:.1f}, "
        f"EC-VAE {metrics['ecvae']['frechet_distance']:.1f} ({metrics['ratio']:.1f} times smaller). "
        f"Look at {args.output_dir / 'comparison.png'}."
    )


if __name__ == "__main__":
    main()
