# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The DDPM that the study of hours compares with has equal parameters and resumes."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline

from ecvae_diffusers import AutoencoderEC, EnergyModel
from studies import hours


def test_ddpm_has_as_many_parameters_as_both_networks():
    patch, channels = hours.REFERENCE
    sizes = {"sample_size": 32, "in_channels": 3, "block_out_channels": channels, "patch_size": patch}
    ours = (
        AutoencoderEC(**sizes, latent_channels=hours.LATENTS).num_parameters() + EnergyModel(**sizes).num_parameters()
    )
    assert hours.small_unet().num_parameters() == pytest.approx(ours, rel=0.1)


def test_ddpm_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(hours, "BATCH", 4)
    data = SimpleNamespace(train_images=torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8))
    first = hours.Ddpm(data, tmp_path, seed=0)
    first.train_to(2)
    second = hours.Ddpm(data, tmp_path, seed=0)
    assert (second.step, second.seconds) == (2, first.seconds)
    assert all(torch.equal(*pair) for pair in zip(first.unet.parameters(), second.unet.parameters()))
    assert second.optimizer.state_dict()["state"][0]["step"] == 2
    second.train_to(3)
    assert second.seconds > first.seconds
    # The pipeline that draws has the averaged weights.
    drawn = DDIMPipeline.from_pretrained(tmp_path / "pipeline").unet
    assert all(torch.equal(*pair) for pair in zip(second.average.module.parameters(), drawn.parameters()))
    assert not all(torch.equal(*pair) for pair in zip(second.unet.parameters(), drawn.parameters()))
