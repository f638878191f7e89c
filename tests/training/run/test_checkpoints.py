# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: damage is found, the newest whole one is resumed from, and none of them runs code."""

import json
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


def replace_by_a_link_to_another(path: Path) -> None:
    path.unlink()
    path.symlink_to(Path("..") / "checkpoint-2" / path.name)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = [truncate, Path.unlink, replace_by_a_dangling_link, replace_by_a_folder]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def train(images: Path, output_dir: Path, num_steps: int, *arguments) -> None:
    given = ["--train_data_dir", images, "--output_dir", output_dir, "--log_steps", 1, "--checkpointing_steps", 2]
    train_ecvae.run(train_ecvae.parse_args([*given, *TINY, "--max_train_steps", num_steps, *arguments]))


def resume(images: Path, output_dir: Path, *arguments) -> None:
    train(images, output_dir, 6, "--resume_from_checkpoint", "latest", *arguments)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of the run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(images, out, 6)
    return weights(out)


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory) -> Path:
    """A run of four steps, which has come to its end."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    train(images, out, 4)
    return out


@pytest.fixture
def cut(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "cut")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_has_these_files_and_is_whole(stopped):
    found = {path.name for path in (stopped / "checkpoint-4").iterdir()}
    assert found == {*STATE_FILES, "pipeline", MANIFEST} and damage(stopped / "checkpoint-4") is None
    assert not (stopped / ".lock").exists()


@pytest.mark.parametrize("fault", [*FAULTS, replace_by_a_link_to_another])
def test_any_damaged_file_is_found(fault, cut):
    newest = cut / "checkpoint-4"
    whole = shutil.copytree(newest, cut / "whole")
    for name in [*STATE_FILES, MANIFEST]:
        if name == MANIFEST and fault in (Path.unlink, replace_by_a_dangling_link):
            continue  # then it is a checkpoint of 0.1
        same = (newest / name).read_bytes() == (cut / "checkpoint-2" / name).read_bytes()
        fault(newest / name)
        if not (fault is replace_by_a_link_to_another and same):
            assert find_checkpoint(cut, "latest").name == "checkpoint-2", name
            with pytest.raises(ValueError, match="checkpoint-4"):
                find_checkpoint(cut, "checkpoint-4")
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert find_checkpoint(cut, "latest") == newest


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_found_without_a_manifest(name, fault, cut):
    """As in a run of 0.1."""
    (cut / "checkpoint-4" / MANIFEST).unlink()
    assert find_checkpoint(cut, "latest").name == "checkpoint-4"
    fault(cut / "checkpoint-4" / name)
    assert find_checkpoint(cut, "latest").name == "checkpoint-2"


@pytest.mark.parametrize("has_manifest", [True, False])
def test_latest_resumes_from_the_newest_whole_one(has_manifest, cut, images, finished, caplog):
    truncate(cut / "checkpoint-4" / "optimizer.bin")
    for checkpoint in checkpoints(cut):
        if not has_manifest:
            (checkpoint / MANIFEST).unlink()
    resume(images, cut)
    assert_same(weights(cut), finished)
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
    resume(images, cut, "--checkpoints_total_limit", 1)
    assert_same(weights(cut), finished)
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
    resume(images, cut)
    assert_same(weights(cut), finished)


class Evil:
    """A pickle of it runs code when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [name for name in STATE_FILES if not name.endswith(".safetensors")])
def test_a_checkpoint_runs_no_code(name, cut, images, tmp_path):
    path = cut / "checkpoint-4" / name
    torch.save({"state": Evil(tmp_path / "ran")}, path)
    assert find_checkpoint(cut, "latest").name == "checkpoint-2"
    write_manifest(cut / "checkpoint-4")
    # What Accelerate asks for of a registered object.
    accelerator = SimpleNamespace(load_state=lambda folder: torch.load(path, weights_only=False))
    with pytest.raises(ValueError, match="checkpoint-4") as raised:
        load_checkpoint(accelerator, cut / "checkpoint-4")
    assert "\n" not in str(raised.value)
    if name in ("optimizer.bin", "custom_checkpoint_2.pkl"):
        with pytest.raises(ValueError, match="checkpoint-4"):
            resume(images, cut)
    assert not (tmp_path / "ran").exists()


def test_a_run_whose_logs_are_damaged(cut, images, finished, capsys, monkeypatch):
    """It is reported, and resumed with whole logs."""
    for name in ("metrics.jsonl", "energies.jsonl", "events.jsonl"):
        lines = (cut / name).read_bytes().splitlines() if (cut / name).is_file() else []
        lines[1:1] = [b"\xff\xfe\x00\x01", b"{", b"[1]", b'{"step": "x"}']
        (cut / name).write_bytes(b"\n".join(lines) + b'\n{"step": 4, "cut')
    monkeypatch.setattr(sys, "argv", ["report.py", str(cut)])
    report.main()
    assert "Wrote" in capsys.readouterr().out
    resume(images, cut)
    assert_same(weights(cut), finished)
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
