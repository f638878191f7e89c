# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One broken thing ends no run: damaged checkpoints and logs, folders that are in use or can't be written, values that are no numbers."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import TINY, TINY_DECODER, TINY_FLOW, metrics, weights, write_autoencoder, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.atomic import WriteError
from ecvae_diffusers.evaluation import evaluate, evaluate_restoration
from ecvae_diffusers.evaluation.while_training import Evaluator, Patience
from ecvae_diffusers.report import report
from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.run.checkpoints import weights_only
from ecvae_diffusers.training.run.folder import (
    MANIFEST,
    checkpoints,
    damage,
    find_checkpoint,
    read_metrics,
    remove_old_checkpoints,
    write_manifest,
)
from ecvae_diffusers.training.run.lock import LOCK_FILE, locked


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
    given = [
        "--train_data_dir",
        images,
        "--output_dir",
        output_dir,
        *TINY,
        "--log_steps",
        1,
        "--checkpointing_steps",
        2,
    ]
    train_ecvae.run(train_ecvae.parse_args([*given, "--max_train_steps", num_steps, *arguments]))


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
    assert not (stopped / LOCK_FILE).exists()


@pytest.mark.parametrize("fault", [*FAULTS, replace_by_a_link_to_another])
def test_any_damaged_file_is_found(fault, cut):
    newest = cut / "checkpoint-4"
    whole = shutil.copytree(newest, cut / "whole")
    for name in [*STATE_FILES, MANIFEST]:
        if name == MANIFEST and fault in (Path.unlink, replace_by_a_dangling_link):
            continue  # then it is a checkpoint of before there was one
        same = (newest / name).read_bytes() == (cut / "checkpoint-2" / name).read_bytes()
        fault(newest / name)
        if not (fault is replace_by_a_link_to_another and same):
            assert find_checkpoint(cut, "latest").name == "checkpoint-2", name
            with pytest.raises(ValueError, match="checkpoint-4"):
                find_checkpoint(cut, "checkpoint-4")
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert find_checkpoint(cut, "latest") == newest


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_found_without_a_manifest(name, fault, cut):
    """As of a run that an earlier version has begun."""
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
    """As on a full disk: here no file may be longer than 40 kB. The older checkpoint is whole, and resumed from."""
    shutil.rmtree(cut / "checkpoint-4")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="checkpoint-4"):
            resume(images, cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
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
    torch.save({"state": Evil(tmp_path / "ran")}, cut / "checkpoint-4" / name)
    assert find_checkpoint(cut, "latest").name == "checkpoint-2"
    write_manifest(cut / "checkpoint-4")
    # What Accelerate asks for of a registered object.
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(cut / "checkpoint-4" / name, weights_only=False)
    if name in ("optimizer.bin", "custom_checkpoint_2.pkl"):
        with pytest.raises(ValueError, match="checkpoint-4") as raised:
            resume(images, cut)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
SCRIPTS = ["train_ecvae", "train_flow", "calibrate_decoder", "evaluate", "evaluate_restoration"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("models") / "autoencoder")


@pytest.fixture
def start(images, stopped, autoencoder):
    """Starts a script with data that is not there: what is told of its output folder is told before anything is opened."""

    def start(script: str, output_dir: Path, data: Path = Path("no such folder")) -> None:
        own = {
            "train_ecvae": (train_ecvae, TINY),
            "train_flow": (train_flow, TINY_FLOW),
            "calibrate_decoder": (calibrate_decoder, [*TINY_DECODER, "--pretrained_model_name_or_path", autoencoder]),
            "evaluate": (evaluate, ["--pretrained_model_name_or_path", stopped]),
            "evaluate_restoration": (evaluate_restoration, ["--pretrained_model_name_or_path", stopped]),
        }
        module, arguments = own[script]
        data_argument = "--image_dir" if script == "evaluate_restoration" else "--train_data_dir"
        data = images if script == "evaluate_restoration" else data
        given = map(str, [*arguments, data_argument, data, "--output_dir", output_dir])
        module.run(module.parse_args(list(given)))

    return start


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_run_a_folder(script, start, tmp_path):
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / LOCK_FILE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="--output_dir .* in use"):
            start(script, tmp_path / "out")
    finally:
        holder.kill()  # with which the lock is gone, though the file is not
        holder.communicate()
    assert lock.exists()
    with locked(tmp_path / "out"):
        assert lock.read_text().startswith(f"process {os.getpid()} ")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_can_not_be_written_is_told_first(script, start, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="out"):
        start(script, tmp_path / "file" / "out")


def test_a_run_that_is_refused_leaves_nothing(start, tmp_path):
    with pytest.raises(ValueError, match="train_data_dir"):
        start("train_ecvae", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lines_that_are_no_records_are_left_out(cut, images, finished, caplog, capsys, monkeypatch):
    """Bytes that are no UTF-8, lines that are no JSON and no object, in all logs; and the last one, cut off."""
    expected = metrics(cut)
    for name in ("metrics.jsonl", "energies.jsonl", "events.jsonl"):
        lines = (cut / name).read_bytes().splitlines() if (cut / name).is_file() else []
        lines[1:1] = [b"\xff\xfe\x00\x01", b"{", b"[1]", b'{"step": "x"}']
        (cut / name).write_bytes(b"\n".join(lines) + b'\n{"step": 4, "cut')
    assert read_metrics(cut / "metrics.jsonl") == expected
    assert len([record for record in caplog.records if "metrics.jsonl" in record.getMessage()]) == 4
    monkeypatch.setattr(sys, "argv", ["report.py", str(cut)])
    report.main()
    assert "Wrote" in capsys.readouterr().out
    resume(images, cut)
    assert_same(weights(cut), finished)
    assert [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_early_stopping_where_no_evaluation_gives_a_number(images, tmp_path, monkeypatch):
    """There is no best model then: the last one is saved."""
    measures = {"kernel_distance": math.nan, "coverage": math.nan}
    monkeypatch.setattr(Evaluator, "measure", lambda self, exported, output_dir, step: dict(measures))
    train(
        images, tmp_path / "out", 20, "--evaluation_steps", 1, "--evaluation_samples", 24, "--early_stopping_patience", 2,
    )  # fmt: skip
    (event,) = read_metrics(tmp_path / "out" / "events.jsonl")
    assert event["kind"] == "early_stopping" and event["step"] == 2 and "kernel_distance" in event["message"]
    assert not (tmp_path / "out" / "best").exists()
    ECVAEPipeline.from_pretrained(tmp_path / "out")
    for line in (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert record["coverage"] is None


def test_patience_knows_whether_there_is_a_best_one():
    patience = Patience("kernel_distance", 2)
    assert not patience.is_best({"kernel_distance": math.nan}, 1) and not patience.has_best
    assert patience.is_best({"kernel_distance": 0.5}, 2) and patience.has_best
