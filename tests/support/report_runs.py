"""Folders of runs as the training scripts leave them, for the tests of reports."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image


ARGUMENTS = {
    "calibration": "energy", "max_dual": 100.0, "drift_tolerance": 0.0074, "calibration_tolerance": "auto",
    "langevin_drift_step": 0.2, "latent_channels": 32, "resolution": 16, "max_train_steps": 2000, "seed": 0,
}  # fmt: skip


def record(step: int, rng: np.random.Generator) -> dict:
    """A logged step of a healthy run."""
    decay, noise = math.exp(-step / 300), rng.normal(1, 0.05)
    energies = {"energy_real": -0.4, "energy_samples": -0.39 + decay, "energy_targets": -0.395 + decay}
    return {
        "step": step, "epoch": step // 25,
        "reconstruction": (10 + 90 * decay) * noise, "kl": 11 * noise, "kl_weight": 1.0, "active_units": 30.0,
        "gradient_norm": 60 * noise, "gradient_norm_max": 80 * noise, "learning_rate": 5e-4,
        "images_per_second": 250 * noise, "peak_memory_gib": 0.7, "data_spread": 0.4, "sample_spread": 0.4 * noise,
        "constraint": (0.015 + 0.3 * decay) * noise, "noise_floor": 0.0013, "tolerance": 0.0153,
        "drift": (0.0074 + 0.03 * decay) * noise, "dual": 20 + 40 * decay,
        **energies, **{f"{name}_std": 0.05 for name in energies},
        "energy_gradient_norm": noise, "energy_learning_rate": 5e-4, "langevin_drift_step": 0.2,
    }  # fmt: skip


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def write_run(folder: Path, num_steps: int = 2000, arguments: dict = ARGUMENTS, change=lambda one: one) -> Path:
    """A run's arguments and metrics; `change` gets each logged step."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "training_args.json").write_text(json.dumps(arguments))
    write_lines(folder / "metrics.jsonl", [change(record(step, rng)) for step in range(10, num_steps + 1, 10)])
    return folder


def write_pictures(folder: Path, kinds: tuple[str, ...], steps: range, size: tuple[int, int] = (135, 135)) -> None:
    for kind in kinds:
        (folder / kind).mkdir()
        for step in steps:
            pixels = np.random.default_rng(step).integers(0, 256, size[::-1], dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / kind / f"step-{step:06d}.png")
