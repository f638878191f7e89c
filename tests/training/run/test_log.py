# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Logs: what is no record is skipped, and what is no number is null. Bars, the stopwatch, and grids of images."""

import json
import math

import pytest
import torch
from training_runs import TINY, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.evaluation.while_training import Evaluator
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run import log as module
from ecvae_diffusers.training.run.log import RunLog, Stopwatch, duration, progress, read_metrics
from ecvae_diffusers.training.run.pictures import image_grid


def test_lines_that_are_no_records_are_skipped(tmp_path, caplog):
    """Bytes that are not UTF-8, lines that are no JSON and no object; and the last one, cut off."""
    path = tmp_path / "metrics.jsonl"
    broken = [b"\xff\xfe\x00\x01", b"{", b"[1]", b'{"step": "x"}']
    path.write_bytes(b"\n".join([b'{"step": 1}', *broken, b'{"step": 2}', b'{"step": 3}', b'{"step": 4, "cut']))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert len([record for record in caplog.records if "metrics.jsonl" in record.getMessage()]) == len(broken)
    log = RunLog(path)
    log.cut(2)
    log.write(step=3, loss=math.inf)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_early_stopping_if_no_evaluation_gives_a_number(tmp_path, monkeypatch):
    """There is no best model then: the last one is saved."""
    measures = {"frechet_distance": math.nan, "kernel_distance": math.nan}
    monkeypatch.setattr(Evaluator, "measure", lambda self, exported, output_dir, step: dict(measures))
    out = tmp_path / "out"
    given = [
        "--train_data_dir", write_images(tmp_path / "images"), "--output_dir", out, *TINY, "--max_train_steps", 20,
        "--evaluation_steps", 1, "--evaluation_samples", 24, "--early_stopping_patience", 2,
    ]  # fmt: skip
    train_ecvae.run(train_ecvae.parse_args(given))
    (event,) = read_metrics(out / "events.jsonl")
    assert event["kind"] == "early_stopping" and event["step"] == 2 and "_distance" in event["message"]
    assert not (out / "best").exists()
    ECVAEPipeline.from_pretrained(out)
    assert [record["kernel_distance"] for record in read_metrics(out / "evaluations.jsonl")] == [None, None]


def test_a_bar_names_its_work(capsys):
    assert list(progress("Chains", range(3), delay=0)) == [0, 1, 2]
    assert "Chains: " in capsys.readouterr().err
    assert list(progress("Chains", range(3))) == [0, 1, 2]  # short work
    assert list(progress("Chains", range(3), shown=False, delay=0)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_the_stopwatch_counts_only_while_it_runs_and_continues_after_loading(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    watch, resumed = Stopwatch(), Stopwatch()
    watch.start()
    now += 2
    with watch.paused():
        now += 50
        resumed.load_state_dict(watch.state_dict())
    now += 3
    assert watch.seconds == 5 and resumed.seconds == 2
    resumed.start()
    now += 1
    assert resumed.seconds == 3


def test_image_grid_places_images_row_by_row():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    grid = image_grid(images, num_columns=3, scale=2)
    assert grid.size == ((3 * 5 - 1) * 2, (2 * 5 - 1) * 2)
    assert grid.getpixel((1, 1)) == 0 and grid.getpixel((11, 1)) == 64 and grid.getpixel((11, 11)) == 255
    assert grid.getpixel((8, 1)) == 255  # the line between two images


@pytest.mark.parametrize(
    "seconds, words", [(0.4, "0 s"), (89, "89 s"), (150, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
