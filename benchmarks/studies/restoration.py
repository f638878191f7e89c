#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Restore held-out images: `python benchmarks/studies/restoration.py --ecvae RUN --vae RUN --output_dir STUDY`.

The data are 256 test images of digits, of Fashion-MNIST with `--fashion_mnist DATASET`, or of CIFAR-10 with `--cifar10 DATASET`. No model
was trained on them. They are restored by the EC-VAE, by the same algorithm with the uncalibrated VAE, by DDNM+ with the diffusion model of
`--ddpm`, by A^+ (with noise also by A_s, damped by s = sigma^2 over the mean square of the images), and by scikit-image's methods, whose
weights are the best for these images.
PSNR and SSIM belong to the mean of `--num_restorations` answers. The feature distance (Frechet, to the clean images) belongs to
single answers. `--steps` measures 5 to 100 decoder passes. `--reliability` only plots the share of pixels within a number of
standard deviations, from 16 answers. Rows are kept in STUDY/restoration_<data>.jsonl, so an interrupted study resumes.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DDIMPipeline
from matplotlib.figure import Figure


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.ddnm import ddnm
from common.machine import machine
from ecvae_diffusers.evaluation.evaluate_restoration import load, table, task_names
from ecvae_diffusers.evaluation.restoration import (
    Task,
    as_answers,
    classical,
    coverage,
    measures,
    restore,
    unknown_pixels,
)
from ecvae_diffusers.metrics import lite0_features
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits, train_digit_features
from ecvae_diffusers.training.data.transforms import to_range


DDNM = "DDNM+"
NUM_IMAGES, NOISES = 256, (0.0, 0.05)
STEPS = (5, 10, 20, 50, 75, 100)
FACTORS = tuple(i / 10 for i in range(1, 31))


def held_out(name: str, dataset: str | None) -> torch.Tensor:
    """Return uint8 images (N, C, H, W) of the test split."""
    if dataset is None:
        return load_digits()[0][NUM_TRAIN:][:NUM_IMAGES]
    if name == "cifar10":
        return study.dataset_images(dataset, "test", NUM_IMAGES, 32, 3)
    return study.fashion_images(dataset, "test", NUM_IMAGES)


def plot_reliability(found: dict[tuple[str, float], list[float]], path: Path) -> None:
    """Plot the share of unknown pixels within each number of standard deviations against that of a normal distribution."""
    normal = torch.special.erf(torch.tensor(FACTORS) / 2**0.5)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in found))}
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for (name, noise_std), shares in found.items():
        label = name.replace("_", " ") + (f", noise {noise_std}" if noise_std else "")
        axis.plot(normal, shares, label=label, color=colors[name], linestyle="-" if noise_std else "--")
    axis.set(xlabel="share expected of a normal distribution", ylabel="share of pixels found")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecvae", help="folder of the EC-VAE's pipeline")
    parser.add_argument("--vae", help="folder of the uncalibrated VAE's pipeline")
    parser.add_argument("--ddpm", help="folder of a diffusion model, as DDIMPipeline loads it")
    for name in ("fashion_mnist", "cifar10"):
        parser.add_argument(f"--{name}", metavar="DATASET", help="Hub id or folder, to use instead of digits")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", action="store_true", help="measure the EC-VAE at 5 to 100 decoder passes")
    parser.add_argument("--reliability", type=Path, help="only write this plot, from 16 answers per image")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--noise_std", type=float, nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--ddnm_steps", type=int, default=100, help="passes of the diffusion model per answer")
    parser.add_argument("--num_restorations", type=int, default=8, help="answers per image")
    study.add_device(parser)
    args = parser.parse_args()
    if args.ecvae is None and (args.steps or args.reliability is not None):
        parser.error("--steps and --reliability require --ecvae.")
    name = "fashion_mnist" if args.fashion_mnist else "cifar10" if args.cifar10 else "digits"
    dataset = args.fashion_mnist or args.cifar10
    images = held_out(name, dataset)
    clean = to_range(images)
    paths = {"EC-VAE": args.ecvae, "VAE": args.vae}
    pipelines = {method: load(path, args.device) for method, path in paths.items() if path is not None}
    print(f"{len(clean)} images of {name}; {machine(args.device)}", flush=True)
    shape = tuple(clean.shape[1:])
    tasks = [(noise, task) for noise in args.noise_std for task in task_names(args.tasks, shape, noise)]
    if args.reliability is not None:
        found = {}
        for noise_std, task_name in tasks:
            task = Task(task_name, clean, noise_std)
            if unknown_pixels(task).any():
                answers = restore(pipelines["EC-VAE"], task, 16, 32, seed=0)
                found[task_name, noise_std] = coverage(task, answers, FACTORS)
                share = found[task_name, noise_std][FACTORS.index(2.0)]
                print(f"{task_name}, noise {noise_std}: {share:.1%} within two standard deviations", flush=True)
                # After each task, since the study is long.
                plot_reliability(found, args.reliability)
        return
    features = train_digit_features()[0] if dataset is None else lite0_features()
    diffusion = None if args.ddpm is None else DDIMPipeline.from_pretrained(args.ddpm)
    metrics = study.reference(features.to(args.device), images)
    results = study.Results(args.output_dir / f"restoration_{name}.jsonl")

    def row(setting: str, seed: int) -> dict:
        noise_std, task_name, method = settings[setting]
        task = Task(task_name, clean, noise_std)
        if method in ("A^+ y", "A_s y"):
            answers = as_answers(task.linear_answers()[method])
        elif method == "classical":
            found = classical(task)
            if found is None:
                return {}
            method, answers = found
        elif method == DDNM:
            answers = ddnm(diffusion, task, args.num_restorations, args.ddnm_steps)
        else:
            pipeline, _, steps = method.partition(", ")
            kwargs = {"num_inference_steps": int(steps.split()[0])} if steps else {}
            answers = restore(pipelines[pipeline], task, args.num_restorations, 64, seed=0, **kwargs)
        return {"noise_std": noise_std, "task": task_name, "method": method} | measures(task, answers, metrics)

    methods = ["A^+ y", "A_s y", "classical", *pipelines, *([] if diffusion is None else [DDNM])]
    if args.steps:
        methods = [f"EC-VAE, {steps} steps" for steps in STEPS]
    rows = [(noise, task, method) for noise, task in tasks for method in methods if noise > 0 or method != "A_s y"]
    settings = {f"{noise} {task} {method}": (noise, task, method) for noise, task, method in rows}
    steps = {setting: args.ddnm_steps if method == DDNM else None for setting, (_, _, method) in settings.items()}
    results.fill(list(settings), [0], row, num_restorations=args.num_restorations, ddnm_steps=steps)
    print(table([one for setting in settings if "psnr" in (one := results.of(setting)[0])]))


if __name__ == "__main__":
    main()
