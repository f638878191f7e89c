# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The kernel's field points from samples to data, and targets lie as far away as the tolerance allows."""

import pytest
import torch

from ecvae_diffusers import AutoencoderEC
from studies.kernel_study import HEALTHY_MOVE, encoder, kernel_field, kernel_targets, patches, pixels


def test_samples_are_pulled_to_the_data_around_them():
    torch.manual_seed(0)
    samples, data = torch.randn(1, 64, 2), torch.randn(1, 64, 2) + torch.tensor([3.0, 0.0])
    field = kernel_field(samples, data)
    assert field[0, :, 0].mean() > 3 * field[0, :, 1].mean().abs()
    # Each place has a field of its own.
    both = kernel_field(torch.cat([samples, data]), torch.cat([data, samples]))
    assert torch.allclose(both[0], field[0], atol=1e-5)
    assert both[1, :, 0].mean() < 0


@pytest.mark.parametrize("features", [[pixels], [patches], [encoder], [patches, encoder]])
def test_targets_move_by_the_length_of_the_tolerance(features):
    torch.manual_seed(0)
    vae = AutoencoderEC(sample_size=16, in_channels=1, latent_channels=4, block_out_channels=(8, 16))
    samples, real = torch.rand(8, 1, 16, 16) - 1, torch.rand(8, 1, 16, 16)
    move = kernel_targets(features, vae, samples, real) - samples
    assert move.square().flatten(1).sum(1).mean().sqrt().item() == pytest.approx(HEALTHY_MOVE, rel=1e-4)
    # Samples are darker than the data.
    assert move.mean() > 0
    assert all(weight.requires_grad for weight in vae.parameters())
