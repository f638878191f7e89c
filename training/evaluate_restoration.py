#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Restore a folder of images from what a list of tasks leaves of them: `python training/evaluate_restoration.py --help`.

Writes `restoration.json` (every measure, with the protocol), `restoration.md` (a table) and a picture for each noise:
clean | measured | A^+ y (with noise A_s y) | restored | uncertainty. The images should be ones that the model was not trained on.
"""

import argparse
import json
import math
import platform
import sys
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

import ecvae_diffusers
from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.metrics import GenerationMetrics
from ecvae_training.data import ImageDataset, find_images
from ecvae_training.evaluation import load_features
from ecvae_training.images import to_range
from ecvae_training.launch import keep_freed_memory
from ecvae_training.output import image_grid, save_atomically
from ecvae_training.restoration_tasks import TASKS, Task, as_answers, classical, make_operator, measures, restore


COLUMNS = {
    "psnr": ("PSNR of the mean, dB", ".2f"),
    "psnr_single": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM of the mean", ".3f"),
    "frechet_distance": ("feature distance", ".1f"),
    "residual": ("residual", ".4f"),
    "residual_of_mean": ("residual of the mean", ".4f"),
    "largest_relative_residual": ("largest relative residual", ".0e"),
    "coverage": ("within 2 std", ".1%"),
    "num_network_calls": ("calls", "d"),
    "seconds": ("s an image", ".2f"),
}
NUM_PICTURES = 8


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline: folder or Hub id.")
    parser.add_argument(
        "--baseline", help="Another pipeline, such as the same VAE without calibration, by the same algorithm."
    )
    parser.add_argument("--image_dir", required=True, help="Folder of clean images.")
    parser.add_argument("--max_images", type=int, default=256, help="So many, spread evenly over the names.")
    parser.add_argument("--output_dir", required=True, help="Where to write. Must not hold an evaluation.")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"Of {', '.join(TASKS)}. All that fit if not given."
    )
    parser.add_argument(
        "--noise_std", type=float, nargs="+", default=[0.0, 0.05], help="sigma, for images in [-1, 1]."
    )
    parser.add_argument("--num_restorations", type=int, default=8, help="M: answers to each measurement.")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[75], help="Decoder passes; a row each.")
    parser.add_argument("--method", choices=("langevin", "map"), default="langevin")
    parser.add_argument("--energy_weight", type=float, default=0.0)
    parser.add_argument("--classical", action="store_true", help="scikit-image's methods too, where it has one.")
    parser.add_argument("--features", default="lite0", help="'lite0', 'inception' or a vision model of transformers.")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Measurements restored together, with all their answers."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    for name in ("max_images", "num_restorations", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}.")
    if min(args.num_inference_steps) < 1:
        parser.error(f"--num_inference_steps must be at least 1, but is {args.num_inference_steps}.")
    if not all(0 <= noise_std < 1 for noise_std in args.noise_std):
        parser.error(
            "--noise_std must be at least 0 and below 1, for images in [-1, 1] (of 8-bit levels a 127.5th), but is "
            f"{args.noise_std}."
        )
    if not 0 <= args.energy_weight < math.inf:
        parser.error(f"--energy_weight must be a finite number of at least 0, but is {args.energy_weight}.")
    if not Path(args.image_dir).is_dir():
        parser.error(f"--image_dir must be a folder of images, but {args.image_dir!r} is no folder.")
    if (Path(args.output_dir) / "restoration.json").exists():
        parser.error(f"--output_dir {args.output_dir!r} holds a restoration.json: give another folder.")
    if args.classical:
        try:
            import skimage  # noqa: F401
        except ImportError:
            parser.error("--classical needs: pip install 'ecvae-diffusers[restoration]'.")
    return args


def load_clean(image_dir: str, count: int, size: int, channels: int) -> torch.Tensor:
    """Images spread evenly over the folder's names, resized to the model's size, in [-1, 1]."""
    files = find_images(Path(image_dir), None)
    if not files:
        raise ValueError(f"--image_dir must hold images, but {image_dir!r} holds none.")
    count = min(count, len(files))
    files = [files[i * len(files) // count] for i in range(count)]
    images = ImageDataset([{"image": {"path": str(path), "bytes": None}} for path in files], size, channels)
    return to_range(torch.stack([images[i] for i in range(len(images))]))


def load(name: str, device: str | torch.device) -> ECVAERestorationPipeline:
    """A pipeline for very many decoder passes: on a CPU this layout, and memory that is kept, take a third off their time."""
    pipeline = ECVAERestorationPipeline.from_pretrained(name).to(device)
    pipeline.vae.to(memory_format=torch.channels_last)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def task_names(asked: list[str] | None, image_shape: tuple[int, int, int], noise_std: float) -> list[str]:
    """Those asked for, or all that fit such images and have something to do: without noise there is nothing to denoise."""
    if asked is not None:
        return asked
    names = []
    for name in TASKS:
        try:
            make_operator(name, image_shape).measurement_shape(image_shape)
        except ValueError:
            continue
        if name != "denoising" or noise_std > 0:
            names.append(name)
    return names


def table(rows: list[dict]) -> str:
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    lines = ["| noise | task | method | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for row in rows:
        cells = [format(row[key], spec) if key in row else "" for key, (_, spec) in columns.items()]
        lines.append(
            f"| {row['noise_std']:g} | {row['task'].replace('_', ' ')} | {row['method']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    pipelines = {"ours": load(args.pretrained_model_name_or_path, args.device)}
    if args.baseline is not None:
        pipelines["baseline"] = load(args.baseline, args.device)
    config = pipelines["ours"].vae.config
    clean = load_clean(args.image_dir, args.max_images, config.sample_size, config.in_channels)
    metrics = GenerationMetrics(load_features(args.features, torch.device(args.device)))
    metrics.update(((clean + 1) * 127.5).round().byte(), real=True)
    settings = {"method": args.method, "energy_weight": args.energy_weight}
    pictures, rows, shape = {}, [], tuple(clean.shape[1:])
    output_dir.mkdir(parents=True, exist_ok=True)
    todo = [(noise, name) for noise in args.noise_std for name in task_names(args.tasks, shape, noise)]
    for noise_std, name in tqdm(todo, desc="Tasks"):
        task = Task(name, clean, noise_std, args.seed)
        linear = task.linear_answers()
        found = {method: as_answers(images) for method, images in linear.items()}
        if args.classical and (peer := classical(task)) is not None:
            found[peer[0]] = peer[1]
        for method, pipeline in pipelines.items():
            for steps in args.num_inference_steps:
                label = method if len(args.num_inference_steps) == 1 else f"{method}, {steps} steps"
                found[label] = restore(
                    pipeline,
                    task,
                    args.num_restorations,
                    args.batch_size,
                    args.seed,
                    num_inference_steps=steps,
                    **settings,
                )
        for method, answers in found.items():
            rows.append({"noise_std": noise_std, "task": name, "method": method} | measures(task, answers, metrics))
        ours = next(answers for method, answers in found.items() if method.startswith("ours"))
        columns = (task.clean, task.shown(), list(linear.values())[-1], ours.single, ours.std.clamp(0, 1) * 2 - 1)
        pictures.setdefault(noise_std, []).extend(torch.stack(columns, dim=1)[:NUM_PICTURES].flatten(0, 1))
        protocol = {
            "arguments": vars(args),
            "num_images": len(clean),
            "features": metrics.features.name,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "ecvae_diffusers": ecvae_diffusers.__version__,
            "machine": platform.machine(),
        }
        (output_dir / "restoration.json").write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=2) + "\n")
        (output_dir / "restoration.md").write_text(table(rows))
    for noise_std, parts in pictures.items():
        grid = image_grid(torch.stack(parts), num_columns=5 * max(1, NUM_PICTURES // 2), scale=2)
        save_atomically(grid, output_dir / f"restoration_noise-{noise_std:g}.png")
    print(table(rows))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
