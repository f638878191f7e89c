# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A disk that fills at any moment of a run: a message, and what was whole stays whole. Needs the right to mount. Slow: `make test-slow`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from training_runs import TINY, weights, write_images

from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run.checkpoints import checkpoints, damage
from ecvae_diffusers.training.run.launch import run_script


PLACES = 5


@pytest.fixture
def disk(tmp_path):
    """A small file system, and a function that sets its size."""
    (place := tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(place)], check=True)
    # Lazily: weights that were read may still be mapped.
    subprocess.run(["umount", "-l", str(place)], check=True)


def copied_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those that `weights` reads stay mapped to their files, which would keep the disk in use."""
    return {name: value.clone() for name, value in weights(folder).items()}


def test_a_disk_that_fills_at_any_write(disk, tmp_path):
    place, set_size = disk
    data, out = write_images(tmp_path / "data"), place / "run"

    def train() -> None:
        given = [
            "--train_data_dir", data, "--output_dir", out, *TINY, "--max_train_steps", 6, "--log_steps", 1, "--save_images_steps", 3,
            "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest",
        ]  # fmt: skip
        run_script("train_ecvae.py", train_ecvae.parse_args(given), train_ecvae.run)

    train()
    expected = copied_weights(out)
    whole = sum(path.stat().st_blocks // 2 for path in out.rglob("*"))
    stopped_at = set()
    for part in range(PLACES):
        shutil.rmtree(out, ignore_errors=True)
        set_size(8 + whole * part // PLACES)
        with pytest.raises(SystemExit) as raised:
            train()
        message, left = raised.value.code, checkpoints(out)
        assert message.startswith("train_ecvae.py: error: ") and "can't be written" in message and "\n" not in message
        assert all(damage(checkpoint) is None for checkpoint in left)
        assert not left or left[-1].name in message
        stopped_at.add(len(left))
        for log in out.glob("*.jsonl"):
            # The last line may be cut off.
            assert all("step" in json.loads(line) for line in log.read_text().splitlines()[:-1])
        set_size(64 * 1024)
        train()
        found = copied_weights(out)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(stopped_at) > 2
