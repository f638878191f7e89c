# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the studies share: the two data sets with their features, training, and rows that an interrupted study keeps."""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

from common.command_line import device as device_here
from common.command_line import place, positive, whole_number
from common.results import table
from ecvae_diffusers import ECVAEPipeline, EnergyCalibrator
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
from ecvae_diffusers.training.run.log import EVENTS_FILE, METRICS_FILE, read_metrics


TRAINING = Path(__file__).resolve().parents[2] / "training"


def precision(device: torch.device | str) -> list[str]:
    """
    Return bf16 on a CPU, which may have units for it. On a GPU, networks of this size wait for the start of their
    kernels, and autocast adds many: the chain takes twice as long (RESULTS.md).
    """
    return ["--mixed_precision", "bf16" if torch.device(device).type == "cpu" else "no"]


class Digits:
    """
    scikit-learn's digits at 16 px, over 64 features of a classifier trained on the same 1,500 images. It takes 50,000
    samples: sets of 5,000 from one model differ by up to 8 in Frechet distance.
    """

    name, num_samples, resolution, latent_channels, channels = "digits", 50_000, 16, 32, (16, 32, 64)
    learning_rate = 5e-4  # the script's own
    # Those of `make demo`.
    arguments = ["--resolution", "16", "--latent_channels", "32", "--block_out_channels", "16", "32", "64"]

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.device = device
        write_digits(folder / "digits")
        self.data_arguments = ["--train_data_dir", str(folder / "digits" / "train")]
        digits = load_digits()[0]
        self.train = digits[:NUM_TRAIN]
        features, accuracy = train_digit_features()
        self.metrics = reference(features.to(device), self.train)
        held_out = self.measure(digits[NUM_TRAIN:])
        self.about = (
            f"digits; classifier {accuracy:.1%} on held-out digits, which are at Frechet distance "
            f"{held_out['frechet_distance']:.1f}"
        )

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        return against(self.metrics, images)


class FashionMNIST:
    """Fashion-MNIST at 32 px, over EfficientNet-Lite0's features: 10,000 samples against 10,000 training images."""

    name, num_samples, resolution, latent_channels, channels = "fashion_mnist", 10_000, 32, 64, (16, 32, 64, 128)
    learning_rate = 1e-3
    arguments = [
        "--latent_channels", "64", "--block_out_channels", "16", "32", "64", "128",
        "--learning_rate", str(learning_rate), "--energy_learning_rate", str(learning_rate),
        "--evaluation_steps", "750", "--log_steps", "50", "--save_images_steps", "1000",
    ]  # fmt: skip

    def __init__(self, folder: Path, dataset: str, device: torch.device | str = "cpu"):
        self.device = device
        self.arguments = [*self.arguments, *precision(device)]
        self.data_arguments = ["--dataset_name", dataset, "--image_column", "image"]
        self.train = fashion_images(dataset, "train", 10_000)
        self.metrics = reference(lite0_features().to(device), self.train, folder)
        floor = self.measure(fashion_images(dataset, "test", 10_000))
        self.about = (
            f"Fashion-MNIST; EfficientNet-Lite0 features; the 10,000 test images are at Frechet distance "
            f"{floor['frechet_distance']:.1f}, kernel distance {floor['kernel_distance']:.4f}"
        )

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        return against(self.metrics, images)


def fashion_images(dataset: str, split: str, count: int) -> torch.Tensor:
    """Return uint8 images, always the same ones."""
    from datasets import load_dataset

    rows = load_dataset(dataset, split=split).with_format("torch").shuffle(seed=0).select(range(count))
    return torch.stack([row["image"].view(1, 32, 32) for row in tqdm(rows, desc=f"Reading {split}")])


def dataset_images(dataset: str, split: str, count: int, resolution: int, channels: int) -> torch.Tensor:
    """Return uint8 images of any data set, resized, always the same ones."""
    drawn = draw(open_source("dataset", dataset, split, None, None, None), count, 0, progress=True)
    return decode_all(drawn, resolution, channels)


class RememberedFeatures(torch.nn.Module):
    """Features of the data, cached in files: they take ten minutes on one core, and each study needs them."""

    def __init__(self, features: torch.nn.Module, folder: Path):
        super().__init__()
        self.features, self.folder = features, folder
        folder.mkdir(parents=True, exist_ok=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        path = self.folder / f"{hashlib.sha256(images.numpy().tobytes()).hexdigest()[:20]}.pt"
        if not path.is_file():
            half_written = path.with_suffix(f".{os.getpid()}")
            torch.save(self.features(images).cpu(), half_written)
            half_written.rename(path)
        return torch.load(path, weights_only=True)


def reference(features: torch.nn.Module, real: torch.Tensor, folder: Path | None = None) -> GenerationMetrics:
    """Return metrics that hold the features of real images, which are cached in `folder`."""
    metrics = GenerationMetrics(features if folder is None else RememberedFeatures(features, folder / "features"))
    for batch in tqdm(real.split(250), desc="Features of the data"):
        metrics.update(batch, real=True)
    metrics.features = features
    return metrics


def against(metrics: GenerationMetrics, images: torch.Tensor) -> dict[str, float]:
    """Return the measures of images against the real ones of [`reference`]."""
    for batch in tqdm(images.split(250), desc="Features of the samples"):
        metrics.update(batch, real=False)
    measures = metrics.compute()
    metrics.reset(keep_real=True)
    return measures


def epochs(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """
    Yield batches in [-1, 1], epoch by epoch in a new order, as the training script does. It matters: drawn with
    replacement, one chain per iteration is worse than two (RESULTS.md).
    """
    while True:
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch_size + 1, batch_size):
            yield to_range(images[order[start : start + batch_size]])


def end_with_parent() -> None:
    """Have the system end this child when the study is killed, before its program starts. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def alone(path: Path) -> Iterator[int]:
    """
    Wait until no other study holds this lock: two studies may resume the same run. Yields the lock's descriptor, and a
    child that inherits it keeps the lock for as long as it lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another study, which has {path.stem}.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def run_folder(output_dir: Path, data_name: str, name: str, seed: int) -> Path:
    return output_dir / data_name / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}"


def train(data, folder: Path, seed: int, num_steps: int, *arguments: str, script: str = "train_ecvae.py") -> None:
    """
    Run a training script as a user would, or resume it. A finished run is not trained again.

    Raises:
        ValueError: if `folder` holds a run of other arguments, which are kept beside it.
    """
    arguments = ["--max_train_steps", str(num_steps), *data.arguments, *arguments]
    # Without paths, so that a study that was moved is the same one.
    own = [argument for argument in arguments if os.sep not in argument]
    with alone(folder.parent / f"{folder.name}.lock") as lock:
        kept = folder.parent / f"{folder.name}.arguments.json"
        if folder.is_dir() and kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8"))) != own:
            raise ValueError(
                f"{folder.name} was trained with {' '.join(found)}, not {' '.join(own)}: see --output_dir."
            )
        kept.write_text(json.dumps(own), encoding="utf-8")
        if is_finished(folder):
            return
        command = [sys.executable, str(TRAINING / script), *data.data_arguments, "--output_dir", str(folder)]
        command += ["--seed", str(seed), "--checkpointing_steps", "500", "--checkpoints_total_limit", "1", *arguments]
        if any(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "latest"]
        else:
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(command, check=True, preexec_fn=end_with_parent, pass_fds=[lock])


def logged(folder: Path) -> dict:
    """Return the last of what a run logged, and its number of rollbacks."""
    if not (folder / METRICS_FILE).is_file():
        return {}
    last, events = read_metrics(folder / METRICS_FILE)[-1], folder / EVENTS_FILE
    wanted = ("step", "training_seconds", "dual", "drift", "constraint", "tolerance", "langevin_drift_step")
    rollbacks = sum(event["kind"] == "rollback" for event in read_metrics(events)) if events.is_file() else 0
    return {key: last[key] for key in wanted if key in last} | {"rollbacks": rollbacks}


def trained_row(data, folder: Path) -> dict:
    """Return the measures of a run's samples, and the end of its logs."""
    pipeline = ECVAEPipeline.from_pretrained(folder).to(data.device)
    row = data.measure(sample_images(pipeline, data.num_samples, seed=1)) | logged(folder)
    row["reconstruction_variance"] = pipeline.vae.config.reconstruction_variance
    if pipeline.energy_model is not None:
        row["cosine_to_critic"] = cosine_to_critic(pipeline)
    return row


def cosine_to_critic(pipeline: ECVAEPipeline, num_samples: int = 256) -> float:
    """
    Return the mean cosine between the chain's move without its noise, x~ - x_0, and -grad f(x_0), which is all that a
    critic gives its generator. It is 1 at K = 1.
    """
    samples = pipeline(num_samples, generator=torch.Generator().manual_seed(2), output_type="pt").images * 2 - 1
    calibrator = EnergyCalibrator(pipeline.energy_model, pipeline.scheduler)
    still = samples.new_zeros(len(pipeline.scheduler), *samples.shape)
    move = calibrator.run_chain(samples, noise=still) - samples
    _, gradient = energy_and_gradient(pipeline.energy_model, samples)
    return torch.cosine_similarity(move.flatten(1), -gradient.flatten(1)).mean().item()


class Results:
    """
    Rows in a JSON lines file. Existing rows are not made again, except those measured with another number of samples.

    Args:
        path (`Path`): The file.
        num_samples (`int`, *optional*): Samples that a row is measured with.
    """

    def __init__(self, path: Path, num_samples: int | None = None):
        self.path, self.num_samples = path, num_samples
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict]:
        """Return all rows, without a last one that a kill cut off."""
        return read_metrics(self.path) if self.path.is_file() else []

    def of(self, name: str) -> list[dict]:
        return sorted((row for row in self.rows() if row["setting"] == name), key=lambda row: row["seed"])

    def write(self, rows: list[dict]) -> None:
        temporary = self.path.with_suffix(".half")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(self.path)

    def fill(
        self,
        settings: list[str],
        seeds: list[int],
        make: Callable[[str, int], dict],
        iterations: int | dict[str, int] | None = None,
        arguments: dict[str, list[str]] | None = None,
    ) -> None:
        """
        Make the missing rows.

        Args:
            settings, seeds: A row for each pair.
            make (`Callable`): Setting and seed -> what a row holds.
            iterations (`int` or `dict`, *optional*): Of every row, or of each setting's.
            arguments (`dict`, *optional*): Of each setting's command line.

        Raises:
            ValueError: if an existing row is of another number of `iterations` or of other `arguments`.
        """
        for seed in seeds:
            for name in settings:
                length = iterations[name] if isinstance(iterations, dict) else iterations
                made_with = {"iterations": length, "arguments": arguments and arguments[name]}
                made_with = {key: value for key, value in made_with.items() if value is not None}
                there = [row for row in self.of(name) if row["seed"] == seed]
                for row in there:
                    for key, value in made_with.items():
                        if row.get(key, value) != value:
                            raise ValueError(
                                f"{self.path.name} holds {name!r} with {key} {row[key]}, not {value}: choose another "
                                "--output_dir."
                            )
                if any(row.get("num_samples") == self.num_samples for row in there):
                    continue
                started = time.time()
                row = make(name, seed)
                # A row may have seconds of its own, such as those per image.
                row = {"setting": name, "seed": seed, "seconds": round(time.time() - started), **row}
                row |= {"num_samples": self.num_samples, **made_with}
                # The file may have changed by now: another study may have written to it, even the same row.
                with alone(self.path.with_suffix(".lock")):
                    self.write([r for r in self.rows() if (r["setting"], r["seed"]) != (name, seed)] + [row])
                print(json.dumps(row), flush=True)


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def each(key: str, spec: str) -> Callable[[list[dict]], str]:
    """Return a column of a table: the figure of each seed."""
    return lambda rows: ", ".join(format(row[key], spec) for row in rows if key in row)


def middle(key: str, spec: str, average: Callable = statistics.median) -> Callable[[list[dict]], str]:
    """Return a column of a table: the median over seeds, or another average."""
    return lambda rows: format(average(row[key] for row in rows), spec) if key in rows[0] else ""


def seconds_per_iteration(rows: list[dict]) -> str:
    """Show a column of a table: the median over seeds."""
    return f"{statistics.median(row['training_seconds'] / row.get('step', row['iterations']) for row in rows):.3f}"


def results_table(results: Results, names: list[str], first: str, columns: dict[str, Callable]) -> str:
    """Return a table with a line per setting, of those that there are rows of."""
    lines = [[name, *(show(rows) for show in columns.values())] for name in names if (rows := results.of(name))]
    return table([first, *columns], lines)


def versions() -> str:
    return (
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} of {os.cpu_count()} "
        f"cores, {platform.machine()}"
    )


def parser(doc: str, settings: list[str], dataset: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a study on `dataset`, or on digits and Fashion-MNIST."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument("--max_train_steps", type=positive, default=1500)
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings, metavar="NAME")
    parser.add_argument(
        f"--{dataset or 'fashion_mnist'}", metavar="DATASET", required=dataset is not None,
        help="Hub id or folder" + ("" if dataset else ": this instead of digits"),
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the table of the existing rows, and stop")
    add_device(parser)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu",
        help="where samples and features are computed; training is where Accelerate has it",
    )  # fmt: skip


def data_of(args: argparse.Namespace) -> type:
    return Digits if args.fashion_mnist is None else FashionMNIST


def open_results(args: argparse.Namespace, study: str) -> Results:
    """Return the rows of a study on its data."""
    return Results(args.output_dir / f"{study}_{data_of(args).name}.jsonl", data_of(args).num_samples)


def load_data(args: argparse.Namespace) -> Digits | FashionMNIST:
    chosen = () if args.fashion_mnist is None else (args.fashion_mnist,)
    return data_of(args)(args.output_dir, *chosen, args.device)
