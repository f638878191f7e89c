# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""
Early stopping, and the features that a run is measured with. The figures of a run: tests/training/test_observation.py.
"""

import math

import pytest
import torch
from training_runs import TINY, run, succeed, weights, write_images
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.evaluation.while_training import Patience
from ecvae_diffusers.training.run.log import read_metrics


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", count=32)


def test_early_stopping_saves_the_best(images, tmp_path):
    """
    Nothing is learned, so the first evaluation is the best. Cut off between two of which neither was better, it
    resumes.
    """
    out = tmp_path / "out"
    arguments = [
        "--train_data_dir", images, "--output_dir", out, *TINY, "--learning_rate", 1e-12, "--log_steps", 2,
        "--evaluation_steps", 2, "--evaluation_samples", 24, "--early_stopping_patience", 2, "--checkpointing_steps", 4,
    ]  # fmt: skip
    succeed(*arguments, "--max_train_steps", 4)
    result = succeed(*arguments, "--max_train_steps", 40, "--resume_from_checkpoint", "latest")
    lines = read_metrics(out / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    (event,) = read_metrics(out / "events.jsonl")
    assert event["kind"] == "early_stopping" and "step 2" in event["message"]
    assert event["message"] in result.stderr and "Saving: " in result.stderr
    expected, found = weights(out / "best"), weights(out)
    assert all(torch.equal(expected[key], found[key]) for key in expected)  # the energy model too
    assert ECVAEPipeline.from_pretrained(out).vae.config.reconstruction_variance > 0


def test_patience():
    patience = Patience("kernel_distance", 2)
    values = ((1, 0.5), (2, 0.2), (3, 0.3))
    assert [patience.is_best({"kernel_distance": value}, step) for step, value in values] == [True, True, False]
    assert not patience.is_over and patience.best_step == 2
    assert not patience.is_best({"kernel_distance": math.nan}, 4) and patience.is_over
    patience.cut(3)  # gone back: what was measured since doesn't count, the best one is saved and stays
    assert not patience.is_over and patience.best_step == 2
    resumed, other = Patience("kernel_distance", 3), Patience("frechet_distance", 3)
    for one in (resumed, other):
        one.load_state_dict(patience.state_dict())
    # Values of another metric can't be compared.
    assert resumed.state_dict() == patience.state_dict() and not other.has_best and other.since == []
    assert not other.is_best({"frechet_distance": math.nan}, 1) and not other.has_best
    assert other.is_best({"frechet_distance": 9.0}, 2) and not other.is_best({"frechet_distance": 10.0}, 3)


def test_features_that_are_none_are_named(images, tmp_path):
    result = run(
        "--train_data_dir", images, "--output_dir", tmp_path / "out", *TINY, "--evaluation_steps", 5,
        "--evaluation_features", tmp_path,
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    assert "--evaluation_features" in result.stderr.splitlines()[-1]


def test_features_of_a_transformers_model(images, tmp_path):
    """DINOv2's class with random weights: its own can't be fetched here."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "dino")
    succeed(
        "--train_data_dir", images, "--output_dir", tmp_path / "out", *TINY, "--max_train_steps", 2,
        "--evaluation_steps", 2, "--evaluation_samples", 32, "--evaluation_features", tmp_path / "dino",
    )  # fmt: skip
    (line,) = read_metrics(tmp_path / "out" / "evaluations.jsonl")
    assert line["features"] == str(tmp_path / "dino") and line["frechet_distance"] > 0
