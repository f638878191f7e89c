"""Runs of the training script as a user runs it: in a subprocess, on image folders made here."""

import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ecvae_diffusers.checks import height_and_width


SCRIPTS = Path(__file__).parents[2] / "training"
SCRIPT = SCRIPTS / "train_ecvae.py"
TASKS = {"train_ecvae": "vae", "train_flow": "flow", "calibrate_decoder": "decoder"}
TINY_FLOW = [
    "--resolution", "16", "--num_levels", "2", "--steps_per_level", "2", "--hidden_channels", "16",
    "--energy_block_out_channels", "16", "16", "--train_batch_size", "8",
]  # fmt: skip
# Next to --pretrained_model_name_or_path.
TINY_DECODER = ["--resolution", "16", "--energy_block_out_channels", "16", "16", "--train_batch_size", "8"]
TINY = ["--resolution", "16", "--latent_channels", "4", "--block_out_channels", "16", "16", "--train_batch_size", "8"]

OF_SCRIPT = {"train_ecvae": TINY, "train_flow": TINY_FLOW, "calibrate_decoder": TINY_DECODER}


def write_images(folder: Path, count: int = 24, mode: str = "L", size: int = 16) -> Path:
    """Disks of random place and size."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    folder.mkdir(parents=True)
    for i in range(count):
        cx, cy, radius = rng.uniform(4, size - 4), rng.uniform(4, size - 4), rng.uniform(2, 5)
        disk = np.where((x - cx) ** 2 + (y - cy) ** 2 < radius**2, 255, 20).astype(np.uint8)
        PIL.Image.fromarray(disk).convert(mode).save(folder / f"{i:03d}.png")
    return folder


def write_shapes(folder: Path, sample_size: int | tuple[int, int], in_channels: int, count: int = 16) -> Path:
    """Ramps of random direction, as pictures of 1 or 3 channels or as arrays of others."""
    rng, (height, width) = np.random.default_rng(0), height_and_width(sample_size)
    y, x = np.mgrid[:height, :width] / max(height, width)
    folder.mkdir(parents=True)
    for i in range(count):
        turns = rng.uniform(0, 2 * np.pi, in_channels)
        bands = np.stack([0.5 + 0.3 * (np.cos(turn) * x + np.sin(turn) * y) for turn in turns], axis=-1)
        bands = np.uint8(bands * 255)
        if in_channels in (1, 3):
            PIL.Image.fromarray(bands.squeeze(-1) if in_channels == 1 else bands).save(folder / f"{i:03d}.png")
        else:
            np.save(folder / f"{i:03d}.npy", bands)
    return folder


def write_autoencoder(folder: Path) -> Path:
    """An `AutoencoderKL` of 16 px RGB images and 8 px latents, its weights as they are at first."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, sample_size=16,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def train(*arguments, script: str = "train_ecvae") -> None:
    """Run a training script in this process, as if it was the first. What it refuses is a `SystemExit` with one line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script_module(script).main(list(map(str, arguments)))


def train_tiny(images: Path, output_dir: Path, num_steps: int, *arguments, script: str = "train_ecvae") -> list[dict]:
    """Train a tiny model in this process, and return its metrics of each step. Arguments override the tiny ones."""
    given = ["--train_data_dir", images, "--output_dir", output_dir, "--max_train_steps", num_steps, "--log_steps", 1]
    train(*given, *OF_SCRIPT[script], *arguments, script=script)
    return metrics(output_dir)


@functools.cache
def script_module(name: str):
    """A training script with all that it imports, which is no business of the garbage collector at the end of each run."""
    module, task = (f"ecvae_diffusers.training.{one}" for one in (name, f"tasks.{TASKS[name]}"))
    importlib.import_module(task)
    # Pictures and chains of as many images as usual would cost more than the steps of these runs.
    pictures = importlib.import_module("ecvae_diffusers.training.run.pictures")
    pictures.NUM_GRID_IMAGES, pictures.NUM_ENERGIES, pictures.FEWEST_ENERGIES = 16, 8, 8
    gc.collect()
    gc.freeze()
    return importlib.import_module(module)


def run(*arguments, ranks=1, launcher=None, environment=(), script=SCRIPT) -> subprocess.CompletedProcess:
    """Run a script; with a `launcher`, or with variables of the environment, in a process that is started for it."""
    if launcher is None and not environment:
        return fork_server.run(script, *arguments, ranks=ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **dict(environment)}
    command = [*(launcher or (sys.executable,)), str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def succeed(*arguments, **kwargs) -> subprocess.CompletedProcess:
    result = run(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


# Runs the script that it is given, and sends a signal to its process a moment after its first new checkpoint, or in the middle of
# the save after that.
KILLING = """
import os, random, runpy, sys, threading, time
from pathlib import Path

_, number, seed, folder, script = sys.argv[:5]
folder, rng = Path(folder), random.Random(int(seed))

def newest() -> int:
    # From the names alone: the run deletes old ones meanwhile.
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)

def kill() -> None:
    first = newest()
    while newest() == first:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    while int(seed) % 2 and not any(folder.glob(".checkpoint-*")):
        time.sleep(0.001)
    os.kill(os.getpid(), int(number))

threading.Thread(target=kill, daemon=True).start()
sys.argv = sys.argv[4:]
runpy.run_path(script, run_name="__main__")
"""


# Iterations are counted as they are run: the fault is over when it has been lived through. It is on the last rank alone:
# the others get it with the averaged gradient, and all must decide the same.
FAULTY = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run import divergence, launch

divergence.HEALTHY_STATE_STEPS = 4
faulty = range(int(sys.argv[2]), int(sys.argv[3]))

class FaultyTrainer(launch.Trainer):
    iteration = 0

    def train_step(self, batches):
        hook = None
        if self.iteration in faulty and self.accelerator.is_last_process:
            hook = next(self.task.energy_model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
        scalars = super().train_step(batches)
        if hook is not None:
            hook.remove()
        self.iteration += 1
        return scalars

launch.Trainer = FaultyTrainer
try:
    train_ecvae.run(train_ecvae.parse_args(sys.argv[4:]))
except (launch.Stopped, FloatingPointError) as message:
    sys.exit(str(message))
"""


def run_with_fault(
    data: Path, output_dir: Path, first: int, last: int, *arguments, before: str = "", ranks: int = 1
) -> subprocess.CompletedProcess:
    """24 steps, with an energy gradient that is not a number in the iterations from `first` to `last` (excluded), after other code."""
    script = output_dir.with_suffix(".py")
    script.write_text(before + FAULTY)
    return run(
        SCRIPT.parent, first, last, "--train_data_dir", data, "--output_dir", output_dir, *TINY, "--max_train_steps", 24,
        "--log_steps", 2, *arguments, script=script, ranks=ranks,
    )  # fmt: skip


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        # "." is an autoencoder of diffusers, saved alone.
        for name in ("vae", "flow", "energy_model", ".")
        if (path := output_dir / name / "diffusion_pytorch_model.safetensors").is_file()
        for key, value in load_file(path).items()
    }


def without_end(whole: Path, output_dir: Path, step: int) -> Path:
    """A copy of a run that lacks its last checkpoint, of `step`, and its final model."""
    shutil.copytree(whole, output_dir)
    shutil.rmtree(output_dir / f"checkpoint-{step}")
    for path in output_dir.glob("diffusion_pytorch_model.safetensors"):
        path.unlink()
    for name in ("vae", "flow"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    return output_dir


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_same_start(start: Path, output_dir: Path, prefix: str = "") -> None:
    """Weights named `prefix...` are those of `start`, after steps of rates almost 0; vectors of power iterations turn."""
    expected, found = weights(start), weights(output_dir)
    names = [key for key in expected if key.startswith(prefix) and not key.endswith(("_u", "_v"))]
    assert names
    for key in names:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-6)
