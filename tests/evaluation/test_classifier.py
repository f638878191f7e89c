# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The classifier that judges samples of classes: what it learns, and what an evaluation says by it."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from evaluation_runs import SMALL, measure
from training_runs import train_tiny

from ecvae_diffusers.evaluation.schema import Evaluation
from ecvae_diffusers.hub.card import evaluation_table
from ecvae_diffusers.metrics import ClassifierFeatures, classifier


LEVELS = {"dark": 40, "light": 210}


def draw(level: int, seed: int) -> np.ndarray:
    """Noise around a level."""
    noise = np.random.default_rng(seed).normal(0, 10, (16, 16))
    return (level + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`train/` and `test/` with a sub-folder for each level."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 32), ("test", 16)):
        for name, level in LEVELS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = PIL.Image.fromarray(draw(level, 1000 * count + level + i))
                image.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(classifier, "NUM_STEPS", 40)


def test_learns_the_classes_and_is_always_the_same():
    labels = torch.arange(2).repeat(40)
    images = torch.stack([torch.from_numpy(draw((40, 210)[label], i))[None] for i, label in enumerate(labels)])
    state, features = torch.get_rng_state(), ClassifierFeatures(images[:60], labels[:60], list(LEVELS), progress=False)
    assert torch.equal(features.classify(features(images[60:])), labels[60:])
    again = ClassifierFeatures(images[:60], labels[:60], list(LEVELS), progress=False)
    assert torch.equal(again(images), features(images)) and features(images).shape == (80, 128)
    assert torch.equal(torch.get_rng_state(), state)
    for wrong in ((images, labels, ["dark"]), (images[..., :7, :7], labels, list(LEVELS))):
        with pytest.raises(ValueError, match="`class_names`|`images`"):
            ClassifierFeatures(*wrong)


def test_says_how_many_samples_are_of_the_asked_class(folders, tmp_path):
    """A model that has learned classes draws them. One whose names are exchanged draws the others."""
    arguments = [
        "--class_conditional",
        "--calibration",
        "none",
        "--learning_rate",
        5e-3,
        "--kl_weight",
        100,
        "--no-use_ema",
    ]
    train_tiny(folders / "train", tmp_path / "model", 80, *arguments)
    data = [
        "--train_data_dir",
        folders / "train",
        "--test_data_dir",
        folders / "test",
        "--features",
        "classifier",
        *SMALL,
    ]
    found = measure(tmp_path / "one", "--pretrained_model_name_or_path", tmp_path / "model", *data)
    classes = found["classes"]
    assert classes["protocol"] == {"num_classes": 2, "accuracy": 1.0}
    assert list(classes["measures"]) == ["all classes", "dark", "light"]
    assert all(one["named_as_asked"] > 0.9 for one in classes["measures"].values())
    assert classes["measures"]["dark"]["kernel_distance_std"] > 0
    assert "light: recognised as the class asked for" in evaluation_table(Evaluation.from_json(found))
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(config.read_text().replace("dark", "grim"))
    with pytest.raises(SystemExit, match="'grim'"):
        measure(tmp_path / "two", "--pretrained_model_name_or_path", tmp_path / "model", *data)
    (folders / "test" / "light").rename(folders / "test" / "bright")
    with pytest.raises(SystemExit, match="--test_split"):
        measure(tmp_path / "three", "--generated_image_dir", folders / "train", *data)
