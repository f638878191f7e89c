# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Output folders: one run at a time, and nothing is left of one that was refused."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from ecvae_diffusers.atomic import WriteError
from ecvae_diffusers.evaluation import evaluate, evaluate_restoration
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run.folder import LOCK_FILE, locked


HOLDER = """
import filelock, sys
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
SCRIPTS = [train_ecvae, evaluate, evaluate_restoration]


@pytest.fixture
def start(pipe, images, tmp_path):
    """Starts a script, which looks at its output folder before it reads images."""

    def start(script, output_dir: Path) -> None:
        given = ["--image_dir" if script is evaluate_restoration else "--train_data_dir", images]
        if script is not train_ecvae:
            pipe.save_pretrained(tmp_path / "model")
            given += ["--pretrained_model_name_or_path", tmp_path / "model"]
        script.run(script.parse_args([*map(str, given), "--output_dir", str(output_dir)]))

    return start


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.rpartition(".")[2])
def test_one_run_a_folder_which_can_be_written(script, start, tmp_path):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out" / LOCK_FILE)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="--output_dir .* in use"):
            start(script, tmp_path / "out")
    finally:
        holder.kill()  # with which the lock is gone, though the file is not
        holder.communicate()
    assert (tmp_path / "out" / LOCK_FILE).exists()
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="in use"), locked(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="out"), locked(tmp_path / "file" / "out"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def acquire(self):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(tmp_path / "out" / LOCK_FILE))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with locked(tmp_path / "out"):
        (tmp_path / "out" / "metrics.jsonl").touch()
    assert (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
    arguments = ["--train_data_dir", "no such folder", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="train_data_dir"):
        train_ecvae.run(train_ecvae.parse_args(arguments))
    assert not (tmp_path / "out").exists()
