#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot restoration of held-out images: `python benchmarks/restoration.py --ecvae RUN --vae RUN --output_dir STUDY`.

256 images of the test split (digits; Fashion-MNIST with `--fashion_mnist DATASET`), which neither model was trained on, by the EC-VAE,
by the same algorithm with the uncalibrated VAE, by A^+ (with noise also the damped A_s, s = sigma^2 over the images' mean square) and by scikit-image's methods, whose weights are the best for these very images. PSNR and SSIM are of the mean of `--num_restorations` answers, feature distance
(Frechet, single answers against the clean images) of the first. `--steps` gives the quality at 5 to 100 decoder passes, `--reliability` instead a picture of
how many pixels lie within how many standard deviations, M = 16. Rows that STUDY/restoration_<data>.jsonl holds already are not made again.
"""

import argparse
from pathlib import Path

import torch
from command_line import picture_file, place, positive, source
from study import FashionMNIST, RememberedFeatures, Results, add_device, reference, versions  # and finds training/

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
    """uint8 images of the test split."""
    if dataset is None:
        return load_digits()[0][NUM_TRAIN:][:NUM_IMAGES]
    from datasets import load_dataset

    rows = load_dataset(dataset, split="test").with_format("torch").shuffle(seed=0).select(range(NUM_IMAGES))
    return torch.stack([row["image"].view(1, 32, 32) for row in rows])


def reliability(found: dict[tuple[str, float], list[float]], path: Path) -> None:
    """The share of unknown pixels within so many standard deviations, against that of a normal distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    normal = torch.special.erf(torch.tensor(FACTORS) / 2**0.5)
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in found))}
    for (name, noise_std), shares in found.items():
        label = name.replace("_", " ") + (f", noise {noise_std}" if noise_std else "")
        axis.plot(normal, shares, label=label, color=colors[name], linestyle="-" if noise_std else "--")
    axis.set(xlabel="share expected of a normal distribution", ylabel="share of pixels found")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecvae", type=source, help="pipeline's folder")
    parser.add_argument("--vae", type=source, help="that of the uncalibrated VAE")
    parser.add_argument("--no_peers", action="store_true", help="leave out A^+ y and scikit-image's methods")
    parser.add_argument(
        "--fashion_mnist", type=source, metavar="DATASET", help="Hub id or folder: this instead of digits"
    )
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument("--energy_weight", type=float, default=0.0)
    parser.add_argument("--steps", action="store_true", help="ours at 5 to 100 decoder passes")
    parser.add_argument("--reliability", type=picture_file, help="write this picture, of 16 answers, instead")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--noise_std", type=float, nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--num_restorations", type=positive, default=8, help="M, answers an image")
    add_device(parser)
    args = parser.parse_args()
    if args.ecvae is None and (args.vae is None or args.steps or args.reliability is not None):
        parser.error("--ecvae must be given, or for the rows of the VAE --vae.")
    name = "digits" if args.fashion_mnist is None else FashionMNIST.name
    images = held_out(args.fashion_mnist)
    features = (train_digit_features()[0] if args.fashion_mnist is None else lite0_features()).to(args.device)
    metrics = reference(RememberedFeatures(features, args.output_dir / "features"), images)
    metrics.features = features
    clean = to_range(images)
    paths = {"EC-VAE": args.ecvae, "VAE": args.vae}
    pipelines = {method: load(path, args.device) for method, path in paths.items() if path is not None}
    results = Results(args.output_dir / f"restoration_{name}.jsonl")
    print(f"{len(clean)} images of {name}; {versions()}", flush=True)

    def all_tasks(noise_std: float) -> list[str]:
        return task_names(args.tasks, tuple(clean.shape[1:]), noise_std)

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

    methods = (
        [f"EC-VAE, {steps} steps" for steps in STEPS]
        if args.steps
        else [*(() if args.no_peers else ("A^+ y", "A_s y", "classical")), *pipelines]
    )
    settings = {
        f"{noise} {task} {method}": (noise, task, method)
        for noise in args.noise_std
        for task in all_tasks(noise)
        for method in methods
        if noise > 0 or method != "A_s y"
    }
    if args.reliability is None:
        results.fill(list(settings), [0], lambda setting, seed: row(*settings[setting]))
        found = [results.of(setting)[0] for setting in settings]
        print(table([one for one in found if "psnr" in one]))
    else:
        found = {}
        for noise_std in args.noise_std:
            for task_name in all_tasks(noise_std):
                task = Task(task_name, clean, noise_std)
                if not unknown_pixels(task).any():
                    continue
                answers = restore(pipelines["EC-VAE"], task, 16, 32, 0, energy_weight=args.energy_weight)
                found[task_name, noise_std] = coverage(task, answers, FACTORS)
                share = found[task_name, noise_std][FACTORS.index(2.0)]
                print(f"{task_name}, noise {noise_std}: {share:.1%} within two standard deviations", flush=True)
                # After each task: the study is long.
                reliability(found, args.reliability)


if __name__ == "__main__":
    main()
