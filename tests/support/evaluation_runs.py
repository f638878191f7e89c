"""Evaluations as a user runs them, at toy size."""

import json
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import training_runs
from accelerate.state import AcceleratorState, GradientState
from training_runs import write_images

from ecvae_diffusers.evaluation import evaluate


SCRIPT = Path(__file__).resolve().parents[2] / "training" / "evaluate.py"
SMALL = [
    "--num_samples", 60, "--num_reference", 40, "--num_test", 30, "--num_likelihood_images", 10, "--importance_samples", 20,
    "--batch_size", 20, "--seeds", 0, 1,
]  # fmt: skip


def run(*arguments, launcher=None) -> subprocess.CompletedProcess:
    return training_runs.run(*arguments, launcher=launcher, script=SCRIPT)


def measure(output_dir: Path, *arguments) -> dict:
    """An evaluation in this process, as if it was the first. Returns its `evaluation.json`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    evaluate.main(list(map(str, [*arguments, "--output_dir", output_dir])))
    return json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))


def write_files(make_pipeline, folder: Path) -> Path:
    """A model, training and test images of disks, and stripes, which are something else."""
    make_pipeline().save_pretrained(folder / "model")
    images = [PIL.Image.open(path) for path in sorted(write_images(folder / "all", 80).iterdir())]
    for i, image in enumerate(images):
        place = folder / ("train" if i < 48 else "test")
        place.mkdir(exist_ok=True)
        image.save(place / f"{i}.png")
    (folder / "stripes").mkdir()
    for i in range(12):
        stripes = np.where((np.mgrid[:16, :16][i % 2] + i) % 4 < 2, 255, 0).astype(np.uint8)
        PIL.Image.fromarray(stripes).save(folder / "stripes" / f"{i}.png")
    return folder


def arguments_for(files: Path) -> list:
    return [
        "--pretrained_model_name_or_path", files / "model", "--train_data_dir", files / "train", "--test_data_dir",
        files / "test", "--out_of_distribution", f"stripes={files / 'stripes'}", *SMALL,
    ]  # fmt: skip
