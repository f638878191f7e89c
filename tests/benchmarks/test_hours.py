# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The DDPM that the study of hours compares with has equal parameters and resumes; averages follow a power function."""

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


@pytest.mark.parametrize("width", [0.02, 0.1, 0.2])
def test_average_has_the_width_and_the_mean_of_the_power_function(width):
    gamma = hours.power(width)
    # The profile (gamma + 1) t^gamma on [0, 1] has mean (gamma + 1) / (gamma + 2).
    states = {step: {"weight": torch.tensor([1.0, step, step**2], dtype=torch.float64)} for step in range(1, 2001)}
    one, mean, square = hours.averaged(states, width)["weight"].tolist()
    assert one == pytest.approx(1, rel=1e-5)
    assert mean / 2000 == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
    assert (square - mean**2) ** 0.5 / 2000 == pytest.approx(width, rel=0.02)
