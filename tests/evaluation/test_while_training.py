# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""
Early stopping, and the features that a run is measured with. The figures of a run: tests/training/test_observation.py.
"""

import math

import pytest
import torch
from training_runs import TINY, succeed, weights, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.evaluation.while_training import Patience, load_features
from ecvae_diffusers.training.run.log import read_metrics


def test_early_stopping_saves_the_best(tmp_path):
    """
    Nothing is learned, so the first evaluation is the best. Cut off between two of which neither was better, it
    resumes.
    """
    out = tmp_path / "out"
    arguments = [
        "--train_data_dir", write_images(tmp_path / "images", count=32), "--output_dir", out, *TINY, "--learning_rate", 1e-12,
        "--log_steps", 2, "--evaluation_steps", 2, "--evaluation_samples", 24, "--early_stopping_patience", 2,
        "--checkpointing_steps", 4,
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


def test_features_that_are_none_are_named(tmp_path):
    for wrong in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="--evaluation_features"):
            load_features(str(wrong), torch.device("cpu"))
