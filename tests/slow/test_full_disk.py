# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A disk that fills at any moment of a run: a message, and what was whole stays whole. Needs the right to mount. Slow: `make test-slow`."""

import json
import subprocess

import pytest
import torch
from training_runs import TINY, run, succeed, weights, write_images

from ecvae_training.output import checkpoints, damage


PLACES = 12


@pytest.fixture
def disk(tmp_path):
    """A small file system, and a function that sets its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(option: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")

    mount("size=64m")
    yield place, lambda size: mount(f"remount,size={size}k")
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_at_any_write(disk, tmp_path):
    place, set_size = disk
    data, out = write_images(tmp_path / "data"), place / "run"
    arguments = [
        "--train_data_dir", data, *TINY, "--max_train_steps", 6, "--log_steps", 1, "--save_images_steps", 3, "--checkpointing_steps",
        2, "--evaluation_steps", 3, "--evaluation_samples", 24, "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    succeed(*arguments, "--output_dir", out)
    expected = weights(out)
    whole = sum(path.stat().st_blocks // 2 for path in out.rglob("*"))
    stopped_at = set()
    for part in range(PLACES):
        subprocess.run(["rm", "-r", str(out)], check=True)
        set_size(8 + whole * part // PLACES)
        result = run(*arguments, "--output_dir", out)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
        message = result.stderr.strip().splitlines()[-1]
        assert message.startswith("train_ecvae.py: error: ") and "can't be written" in message
        left = checkpoints(out)
        stopped_at.add(len(left))
        assert all(damage(checkpoint) is None for checkpoint in left)
        assert not left or left[-1].name in message
        for log in out.glob("*.jsonl"):
            lines = log.read_text().splitlines()
            assert all("step" in json.loads(line) for line in lines[:-1])
        set_size(64 * 1024)
        succeed(*arguments, "--output_dir", out)
        found = weights(out)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(stopped_at) > 2
