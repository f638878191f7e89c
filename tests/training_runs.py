"""Runs of the training script as a user runs it: in a subprocess, on image folders made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file


SCRIPT = Path(__file__).parents[1] / "training" / "train_ecvae.py"
TINY = ["--resolution", "16", "--latent_channels", "4", "--block_out_channels", "16", "16", "--train_batch_size", "8"]


def write_images(folder: Path, count: int = 24, mode: str = "L", size: int = 16) -> Path:
    """Disks of random place and size: something a network can begin to learn."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    folder.mkdir(parents=True)
    for i in range(count):
        cx, cy, radius = rng.uniform(4, size - 4), rng.uniform(4, size - 4), rng.uniform(2, 5)
        disk = np.where((x - cx) ** 2 + (y - cy) ** 2 < radius**2, 255, 20).astype(np.uint8)
        PIL.Image.fromarray(disk).convert(mode).save(folder / f"{i:03d}.png")
    return folder


def run(*arguments, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def succeed(*arguments, **kwargs) -> subprocess.CompletedProcess:
    result = run(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name in ("vae", "energy_model")
        for key, value in load_file(output_dir / name / "diffusion_pytorch_model.safetensors").items()
    }
