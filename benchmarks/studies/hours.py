#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is the best use of some hours? `python benchmarks/studies/hours.py --cifar10 DATASET --output_dir STUDY --hours 2`.

Settings of the EC-VAE, VAEs and a DDPM are trained on CIFAR-10 for equal hours. The DDPM has as many parameters as autoencoder and energy
model of the first setting, and draws with 50 steps of DDIM. Each run stops every `--slice_steps` iterations to measure its samples, and
trains on until its hours are over. Hours are those of training alone, on one core. Rows are kept in STUDY, so an interrupted study
resumes at the last slice, and more `--hours` continue finished runs. Two processes may share STUDY if their settings or seeds differ.
`--picture PNG` draws both kernel distances over hours. `--average` also measures EC-VAEs and VAEs whose saved weights, which are moving
averages, are averaged over all slices with a power function of the iteration (Karras et al. 2024, arXiv 2312.02696, section 3).
"""

import argparse
import functools
import itertools
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.machine import machine
from common.results import table
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel
from ecvae_diffusers.metrics import ClassifierFeatures, GenerationMetrics, lite0_features
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.tasks.networks import moving_average, use_contiguous_norms
from studies.class_study import labels_of
from studies.peers import EMA_DECAY, adam, step


BATCH, LATENTS, DDIM_STEPS, NUM_DDIM_SAMPLES = 64, 128, 50, 1000
WIDTHS = (0.02, 0.05, 0.1, 0.2)
MEASURES = (
    "frechet_distance",
    "kernel_distance",
    "classifier_frechet_distance",
    "classifier_kernel_distance",
    "recall",
)
K_1, PLAIN = ["--langevin_steps", "1"], ["--calibration", "none"]
CLASSES = ["--class_conditional", "--class_column", "label"]


def networks(patch: int, *channels: int) -> list[str]:
    return ["--patch_size", str(patch), "--block_out_channels", *map(str, channels)]


REFERENCE = (2, (64, 128, 128))
WIDE = networks(REFERENCE[0], *REFERENCE[1])
NARROW, FLAT = networks(2, 32, 64, 128), networks(1, 16, 32, 64, 128)
SETTINGS: dict[str, list[str] | None] = {
    "EC-VAE, patches of 2, 64 to 128 channels": [*WIDE, *K_1],
    "EC-VAE, patches of 2, 32 to 128 channels": [*NARROW, *K_1],
    "EC-VAE, no patches, 16 to 128 channels": [*FLAT, *K_1],
    "EC-VAE, K 5": WIDE,
    "EC-VAE, two scales": [*WIDE, *K_1, "--energy_num_scales", "2"],
    "EC-VAE, batch 32": [*WIDE, *K_1, "--train_batch_size", "32"],
    "EC-VAE, rates of 1e-3 and 2e-3": [*WIDE, *K_1, "--learning_rate", "1e-3", "--energy_learning_rate", "2e-3"],
    "EC-VAE, classes": [*WIDE, *K_1, *CLASSES],
    **{f"VAE, beta {beta}": [*WIDE, *PLAIN, "--kl_weight", beta] for beta in ("1", "0.3")},
    "DDPM": None,
}
COLUMNS = {
    "hours": study.middle("hours", ".2f"),
    "iterations": study.middle("step", ",.0f"),
    **study.FRECHET,
    "kernel distance": study.middle("kernel_distance", ".3f"),
    "Frechet distance over the classifier": study.middle("classifier_frechet_distance", ".1f"),
    "kernel distance over the classifier": study.middle("classifier_kernel_distance", ".3f"),
    "recall": study.middle("recall", ".2f"),
    "lambda": study.middle("dual", ".0f"),
}


def images_of(dataset: str, split: str, count: int) -> torch.Tensor:
    """Return uint8 images (N, 3, 32, 32), in the order of `labels_of`."""
    rows = load_dataset(dataset, split=split).with_format("torch").shuffle(seed=0).select(range(count))
    return torch.stack([row["image"] for row in tqdm(rows, desc=f"Reading {split}")])


class Cifar10:
    """CIFAR-10 with features of EfficientNet-Lite0 and of a classifier of its classes, of 10,000 training images."""

    name = "cifar10"

    def __init__(self, args):
        self.arguments = ["--latent_channels", str(LATENTS), "--log_steps", "50", *study.precision(args.device)]
        self.data_arguments = ["--dataset_name", args.dataset, "--image_column", "image"]
        self.device, self.dataset, count = args.device, args.dataset, 10_000
        kept = args.output_dir / "measures.pt"
        if not kept.is_file():  # they take minutes
            args.output_dir.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")
            torch.save(self.prepare(count), part)
            part.replace(kept)
        self.metrics, self.about = torch.load(kept, weights_only=False)

    def prepare(self, count: int) -> tuple[dict[str, GenerationMetrics], str]:
        """Return what measures samples over each kind of features, and what it finds for test images."""
        (train, labels, names), (test, test_labels, _) = (
            (images_of(self.dataset, split, count), *labels_of(self.dataset, split, count))
            for split in ("train", "test")
        )
        classifier = ClassifierFeatures(train, labels, names).to(self.device)
        features = {"": lite0_features().to(self.device), "classifier_": classifier}
        metrics = {name: study.reference(extractor, train) for name, extractor in features.items()}
        right = (classifier.classify(classifier(test)).cpu() == test_labels).float().mean()
        floor = ", ".join(f"{name}{study.distances(found, test)}" for name, found in metrics.items())
        return metrics, f"the classifier names {right:.1%} of test images right, which are at {floor}"

    @functools.cached_property
    def train_images(self) -> torch.Tensor:
        return images_of(self.dataset, "train", 50_000)

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        found = {name: study.against(metrics, images) for name, metrics in self.metrics.items()}
        return {f"{name}{key}": value for name, measures in found.items() for key, value in measures.items()}


class Ddpm:
    """A resumable DDPM with noise prediction and 1,000 steps (Ho et al. 2020) in bf16, with an average of its weights."""

    def __init__(self, data: Cifar10, folder: Path, seed: int):
        torch.manual_seed(seed)
        self.data, self.folder, self.seed = data, folder, seed
        self.unet = small_unet().to(memory_format=torch.channels_last)
        use_contiguous_norms(self.unet)
        self.average, self.optimizer = moving_average(self.unet, EMA_DECAY), adam(self.unet, 5e-4, (0.9, 0.999))
        self.scheduler, self.step, self.seconds = DDPMScheduler(num_train_timesteps=1000), 0, 0.0
        if (folder / "state.pt").is_file():
            state = torch.load(folder / "state.pt", weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
            for part, name in ((self.unet, "unet"), (self.average, "average"), (self.optimizer, "optimizer")):
                part.load_state_dict(state[name])

    def train_to(self, num_steps: int) -> None:
        # A resumed run draws other batches, not those of its start again.
        torch.manual_seed(self.seed * 10**9 + self.step)
        batches, started = study.epochs(self.data.train_images, BATCH), time.perf_counter()
        for _ in tqdm(range(self.step, num_steps), mininterval=5):
            real = next(batches).to(memory_format=torch.channels_last)
            noise, timesteps = torch.randn_like(real), torch.randint(1000, (len(real),))
            with torch.autocast("cpu", torch.bfloat16):
                predicted = self.unet(self.scheduler.add_noise(real, noise, timesteps), timesteps).sample
            step(self.optimizer, F.mse_loss(predicted.float(), noise))
            self.average.update_parameters(self.unet)
        self.step, self.seconds = num_steps, self.seconds + time.perf_counter() - started
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {"unet": self.unet, "average": self.average, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "step": self.step, "seconds": self.seconds}, self.folder / "state.part")
        (self.folder / "state.part").replace(self.folder / "state.pt")
        DDIMPipeline(self.average.module, self.scheduler).save_pretrained(self.folder / "pipeline")


def small_unet() -> UNet2DModel:
    """Build a UNet with attention at 8 and 4 px, and about the parameters of REFERENCE's autoencoder and energy model together."""
    patch, channels = REFERENCE
    sizes = {"sample_size": 32, "in_channels": 3, "block_out_channels": channels, "patch_size": patch}
    wanted = AutoencoderEC(**sizes, latent_channels=LATENTS).num_parameters() + EnergyModel(**sizes).num_parameters()

    def unet(width: int) -> UNet2DModel:
        return UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            down_block_types=["DownBlock2D"] * 2 + ["AttnDownBlock2D"] * 2,
            up_block_types=["AttnUpBlock2D"] * 2 + ["UpBlock2D"] * 2,
        )  # fmt: skip

    return min((unet(width) for width in range(8, 65, 4)), key=lambda network: abs(network.num_parameters() - wanted))


def draw(pipeline, num_images: int) -> torch.Tensor:
    """Return samples of a pipeline as uint8 images (N, 3, 32, 32), in bf16 if it is a DDIM pipeline."""
    if not isinstance(pipeline, DDIMPipeline):
        return sample_images(pipeline, num_images, seed=1, batch_size=250)
    pipeline.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(1), []
    for _ in tqdm(range(0, num_images, 250), desc="DDIM"):
        with torch.autocast("cpu", torch.bfloat16):
            found = pipeline(250, generator=generator, num_inference_steps=DDIM_STEPS, output_type="np").images
        images.append(torch.from_numpy((found * 255).round()).to(torch.uint8).permute(0, 3, 1, 2))
    return torch.cat(images)


def power(relative_width: float) -> float:
    """Return the exponent gamma of the profile t^gamma on [0, 1] with this standard deviation (Karras et al. 2024, section 3.1)."""
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        gamma = (low + high) / 2
        is_wider = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 > relative_width
        low, high = (gamma, high) if is_wider else (low, gamma)
    return low


def averaged(states: dict[int, dict[str, torch.Tensor]], relative_width: float) -> dict[str, torch.Tensor]:
    """Return the mean of weights by iteration, each with the integral of the profile since the iteration before it."""
    gamma, steps = power(relative_width), sorted(states)
    shares = {
        step: (step / steps[-1]) ** (gamma + 1) - (before / steps[-1]) ** (gamma + 1)
        for before, step in itertools.pairwise([0, *steps])
    }
    return {name: sum(shares[step] * states[step][name].float() for step in steps) for name in states[steps[0]]}


def rows_of(args: argparse.Namespace, name: str, seed: int) -> study.Results:
    return study.Results(args.output_dir / f"{study.run_folder(args.output_dir, Cifar10.name, name, seed).name}.jsonl")


def plot(runs: dict[tuple[str, int], list[dict]], path: Path) -> None:
    """Plot both kernel distances of each run over hours."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"kernel_distance": "EfficientNet-Lite0", "classifier_kernel_distance": "the classifier"}
    for axis, (key, title) in zip(axes, titles.items()):
        for (name, seed), rows in runs.items():
            hours, values = zip(*[(row["hours"], row[key]) for row in rows])
            axis.plot(
                hours, values, label=name if seed == 0 else None, marker=".", color=f"C{list(SETTINGS).index(name)}"
            )
        axis.set(xlabel="hours of training on one core", ylabel=f"kernel distance over {title}", yscale="log")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def snapshots(folder: Path) -> Path:
    """Return the folder with a run's autoencoder after each slice, by iteration."""
    return folder.parent / "snapshots" / folder.name


def average(args: argparse.Namespace, data: Cifar10, name: str, seed: int) -> None:
    """Print the distances of samples of averages over a run's slices."""
    folder = study.run_folder(args.output_dir, data.name, name, seed)
    kept = {int(path.name): load_file(path / SAFETENSORS_WEIGHTS_NAME) for path in snapshots(folder).iterdir()}
    pipeline, lines = ECVAEPipeline.from_pretrained(folder).to(data.device), []
    for width in WIDTHS:
        pipeline.vae.load_state_dict(averaged(kept, width))
        found = data.measure(draw(pipeline, args.num_samples))
        lines.append([f"{name}, width {width}", *(f"{found[key]:.4g}" for key in MEASURES)])
    print(table(["average", *MEASURES], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", dest="dataset", metavar="DATASET", help="Hub id or folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--slice_steps", type=int, default=2000, help="iterations between two measurements")
    parser.add_argument("--num_samples", type=int, default=5000)
    parser.add_argument("--picture", type=Path, help="also write this plot")
    parser.add_argument("--average", action="store_true", help="also measure averages over the slices")
    args = parser.parse_args()
    if args.average and args.dataset is None:
        parser.error("--average requires --cifar10.")
    args.device = torch.device("cpu")
    if args.dataset is not None:
        data = Cifar10(args)
        print(f"{data.about}; {machine(args.device)}", flush=True)
        for seed, name in itertools.product(args.seeds, args.settings):
            train(args, data, name, seed)
            if args.average and SETTINGS[name] is not None:
                average(args, data, name, seed)
    runs = {(name, seed): rows_of(args, name, seed).of(name) for name in args.settings for seed in args.seeds}
    runs = {key: sorted(rows, key=lambda row: row["step"]) for key, rows in runs.items() if rows}
    if args.picture is not None:
        plot(runs, args.picture)
    lines = []
    for name in args.settings:
        last = [rows[-1] for (setting, _), rows in runs.items() if setting == name]
        if last:
            lines.append([name, *(show(last) for show in COLUMNS.values())])
    print(table(["setting", *COLUMNS], lines))


def train(args: argparse.Namespace, data: Cifar10, name: str, seed: int) -> None:
    """Train a run in slices until its hours are over, and measure it after each."""
    folder, arguments = study.run_folder(args.output_dir, data.name, name, seed), SETTINGS[name]
    results = rows_of(args, name, seed)
    rows = results.of(name)
    ddpm = Ddpm(data, folder, seed) if arguments is None else None
    num_steps, hours = max((row["step"] for row in rows), default=0), max((row["hours"] for row in rows), default=0.0)
    while hours < args.hours:
        num_steps += args.slice_steps
        if ddpm is not None:
            ddpm.train_to(num_steps)
            seconds, pipeline, logged = ddpm.seconds, DDIMPipeline.from_pretrained(folder / "pipeline"), {}
        else:
            study.train(data, folder, seed, num_steps, *arguments, extend=True)
            pipeline, logged = ECVAEPipeline.from_pretrained(folder).to(data.device), study.logged(folder)
            seconds = logged["training_seconds"]
            shutil.copytree(folder / "vae", snapshots(folder) / str(num_steps), dirs_exist_ok=True)
        hours = seconds / 3600
        count = args.num_samples if ddpm is None else min(args.num_samples, NUM_DDIM_SAMPLES)
        found = data.measure(draw(pipeline, count))
        if count < args.num_samples:  # all other measures depend on the number of samples
            found = {key: value for key, value in found.items() if key.endswith("kernel_distance")}
        row = {"setting": name, "seed": seed, "hours": hours, "num_samples": count}
        results.append({**row, **logged, **found, "step": num_steps})


if __name__ == "__main__":
    main()
