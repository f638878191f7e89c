# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Evaluations of models whose images are not square and have more channels than a picture."""

import json

import PIL.Image
import torch
from evaluation_runs import SMALL, measure
from training_runs import write_shapes

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler
from ecvae_diffusers.evaluation import evaluate_restoration
from ecvae_diffusers.metrics import ClassifierFeatures
from ecvae_diffusers.metrics.classifier import build_network


def test_arrays_of_six_channels(tmp_path):
    """Features see all channels, and the pictures show the first three."""
    config = {"sample_size": (12, 20), "in_channels": 6, "block_out_channels": (8, 8)}
    ECVAEPipeline(
        vae=AutoencoderEC(latent_channels=4, reconstruction_variance=0.1, **config).eval(),
        energy_model=EnergyModel(**config).eval(),
        scheduler=LangevinScheduler(),
    ).save_pretrained(tmp_path / "model")
    data = [write_shapes(tmp_path / name, (12, 20), 6, count) for name, count in (("train", 40), ("test", 24))]
    found = measure(
        tmp_path / "out", "--pretrained_model_name_or_path", tmp_path / "model", "--train_data_dir", data[0],
        "--test_data_dir", data[1], *SMALL,
    )  # fmt: skip
    assert found["protocol"]["images"].startswith("12x20 px, 6 channel(s)")
    assert found["generation"]["protocol"]["num_features"] == 2 * 1280
    assert found["held_out"]["measures"]["num_trained_on"] == 24  # the same arrays
    assert PIL.Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
    evaluate_restoration.main(
        [
            "--pretrained_model_name_or_path", str(tmp_path / "model"), "--image_dir", str(data[1]), "--max_images", "2",
            "--output_dir", str(tmp_path / "restored"), "--num_inference_steps", "3", "--num_restorations", "2",
            "--noise_std", "0", "--device", "cpu",
        ]
    )  # fmt: skip
    rows = json.loads((tmp_path / "restored" / "restoration.json").read_text())["rows"]
    ours = {row["task"]: row["largest_relative_residual"] for row in rows if row["method"] == "ours"}
    assert set(ours) == {
        "box_inpainting",
        "random_inpainting",
        "super_resolution_x2",
        "super_resolution_x4",
        "deblurring",
    }
    assert max(ours.values()) <= 1e-4


def test_a_classifier_of_oblong_images(monkeypatch):
    monkeypatch.setattr("ecvae_diffusers.metrics.classifier.NUM_STEPS", 2)
    images = torch.randint(256, (8, 6, 12, 20), dtype=torch.uint8)
    features = ClassifierFeatures(images, torch.arange(8) % 2, ["a", "b"], progress=False)
    assert features(images).shape == (8, 128) and "12x20 px" in features.name
    assert build_network(1, 9, 31)(torch.zeros(1, 1, 9, 31)).shape == (1, 128)
