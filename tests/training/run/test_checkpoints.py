# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: damage is found, the newest whole one is resumed from, and none of them runs code."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_files import small_files
from training_runs import TINY, metrics, weights, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.atomic import WriteError
from ecvae_diffusers.report import report
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run.checkpoints import (
    MANIFEST,
    checkpoints,
    damage,
    find_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    write_manifest,
)


# Of a checkpoint of a run with an energy model and an average.
STATE_FILES = [
    "model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin", "scheduler.bin", "scheduler_1.bin",
    "random_states_0.pkl", *(f"custom_checkpoint_{i}.pkl" for i in range(5)),
]  # fmt: skip


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def train(images: Path, output_dir: Path, num_steps: int, *arguments) -> dict[str, torch.Tensor]:
    """The weights after a run that saves every two steps."""
    given = ["--train_data_dir", images, "--output_dir", output_dir, "--log_steps", 1, "--checkpointing_steps", 2]
    train_ecvae.run(train_ecvae.parse_args([*given, *TINY, "--max_train_steps", num_steps, *arguments]))
    return weights(output_dir)


def resume(images: Path, output_dir: Path, *arguments) -> dict[str, torch.Tensor]:
    return train(images, output_dir, 6, "--resume_from_checkpoint", "latest", *arguments)


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory) -> Path:
    """A run of four steps, which has come to its end."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    train(images, out, 4)
    return out


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of a run of six steps that nothing happened to."""
    return train(images, tmp_path_factory.mktemp("runs") / "finished", 6)


@pytest.fixture
def cut(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "cut")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("fault", [truncate, Path.unlink, replace_by_a_dangling_link, replace_by_a_folder])
def test_any_damaged_file_is_found(fault, stopped, cut):
    newest = cut / "checkpoint-4"
    assert {path.name for path in newest.iterdir()} == {*STATE_FILES, "pipeline", MANIFEST}
    assert find_checkpoint(cut, "latest") == find_checkpoint(cut, str(newest)) == newest
    for name in [*STATE_FILES, MANIFEST]:
        if name == MANIFEST and fault in (Path.unlink, replace_by_a_dangling_link):
            continue  # then it is a checkpoint of 0.1
        fault(newest / name)
        assert find_checkpoint(cut, "latest").name == "checkpoint-2", name
        with pytest.raises(ValueError, match="--resume_from_checkpoint.*checkpoint-4"):
            find_checkpoint(cut, "checkpoint-4")
        shutil.rmtree(newest)
        shutil.copytree(stopped / "checkpoint-4", newest)
    (newest / MANIFEST).unlink()
    assert damage(newest) is None
    fault(newest / "model.safetensors")
    assert fault is truncate or damage(newest) is not None


def test_what_is_damaged_in_a_run_that_is_resumed(cut, images, finished, caplog, capsys, monkeypatch):
    """It resumes from the newest whole checkpoint, with a warning; its logs are reported, and become whole."""
    truncate(cut / "checkpoint-4" / "optimizer.bin")
    for name in ("metrics.jsonl", "energies.jsonl", "events.jsonl"):
        lines = (cut / name).read_bytes().splitlines() if (cut / name).is_file() else []
        lines[1:1] = [b"\xff\xfe\x00\x01", b"{", b"[1]", b'{"step": "x"}']
        (cut / name).write_bytes(b"\n".join(lines) + b'\n{"step": 4, "cut')
    monkeypatch.setattr(sys, "argv", ["report.py", str(cut)])
    report.main()
    assert "Wrote" in capsys.readouterr().out
    assert_same(resume(images, cut), finished)
    assert [record["step"] for record in metrics(cut)] == [1, 2, 3, 4, 5, 6]
    (warned,) = [record.getMessage() for record in caplog.records if "checkpoint-4" in record.getMessage()]
    assert "optimizer.bin" in warned and "checkpoint-2" in warned and "\n" not in warned
    assert all(damage(checkpoint) is None for checkpoint in checkpoints(cut)) and len(checkpoints(cut)) == 3


def test_where_none_is_whole_nothing_is_touched(cut, images):
    for checkpoint in checkpoints(cut):
        truncate(checkpoint / "model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="--resume_from_checkpoint.*checkpoint-4.*model.safetensors"):
        resume(images, cut)
    assert before == {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}


def test_a_checkpoint_that_was_moved_away_and_linked(cut, images, finished, tmp_path):
    """It is resumed from, and where it is no longer kept, the link goes and what it leads to stays."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.move(cut / name, tmp_path / name)
        (cut / name).symlink_to(tmp_path / name)
    assert_same(resume(images, cut, "--checkpoints_total_limit", 1), finished)
    assert [path.name for path in cut.glob("*checkpoint-*")] == ["checkpoint-6"]
    assert all(damage(tmp_path / name) is None for name in ("checkpoint-2", "checkpoint-4"))
    (cut / "checkpoint-8").symlink_to(tmp_path / "not mounted")
    assert find_checkpoint(cut, "latest").name == "checkpoint-6"
    remove_old_checkpoints(cut, 1)
    assert [path.name for path in checkpoints(cut)] == ["checkpoint-8"]


def test_a_checkpoint_that_can_not_be_written(cut, images, finished):
    """The older checkpoint is whole, and resumed from."""
    shutil.rmtree(cut / "checkpoint-4")
    with small_files(), pytest.raises(WriteError, match="checkpoint-4"):
        resume(images, cut)
    assert {path.name for path in cut.glob("*checkpoint-*")} == {"checkpoint-2"}
    ECVAEPipeline.from_pretrained(cut)
    assert_same(resume(images, cut), finished)


class Evil:
    """A pickle of it runs code when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_2.pkl"])
def test_a_checkpoint_runs_no_code(name, cut, images, tmp_path):
    path = cut / "checkpoint-4" / name
    torch.save({"state": Evil(tmp_path / "ran")}, path)
    write_manifest(cut / "checkpoint-4")
    # What Accelerate asks for of a registered object.
    accelerator = SimpleNamespace(load_state=lambda folder: torch.load(path, weights_only=False))
    with pytest.raises(ValueError, match="checkpoint-4") as raised:
        load_checkpoint(accelerator, cut / "checkpoint-4")
    assert "\n" not in str(raised.value)
    if name.startswith("custom"):
        with pytest.raises(ValueError, match="checkpoint-4"):
            resume(images, cut)
    assert not (tmp_path / "ran").exists()
