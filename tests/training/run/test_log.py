# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Logs: what is no record is skipped, and what is no number is null."""

import json
import math

import pytest
from training_runs import TINY, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.evaluation.while_training import Evaluator
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run.log import RunLog, read_metrics


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
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "loss": None},
    ]  # fmt: skip


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
    for line in (out / "evaluations.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert record["kernel_distance"] is None
