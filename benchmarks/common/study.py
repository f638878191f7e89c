# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the studies share: two data sets with their features, training, and rows that are kept if a study is interrupted."""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from common.machine import device, machine
from common.results import table
from ecvae_diffusers import ECVAEPipeline, EnergyCalibrator
from ecvae_diffusers.atomic import to_json, write_json
from ecvae_diffusers.energy import energy_and_gradient
from ecvae_diffusers.evaluation.pictures import decode_all, draw, open_source
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features
from ecvae_diffusers.training.data.digits import (
    NUM_TRAIN,
    load_digits,
    sample_images,
    train_digit_features,
    write_digits,
)
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.folder import is_finished
from ecvae_diffusers.training.run.log import EVENTS_FILE, METRICS_FILE, RunLog, read_metrics


TRAINING = Path(__file__).resolve().parents[2] / "training"


def precision(device: torch.device) -> list[str]:
    """
    Return the arguments for bf16 on a CPU, which may have units for it. On a GPU, the launches of kernels take most of the time
    of networks of this size, and autocast adds launches.
    """
    return ["--mixed_precision", "bf16" if device.type == "cpu" else "no"]


class Digits:
    """
    scikit-learn's digits at 16 px, over 64 features of a classifier trained on the same 1,500 images. The number of samples
    is large because the Frechet distance of fewer samples varies too much.
    """

    name, num_samples, resolution, latent_channels, channels = "digits", 50_000, 16, 32, (16, 32, 64)
    learning_rate = 5e-4  # the default of the training script
    # The arguments of `make demo`.
    arguments = ["--resolution", "16", "--latent_channels", "32", "--block_out_channels", "16", "32", "64"]

    def __init__(self, args: argparse.Namespace):
        write_digits(args.output_dir / "digits")
        self.data_arguments = ["--train_data_dir", str(args.output_dir / "digits" / "train")]
        digits = load_digits()[0]
        self.device, self.train = args.device, digits[:NUM_TRAIN]
        features, accuracy = train_digit_features()
        self.metrics = reference(features.to(args.device), self.train)
        floor = distances(self.metrics, digits[NUM_TRAIN:])
        self.about = f"classifier {accuracy:.1%} on held-out digits, which are at {floor}"


class FashionMNIST:
    """Fashion-MNIST at 32 px, over EfficientNet-Lite0's features: 10,000 samples against 10,000 training images."""

    name, num_samples, resolution, latent_channels, channels = "fashion_mnist", 10_000, 32, 64, (16, 32, 64, 128)
    learning_rate = 1e-3

    def __init__(self, args: argparse.Namespace):
        self.arguments = [
            "--latent_channels", "64", "--block_out_channels", "16", "32", "64", "128",
            "--learning_rate", str(self.learning_rate), "--energy_learning_rate", str(self.learning_rate),
            "--evaluation_steps", "750", "--log_steps", "50", "--save_images_steps", "1000", *precision(args.device),
        ]  # fmt: skip
        self.data_arguments = ["--dataset_name", args.dataset, "--image_column", "image"]
        self.device, self.train = args.device, fashion_images(args.dataset, "train", 10_000)
        self.metrics = reference(lite0_features().to(args.device), self.train)
        self.about = f"test images are at {distances(self.metrics, fashion_images(args.dataset, 'test', 10_000))}"


def fashion_images(dataset: str, split: str, count: int) -> torch.Tensor:
    """Return uint8 images (N, 1, 32, 32), the same ones on each call."""
    from datasets import load_dataset

    rows = load_dataset(dataset, split=split).with_format("torch").shuffle(seed=0).select(range(count))
    return torch.stack([row["image"].view(1, 32, 32) for row in tqdm(rows, desc=f"Reading {split}")])


def dataset_images(dataset: str, split: str, count: int, resolution: int, channels: int) -> torch.Tensor:
    """Return resized uint8 images (N, C, H, W) of any data set, the same ones on each call."""
    drawn = draw(open_source("dataset", dataset, split, None, None, None), count, 0, progress=True)
    return decode_all(drawn, resolution, channels)


def reference(features: torch.nn.Module, real: torch.Tensor) -> GenerationMetrics:
    """Return metrics that hold the features of real images."""
    metrics = GenerationMetrics(features)
    for batch in tqdm(real.split(250), desc="Features of the data"):
        metrics.update(batch, real=True)
    return metrics


def against(metrics: GenerationMetrics, images: torch.Tensor) -> dict[str, float]:
    """Return the measures of images, compared with the real images that `metrics` holds."""
    for batch in tqdm(images.split(250), desc="Features of the samples"):
        metrics.update(batch, real=False)
    measures = metrics.compute()
    metrics.reset(keep_real=True)
    return measures


def distances(metrics: GenerationMetrics, images: torch.Tensor) -> str:
    found = against(metrics, images)
    return f"Frechet distance {found['frechet_distance']:.1f}, kernel distance {found['kernel_distance']:.4f}"


def epochs(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """
    Yield batches in [-1, 1], with a new order in each epoch, as the training script does. Drawing with replacement would give
    other results (docs/results/arrangements/replacement.md).
    """
    while True:
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch_size + 1, batch_size):
            yield to_range(images[order[start : start + batch_size]])


def run_folder(output_dir: Path, data_name: str, name: str, seed: int) -> Path:
    return output_dir / data_name / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}"


def train(
    data, folder: Path, seed: int, num_steps: int, *arguments: str, script: str = "train_ecvae.py", extend: bool = False
) -> None:  # fmt: skip
    """
    Run a training script as a user would, or resume it. A finished run is not trained again. With `extend`, it continues if `num_steps`
    has grown.

    Raises:
        ValueError: if `folder` holds a run with other arguments. They are kept in a file next to it.
    """
    length, arguments = ["--max_train_steps", str(num_steps)], [*data.arguments, *arguments]
    # Paths are left out, so that a study may be moved.
    own = [argument for argument in ([] if extend else length) + arguments if os.sep not in argument]
    kept = folder.parent / f"{folder.name}.arguments.json"
    if folder.is_dir() and kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8"))) != own:
        raise ValueError(f"{folder.name} was trained with {' '.join(found)}, not {' '.join(own)}: see --output_dir.")
    write_json(kept, own)
    # A run that was killed after its last step has the pipeline of its former length. Resuming saves the new one.
    if is_finished(folder) and not extend:
        return
    command = [sys.executable, str(TRAINING / script), *data.data_arguments, "--output_dir", str(folder)]
    command += ["--seed", str(seed), "--checkpointing_steps", "500", "--checkpoints_total_limit", "1"]
    command += [*length, *arguments]
    resumes = any(folder.glob("checkpoint-*"))
    command += ["--resume_from_checkpoint", "latest"] if resumes else ["--overwrite_output_dir"]
    subprocess.run(command, check=True)


def logged(folder: Path) -> dict:
    """Return the last logged values of a run, and its number of rollbacks."""
    if not (folder / METRICS_FILE).is_file():
        return {}
    last, events = read_metrics(folder / METRICS_FILE)[-1], folder / EVENTS_FILE
    wanted = ("step", "training_seconds", "dual", "drift", "constraint", "tolerance", "langevin_drift_step")
    rollbacks = sum(event["kind"] == "rollback" for event in read_metrics(events)) if events.is_file() else 0
    return {key: last[key] for key in wanted if key in last} | {"rollbacks": rollbacks}


def trained_row(data, folder: Path) -> dict:
    """Return the measures of a run's samples, and its last logged values."""
    pipeline = ECVAEPipeline.from_pretrained(folder).to(data.device)
    row = against(data.metrics, sample_images(pipeline, data.num_samples, seed=1)) | logged(folder)
    row["reconstruction_variance"] = pipeline.vae.config.reconstruction_variance
    if pipeline.energy_model is not None:
        row["cosine_to_critic"] = cosine_to_critic(pipeline)
    return row


def cosine_to_critic(pipeline: ECVAEPipeline, num_samples: int = 256) -> float:
    """
    Return the mean cosine between the move of the chain without noise, x~ - x_0, and -grad f(x_0), the gradient that a GAN's
    generator would receive from the energy model as its discriminator. It is 1 at K = 1.
    """
    samples = pipeline(num_samples, generator=torch.Generator().manual_seed(2), output_type="pt").images * 2 - 1
    calibrator = EnergyCalibrator(pipeline.energy_model, pipeline.scheduler)
    still = samples.new_zeros(len(pipeline.scheduler), *samples.shape)
    move = calibrator.run_chain(samples, noise=still) - samples
    _, gradient = energy_and_gradient(pipeline.energy_model, samples)
    return torch.cosine_similarity(move.flatten(1), -gradient.flatten(1)).mean().item()


class Results:
    """The rows of a study, in a JSON lines file. Existing rows are not computed again."""

    def __init__(self, path: Path):
        self.path = path

    def of(self, name: str) -> list[dict]:
        """Return the rows of a setting, sorted by seed."""
        rows = read_metrics(self.path) if self.path.is_file() else []
        return sorted((row for row in rows if row["setting"] == name), key=lambda row: row["seed"])

    def fill(self, settings: list[str], seeds: list[int], make: Callable[[str, int], dict], **made_with) -> None:
        """
        Compute the missing rows, one per setting and seed. `made_with` is stored in every row; a value may be a dictionary by
        setting.

        Raises:
            ValueError: if an existing row was made with another value of `made_with`.
        """
        for seed, name in itertools.product(seeds, settings):
            own = {key: value[name] if isinstance(value, dict) else value for key, value in made_with.items()}
            there = [row for row in self.of(name) if row["seed"] == seed]
            for row, (key, value) in itertools.product(there, own.items()):
                if row.get(key, value) != value:
                    raise ValueError(f"{self.path.name} holds {name!r} with other {key}: choose another --output_dir.")
            if there:
                continue
            started = time.time()
            row = make(name, seed)
            # `row` may replace the seconds, for example by those per image.
            self.append({"setting": name, "seed": seed, "seconds": round(time.time() - started), **row, **own})

    def append(self, row: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        log = RunLog(self.path)
        log.cut(sys.maxsize)  # an incomplete line, left by a kill, would hide the next one
        log.write(**row)
        print(to_json(row), flush=True)

    def table(self, first: str, names: list[str], columns: dict[str, Callable]) -> str:
        """Return a Markdown table with a line for each setting that has rows."""
        lines = [[name, *(show(rows) for show in columns.values())] for name in names if (rows := self.of(name))]
        return table([first, *columns], lines)


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def each(key: str, spec: str) -> Callable[[list[dict]], str]:
    """Return a column of a table with the figure of each seed."""
    return lambda rows: ", ".join(format(row[key], spec) for row in rows if key in row)


def middle(key: str, spec: str, average: Callable = statistics.median) -> Callable[[list[dict]], str]:
    """Return a column of a table with the median over seeds, or another average."""
    return lambda rows: format(average(row[key] for row in rows), spec) if key in rows[0] else ""


FRECHET = {
    "Frechet distance, each seed": each("frechet_distance", ".1f"),
    "median": middle("frechet_distance", ".1f"),
}


def seconds_per_iteration(rows: list[dict]) -> str:
    """Format a cell: the median over seeds of the seconds per iteration."""
    return f"{statistics.median(row['training_seconds'] / row.get('step', row['iterations']) for row in rows):.3f}"


def parser(doc: str, settings: list[str], dataset: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a study on `dataset`, or on digits and Fashion-MNIST."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings, metavar="NAME")
    parser.add_argument(
        f"--{dataset or 'fashion_mnist'}", dest="dataset", metavar="DATASET", required=dataset is not None,
        help="Hub id or folder" + ("" if dataset else ", to use instead of digits"),
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only print the table of existing rows")
    add_device(parser)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="device for samples and features; Accelerate chooses that of training",
    )  # fmt: skip


def run(
    args: argparse.Namespace, name: str, load: Callable, make: Callable, iterations: dict[str, int] | None = None,
    arguments: dict[str, list[str]] | None = None,
) -> Results:  # fmt: skip
    """
    Compute the missing rows of a study in `NAME.jsonl`.

    Args:
        load (`Callable`): Returns the data for `args`. It is not called with `--table`.
        make (`Callable`): Returns the content of a row for data, setting and seed.
        iterations (`dict`, *optional*): The iterations of each setting. Default: `--max_train_steps`.
        arguments (`dict`, *optional*): The training arguments of each setting, next to those of the data.
    """
    results = Results(args.output_dir / f"{name}.jsonl")
    if not args.table:
        data = load(args)
        print(f"{data.name}; {data.about}; arguments {' '.join(data.arguments)}; {machine(args.device)}", flush=True)
        made_with = {"iterations": iterations or args.max_train_steps, "num_samples": data.num_samples}
        if arguments is not None:
            made_with["arguments"] = {setting: [*data.arguments, *own] for setting, own in arguments.items()}
        results.fill(args.settings, args.seeds, functools.partial(make, data), **made_with)
    return results


def run_on_either(args: argparse.Namespace, name: str, *rest, **kwargs) -> Results:
    """Call [`run`] on digits, or on Fashion-MNIST if the command line names it."""
    data_class = Digits if args.dataset is None else FashionMNIST
    return run(args, f"{name}_{data_class.name}", data_class, *rest, **kwargs)
