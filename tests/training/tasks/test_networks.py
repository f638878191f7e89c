# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Group normalizations on contiguous memory compute what they computed before."""

import copy

import pytest
import torch

from ecvae_diffusers import AutoencoderEC
from ecvae_diffusers.training.tasks.networks import use_contiguous_norms


@pytest.mark.parametrize("num_class_embeds", [None, 3])
def test_contiguous_norms_change_only_rounding(num_class_embeds):
    torch.manual_seed(0)
    plain = AutoencoderEC(
        sample_size=16, in_channels=3, latent_channels=4, block_out_channels=(8, 16), num_class_embeds=num_class_embeds
    )
    plain.to(memory_format=torch.channels_last)
    changed = copy.deepcopy(plain)
    use_contiguous_norms(changed)
    images = torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last)
    noise, latents = torch.randn(4, 4, 1, 1), torch.randn(4, 4, 1, 1)
    found = []
    for network in (plain, changed):
        output = network(images, sample_posterior=True, posterior_noise=noise, prior_latents=latents)
        (output.sample.square().sum() + output.prior_sample.sum()).backward()
        found.append([output.sample, output.prior_sample, *(weight.grad for weight in network.parameters())])
    for one, other in zip(*found):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
