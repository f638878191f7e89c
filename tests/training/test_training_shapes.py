# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Runs on images that are not square, or have other channels than gray and RGB."""

import json

import PIL.Image
import pytest
import torch
from training_runs import assert_same_weights, train_tiny, without_end, write_shapes

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.training.config import DataConfig, default_channels
from ecvae_diffusers.training.tasks.flow_config import ECFlowConfig
from ecvae_diffusers.training.tasks.vae_config import ECVAEConfig


SHAPES = {"24x40 gray": ((24, 40), 1), "48x32 RGB": ((48, 32), 3), "20x20x6": (20, 6)}


def sides(sample_size) -> list[int]:
    return [sample_size] if isinstance(sample_size, int) else list(sample_size)


@pytest.mark.parametrize("name", SHAPES)
def test_trains_resumes_and_restores(name, tmp_path):
    """A resumed run ends with the same bits, and its answers agree with their measurement."""
    sample_size, channels = SHAPES[name]
    data = write_shapes(tmp_path / "data", sample_size, channels)
    height, width = (2 * sides(sample_size))[:2]
    arguments = ["--resolution", *sides(sample_size), "--checkpointing_steps", 2, "--random_flip"]
    records = train_tiny(data, tmp_path / "whole", 4, *arguments)
    assert len(records) == 4
    cut = without_end(tmp_path / "whole", tmp_path / "cut", 4)
    train_tiny(data, cut, 4, *arguments, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "whole", cut)
    pipeline = ECVAEPipeline.from_pretrained(tmp_path / "whole")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(output_type="pt").images.shape == (1, channels, height, width)
    restoration = ECVAERestorationPipeline.from_pipe(pipeline)
    restoration.set_progress_bar_config(disable=True)
    hole = torch.zeros(1, 1, height, width)
    hole[..., height // 4 : height // 2, width // 4 : width // 2] = 1
    image = torch.rand(1, channels, height, width)
    output = restoration(image, mask_image=hole, noise_std=0.0, num_inference_steps=5, output_type="pt")
    assert output.residual.max() <= 1e-5
    for kind in ("samples", "reconstructions", "chain"):
        sheet = PIL.Image.open(max((tmp_path / "whole" / kind).iterdir()))
        assert sheet.mode == ("L" if channels == 1 else "RGB")


def test_a_flow_halves_as_often_as_its_sides(tmp_path):
    data = write_shapes(tmp_path / "data", 20, 6)
    train_tiny(data, tmp_path / "run", 2, "--resolution", 12, 20, script="train_flow")
    flow = ECFlowPipeline.from_pretrained(tmp_path / "run").flow
    assert flow.config.sample_size == [12, 20] and flow.config.in_channels == 6
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["resolution"] == [12, 20]
    for resolution, num_levels in ((32, 3), (20, 2), ([24, 40], 3), ([48, 22], 1)):
        assert ECFlowConfig(data=DataConfig(resolution=resolution)).resolved().model.num_levels == num_levels


def test_random_crops_and_augmentations_of_oblong_images(tmp_path):
    data = write_shapes(tmp_path / "data", (40, 64), 1)
    arguments = ["--resolution", 16, 24, "--image_size", 20, "--adaptive_augmentation", "--validation_fraction", 0.25]
    train_tiny(data, tmp_path / "run", 2, *arguments)
    assert ECVAEPipeline.from_pretrained(tmp_path / "run").vae.config.sample_size == [16, 24]


def test_default_channels_go_down_to_4_px_by_even_halves():
    for resolution, patch_size, expected in (
        (32, 1, [64, 128, 256, 256]), (32, 2, [64, 128, 256]), (8, 1, [64, 128]), ([24, 40], 1, [64, 128, 256]),
        ([48, 32], 1, [64, 128, 256, 256]), (20, 1, [64, 128, 256]), (22, 1, [64, 128]), ([64, 24], 2, [64, 128]),
    ):  # fmt: skip
        assert default_channels(resolution, patch_size) == expected


def test_squares_are_one_number_however_they_are_given():
    for given in (16, [16], (16, 16)):
        config = ECVAEConfig(data=DataConfig(resolution=given))
        assert config.data.resolution == config.flat()["resolution"] == 16
    assert DataConfig(resolution=(16, 24)).resolution == [16, 24]
    assert DataConfig(resolution=[16, 24], image_size=20).decoded_size == [20, 30]
