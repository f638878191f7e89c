#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot restoration of held-out images: `python benchmarks/studies/restoration.py --ecvae RUN --vae RUN --output_dir STUDY`.

256 images of the test split (digits; Fashion-MNIST with `--fashion_mnist DATASET`), on which neither model was trained, are
restored by the EC-VAE, by the same algorithm with the uncalibrated VAE, by A^+ (with noise also the damped A_s, s = sigma^2
over the images' mean square) and by scikit-image's methods, whose weights are the best for these very images. PSNR and SSIM
are of the mean of `--num_restorations` answers, the feature distance (Frechet, against the clean images) is of single ones.
`--steps` gives the quality at 5 to 100 decoder passes, `--reliability` instead a picture of how many pixels lie within how
many standard deviations, M = 16. Rows are kept in STUDY/restoration_<data>.jsonl and not made again.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.command_line import picture_file, place, positive
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


NUM_IMAGES, NOISES = 256, (0.0, 0.05)
STEPS = (5, 10, 20, 50, 75, 100)
FACTORS = tuple(i / 10 for i in range(1, 31))


def held_out(dataset: str | None) -> torch.Tensor:
    """Return uint8 images of the test split."""
    if dataset is None:
        return load_digits()[0][NUM_TRAIN:][:NUM_IMAGES]
    return study.fashion_images(dataset, "test", NUM_IMAGES)


def plot_reliability(found: dict[tuple[str, float], list[float]], path: Path) -> None:
    """Plot the share of unknown pixels within so many standard deviations, against that of a normal distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    normal = torch.special.erf(torch.tensor(FACTORS) / 2**0.5)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in found))}
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for (name, noise_std), shares in found.items():
        label = name.replace("_", " ") + (f", noise {noise_std}" if noise_std else "")
        axis.plot(normal, shares, label=label, color=colors[name], linestyle="-" if noise_std else "--")
    axis.set(xlabel="share expected of a normal distribution", ylabel="share of pixels found")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecvae", type=place, help="pipeline's folder")
    parser.add_argument("--vae", type=place, help="that of the uncalibrated VAE")
    parser.add_argument("--no_peers", action="store_true", help="leave out A^+ y and scikit-image's methods")
    parser.add_argument("--fashion_mnist", metavar="DATASET", help="Hub id or folder: this instead of digits")
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument("--energy_weight", type=float, default=0.0)
    parser.add_argument("--steps", action="store_true", help="ours at 5 to 100 decoder passes")
    parser.add_argument("--reliability", type=picture_file, help="write this picture, of 16 answers, instead")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--noise_std", type=float, nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--num_restorations", type=positive, default=8, help="M, answers per image")
    study.add_device(parser)
    args = parser.parse_args()
    if args.ecvae is None and (args.vae is None or args.steps or args.reliability is not None):
        parser.error("--ecvae must be given, or for the rows of the VAE --vae.")
    name = "digits" if args.fashion_mnist is None else "fashion_mnist"
    images = held_out(args.fashion_mnist)
    features = train_digit_features()[0] if args.fashion_mnist is None else lite0_features()
    metrics = study.reference(features.to(args.device), images, args.output_dir)
    clean = to_range(images)
    paths = {"EC-VAE": args.ecvae, "VAE": args.vae}
    pipelines = {method: load(str(path), args.device) for method, path in paths.items() if path is not None}
    results = study.Results(args.output_dir / f"restoration_{name}.jsonl")
    print(f"{len(clean)} images of {name}; {study.versions()}", flush=True)
    tasks = [
        (noise, task) for noise in args.noise_std for task in task_names(args.tasks, tuple(clean.shape[1:]), noise)
    ]
    if args.reliability is not None:
        found = {}
        for noise_std, task_name in tasks:
            task = Task(task_name, clean, noise_std)
            if unknown_pixels(task).any():
                answers = restore(pipelines["EC-VAE"], task, 16, 32, 0, energy_weight=args.energy_weight)
                found[task_name, noise_std] = coverage(task, answers, FACTORS)
                share = found[task_name, noise_std][FACTORS.index(2.0)]
                print(f"{task_name}, noise {noise_std}: {share:.1%} within two standard deviations", flush=True)
                # After each task: the study is long.
                plot_reliability(found, args.reliability)
        return

    def row(noise_std: float, task_name: str, method: str) -> dict:
        task = Task(task_name, clean, noise_std)
        if method in ("A^+ y", "A_s y"):
            answers = as_answers(task.linear_answers()[method])
        elif method == "classical":
            found = classical(task)
            if found is None:
                return {}
            method, answers = found
        else:
            pipeline, *steps = method.split(", ")
            kwargs = {"num_inference_steps": int(steps[0].split()[0])} if steps else {}
            if pipeline == "EC-VAE":
                kwargs["energy_weight"] = args.energy_weight
            answers = restore(pipelines[pipeline], task, args.num_restorations, 64, 0, **kwargs)
        return {"noise_std": noise_std, "task": task_name, "method": method} | measures(task, answers, metrics)

    methods = [*(() if args.no_peers else ("A^+ y", "A_s y", "classical")), *pipelines]
    if args.steps:
        methods = [f"EC-VAE, {steps} steps" for steps in STEPS]
    settings = {
        f"{noise} {task} {method}": (noise, task, method)
        for noise, task in tasks
        for method in methods
        if noise > 0 or method != "A_s y"
    }
    results.fill(list(settings), [0], lambda setting, seed: row(*settings[setting]))
    print(table([one for setting in settings if "psnr" in (one := results.of(setting)[0])]))


if __name__ == "__main__":
    main()
