# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the studies share: the two data sets with their features, and results that a study cut off goes on from."""

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
from command_line import device as device_here
from command_line import place, positive, source, whole_number
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from demo import ARGUMENTS as DIGITS_ARGUMENTS  # noqa: E402
from ecvae_diffusers import ECVAEPipeline  # noqa: E402
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features  # noqa: E402
from ecvae_diffusers.training.data.digits import (  # noqa: E402
    NUM_TRAIN,
    load_digits,
    sample_images,
    train_digit_features,
    write_digits,
)
from ecvae_diffusers.training.data.transforms import to_range  # noqa: E402
from ecvae_diffusers.training.run.folder import (  # noqa: E402
    EVALUATIONS_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    is_finished,
    read_arguments,
    read_metrics,
)


SCRIPT = Path(__file__).resolve().parents[1] / "training" / "train_ecvae.py"


class Digits:
    """
    scikit-learn's digits at 16 px, over 64 features of a classifier trained on the same 1,500 training images. Of 50,000
    samples: 5,000 others of one model differ by up to 8 in Frechet distance.
    """

    name, num_samples, resolution, latent_channels, channels = "digits", 50_000, 16, 32, (16, 32, 64)
    learning_rate = 5e-4  # the script's own
    arguments = DIGITS_ARGUMENTS

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.device = device
        write_digits(folder / "digits")
        self.data_arguments = ["--train_data_dir", str(folder / "digits" / "train")]
        digits = load_digits()[0]
        self.train, held_out = digits[:NUM_TRAIN], digits[NUM_TRAIN:]
        features, accuracy = train_digit_features()
        self.metrics = reference(features.to(device), self.train)
        drawn = torch.randint(NUM_TRAIN, (self.num_samples,), generator=torch.Generator().manual_seed(0))
        self.about = (
            f"digits; classifier {accuracy:.1%} on held-out digits, whose distance to the training digits is "
            f"{self.measure(held_out)['frechet_distance']:.1f}; training digits drawn {self.num_samples:,} times are at "
            f"{self.measure(self.train[drawn])['frechet_distance']:.2f}"
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

    def __init__(self, folder: Path, data_dir: str, device: torch.device | str = "cpu"):
        from datasets import load_dataset

        self.device = device
        self.arguments = [*self.arguments, *precision(device)]
        self.data_arguments = ["--dataset_name", data_dir, "--image_column", "image"]

        def images(split: str) -> torch.Tensor:
            rows = load_dataset(data_dir, split=split).with_format("torch").shuffle(seed=0).select(range(10_000))
            return torch.stack([row["image"].view(1, 32, 32) for row in tqdm(rows, desc=f"Reading {split}")])

        self.train = images("train")
        features = lite0_features().to(device)
        remembered = RememberedFeatures(features, folder / "features")
        self.metrics = reference(remembered, self.train)
        floor = self.measure(images("test"))
        self.metrics.features = features
        self.about = (
            f"Fashion-MNIST; EfficientNet-Lite0 features; the 10,000 test images are at Frechet distance "
            f"{floor['frechet_distance']:.1f}, kernel distance {floor['kernel_distance']:.4f}"
        )

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        return against(self.metrics, images)


class RememberedFeatures(torch.nn.Module):
    """Features of the data, kept in files: they take ten minutes on one core, and each study needs them."""

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


def precision(device: torch.device | str) -> list[str]:
    """
    bf16 on a CPU, which may have units for it. On a GPU networks of this size wait for the start of their kernels, of which
    autocast adds many: the chain takes twice as long (RESULTS.md).
    """
    return ["--mixed_precision", "bf16" if torch.device(device).type == "cpu" else "no"]


def epochs(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """
    Batches in [-1, 1], epoch by epoch in a new order, as the training script draws them. It matters: drawn with replacement,
    one chain an iteration is behind two (RESULTS.md).
    """
    while True:
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch_size + 1, batch_size):
            yield to_range(images[order[start : start + batch_size]])


def reference(features: torch.nn.Module, real: torch.Tensor) -> GenerationMetrics:
    metrics = GenerationMetrics(features)
    for batch in tqdm(real.split(250), desc="Features of the data"):
        metrics.update(batch, real=True)
    return metrics


def against(metrics: GenerationMetrics, images: torch.Tensor) -> dict[str, float]:
    for batch in tqdm(images.split(250), desc="Features of the samples"):
        metrics.update(batch, real=False)
    measures = metrics.compute()
    metrics.reset(keep_real=True)
    return measures


def end_with_parent() -> None:
    """In a child, before its program starts: have the system stop it when the study is killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def alone(path: Path) -> Iterator[int]:
    """
    One study at a time: a run that another study is at, which both go on from, is waited for. Gives the lock's descriptor: a
    child that has it keeps the lock for as long as it lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another study, which is at {path.stem}.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def train(
    data,
    folder: Path,
    seed: int,
    num_steps: int,
    *arguments: str,
    script: Path = SCRIPT,
    steps: str = "--max_train_steps",
) -> None:
    """
    Run a training script as a user would, alone in its process, or what is left of a run that was cut off. Its arguments are
    kept beside its folder. `steps` is the study's argument that `num_steps` is of.

    Raises:
        ValueError: if there is a finished run of another length, or one of other arguments.
    """
    with alone(folder.parent / f"{folder.name}.lock") as lock:
        train_alone(data, folder, seed, num_steps, arguments, script, steps, lock)


def train_alone(
    data, folder: Path, seed: int, num_steps: int, arguments: tuple[str, ...], script: Path, steps: str, lock: int
) -> None:
    """`train`, where no other study is at the run."""
    beside = folder.parent / f"{folder.name}.arguments.json"
    # But for paths, so that a study which was moved is the same one.
    own = [argument for argument in (*data.arguments, *arguments) if os.sep not in argument]
    if folder.is_dir() and beside.is_file() and (found := json.loads(beside.read_text(encoding="utf-8"))) != own:
        raise ValueError(f"{folder.name} was trained with {' '.join(found)}, not {' '.join(own)}: see --output_dir.")
    beside.write_text(json.dumps(own), encoding="utf-8")
    arguments = ("--max_train_steps", str(num_steps), *arguments)
    if is_finished(folder):
        found = read_arguments(folder)["max_train_steps"]
        if found != num_steps:
            raise ValueError(f"{steps} is {num_steps}, but {folder.name} was trained for {found}: see --output_dir.")
        return
    command = [sys.executable, str(script), *data.data_arguments, *data.arguments, "--output_dir", str(folder)]
    command += ["--seed", str(seed), "--checkpointing_steps", "500", "--checkpoints_total_limit", "1", *arguments]
    if any(folder.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "latest"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(command, check=True, preexec_fn=end_with_parent, pass_fds=[lock])


def trained_row(data, folder: Path) -> dict:
    """What a run has come to: its samples' measures, and the end of its logs."""
    pipeline = ECVAEPipeline.from_pretrained(folder).to(data.device)
    row = data.measure(sample_images(pipeline, data.num_samples, seed=1))
    row["reconstruction_variance"] = pipeline.vae.config.reconstruction_variance
    last = read_metrics(folder / METRICS_FILE)[-1]
    wanted = ("step", "training_seconds", "dual", "drift", "constraint", "tolerance", "langevin_drift_step")
    row |= {key: last[key] for key in wanted if key in last}
    events = folder / EVENTS_FILE
    row["rollbacks"] = sum(event["kind"] == "rollback" for event in read_metrics(events)) if events.is_file() else 0
    if pipeline.energy_model is not None:
        row["cosine_to_critic"] = cosine_to_critic(pipeline)
    return row


def cosine_to_critic(pipeline: ECVAEPipeline, num_samples: int = 256) -> float:
    """
    Mean cosine between the chain's move without its noise, x~ - x_0, and -grad f(x_0), which is all that a critic gives
    its generator. 1 at K = 1.
    """
    from ecvae_diffusers import EnergyCalibrator
    from ecvae_diffusers.energy import energy_and_gradient

    samples = pipeline(num_samples, generator=torch.Generator().manual_seed(2), output_type="pt").images * 2 - 1
    calibrator = EnergyCalibrator(pipeline.energy_model, pipeline.scheduler)
    still = samples.new_zeros(len(pipeline.scheduler), *samples.shape)
    move = calibrator.run_chain(samples, noise=still) - samples
    _, gradient = energy_and_gradient(pipeline.energy_model, samples)
    return torch.cosine_similarity(move.flatten(1), -gradient.flatten(1)).mean().item()


def curve(folder: Path) -> list[dict]:
    """The evaluations of a run, each with the seconds of training that it took to come there."""
    seconds = {record["step"]: record["training_seconds"] for record in read_metrics(folder / METRICS_FILE)}
    return [row | {"training_seconds": seconds[row["step"]]} for row in read_metrics(folder / EVALUATIONS_FILE)]


def plot_curves(runs: dict[str, list[Path]], path: Path) -> None:
    """Frechet distance over iterations and over time, of each setting's seeds: a line each, their median thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for index, (name, folders) in enumerate(runs.items()):
        curves = [curve(folder) for folder in folders]
        length = min(map(len, curves))
        middle = {
            key: [statistics.median(rows[i][key] for rows in curves) for i in range(length)]
            for key in ("step", "training_seconds", "frechet_distance")
        }
        for axis, key, scale in zip(axes, ("step", "training_seconds"), (1, 60)):
            for rows in curves:
                x, y = [row[key] / scale for row in rows], [row["frechet_distance"] for row in rows]
                axis.plot(x, y, color=f"C{index}", alpha=0.3)
            x = [value / scale for value in middle[key]]
            axis.plot(x, middle["frechet_distance"], "o-", markersize=3, color=f"C{index}", label=name)
    axes[0].set(xlabel="iterations", ylabel="Frechet distance of 2,048 samples", yscale="log")
    axes[1].set(xlabel="minutes of training")
    axes[0].legend()
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)
    plt.close(figure)


class Results:
    """
    Rows in a JSON lines file: those that are there already are not made again, but for those that were measured with
    another number of samples.

    Args:
        path (`Path`): The file.
        num_samples (`int`, *optional*): Samples that a row is measured with.
    """

    def __init__(self, path: Path, num_samples: int | None = None):
        self.path, self.num_samples = path, num_samples
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict]:
        """All but a last one that a kill cut off."""
        return read_metrics(self.path) if self.path.is_file() else []

    def is_current(self, row: dict) -> bool:
        return self.num_samples is None or row.get("num_samples", row.get("num_generated")) == self.num_samples

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
        Make the rows that are missing.

        Args:
            settings, seeds: A row each.
            make (`Callable`): Setting and seed -> what a row holds.
            iterations (`int` or `dict`, *optional*): Of every row, or of each setting's.
            arguments (`dict`, *optional*): Those of each setting's command line, which its rows keep.

        Raises:
            ValueError: if a row is there that is of another number of `iterations` or other `arguments`. Rows that have
                none, of before they were kept, are taken as they are.
        """
        for seed in seeds:
            for name in settings:
                there = [row for row in self.rows() if row["setting"] == name and row["seed"] == seed]
                length = iterations[name] if isinstance(iterations, dict) else iterations
                for row in there:
                    if length is not None and row.get("iterations", length) != length:
                        raise ValueError(
                            f"{name!r} is to be of {length} iterations, but {self.path.name} holds it after "
                            f"{row['iterations']}: see --max_train_steps, or choose another --output_dir."
                        )
                    wanted = None if arguments is None else arguments[name]
                    if wanted is not None and row.get("arguments", wanted) != wanted:
                        raise ValueError(
                            f"{name!r} is {' '.join(wanted)}, but {self.path.name} holds it with "
                            f"{' '.join(row['arguments'])}: choose another --output_dir."
                        )
                if any(map(self.is_current, there)):
                    continue
                started = time.time()
                row = make(name, seed)
                # A row may have seconds of its own, such as those of one image.
                row = {"setting": name, "seed": seed, "seconds": round(time.time() - started), **row}
                row["num_samples"] = self.num_samples
                if length is not None:
                    row["iterations"] = length
                if arguments is not None:
                    row["arguments"] = arguments[name]
                # As the file is by now: another study may have written to it, or have made the same row.
                with alone(self.path.with_suffix(".lock")):
                    others = [other for other in self.rows() if (other["setting"], other["seed"]) != (name, seed)]
                    self.write([*others, row])
                print(json.dumps(row), flush=True)

    def of(self, name: str) -> list[dict]:
        return sorted((row for row in self.rows() if row["setting"] == name), key=lambda row: row["seed"])


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def versions() -> str:
    return (
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} of {os.cpu_count()} "
        f"cores, {platform.machine()}"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=device_here,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where samples and features are computed; training is where Accelerate has it",
    )


def parser(doc: str, settings: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument("--max_train_steps", type=positive, default=1500)
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings, metavar="NAME")
    parser.add_argument(
        "--fashion_mnist", type=source, metavar="DATASET", help="Hub id or folder: this instead of digits"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    add_device(parser)
    return parser


def data_name(args: argparse.Namespace) -> str:
    return Digits.name if args.fashion_mnist is None else FashionMNIST.name


def open_results(args: argparse.Namespace, study: str) -> Results:
    """The rows of a study on its data."""
    data = Digits if args.fashion_mnist is None else FashionMNIST
    return Results(args.output_dir / f"{study}_{data.name}.jsonl", data.num_samples)


def load_data(args: argparse.Namespace):
    if args.fashion_mnist is not None:
        return FashionMNIST(args.output_dir, args.fashion_mnist, args.device)
    return Digits(args.output_dir, args.device)
