"""The larger configs take their first steps, and those of accelerate launch several processes. Slow: `make test-slow`."""

import os
import subprocess
import sys

import pytest
from config_runs import CONFIGS, two_steps
from training_runs import SCRIPT, metrics, write_images

from ecvae_diffusers.training.run.log import read_arguments


# Runs the script that stands after it with fewer pictures and without the bound on the likelihood, which takes minutes at 256 px, and
# prints the most memory that its process held, in bytes.
MEASURED = """
import resource, runpy, sys
from pathlib import Path
from ecvae_diffusers.training.run import pictures
from ecvae_diffusers.training.tasks.vae import ECVAETask
ECVAETask.measure = lambda self, generator, images: {}
pictures.NUM_GRID_IMAGES = pictures.FEWEST_ENERGIES = 4
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    "name", ["fashion_mnist", "noto_emoji", "cifar10", "stl10", "imagenet32", "lsun_church64", "celeba64"]
)
def test_large_configs_train(name, tmp_path):
    two_steps(name, tmp_path)


def test_256_px_train_in_little_memory(tmp_path):
    """One step of two images: of a batch of 8, training fits into 8 GiB."""
    own = ["--max_train_steps", 1, "--train_batch_size", 2, "--langevin_steps", 2, "--dataloader_num_workers", 0]
    printed = two_steps("celebahq256", tmp_path, *own, launcher=(sys.executable, "-c", MEASURED))
    assert int(printed.split()[-1]) < 4 * 2**30


@pytest.mark.parametrize(
    "name, machines",
    [
        ("one_gpu", [["--num_processes", "1"]]),
        ("eight_gpus", [["--num_processes", "2"]]),
        ("two_machines", [["--num_processes", "2", "--machine_rank", str(rank)] for rank in (0, 1)]),
    ],
)
def test_accelerate_configs_launch(name, machines, tmp_path):
    """On the CPU: what differs from GPUs is the exchange between processes, gloo instead of NCCL."""
    arguments = [
        "--config", CONFIGS / "digits.yaml", "--train_data_dir", write_images(tmp_path / "images", count=8),
        "--output_dir", tmp_path / "out", "--max_train_steps", 2, "--train_batch_size", 2,
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(CONFIGS / "accelerate" / f"{name}.yaml"), "--main_process_port", "29519"]
    launch += ["--main_process_ip", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    commands = [[*launch, *machine, str(SCRIPT), *map(str, arguments)] for machine in machines]
    running = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True, env=environment) for one in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    assert metrics(tmp_path / "out")[-1]["step"] == 2
    assert read_arguments(tmp_path / "out")["launch"]["images_per_step"] == (2 if name == "one_gpu" else 4)
