# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Group normalizations with few channels per group run on contiguous memory, and compute what they computed before."""

import copy
import pickle

import pytest
import torch
from diffusers import AutoencoderKL

from ecvae_diffusers import AutoencoderEC
from ecvae_diffusers.training.tasks.networks import use_contiguous_norms


def networks():
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "in_channels": 3, "latent_channels": 4, "block_out_channels": (16, 128)}
    yield AutoencoderEC(**sizes)
    yield AutoencoderEC(**sizes, num_class_embeds=3)
    # The attention in the middle normalizes sequences.
    yield AutoencoderKL(
        block_out_channels=(16, 128), norm_num_groups=8, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


@pytest.mark.parametrize("plain", networks(), ids=["autoencoder", "classes", "attention"])
def test_contiguous_norms_change_only_rounding(plain):
    plain.to(memory_format=torch.channels_last)
    changed = copy.deepcopy(plain)
    use_contiguous_norms(changed)
    images = torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last)
    found = []
    for network in (plain, changed):
        with torch.autocast("cpu", torch.bfloat16):
            output = network.decode(network.encode(images).latent_dist.mean).sample
        output.float().square().sum().backward()
        found.append((output, network.encoder.conv_in.weight.grad))
    for one, other in zip(*found):
        assert torch.nn.functional.mse_loss(one, other) < 1e-3 * one.float().square().mean()


def test_only_norms_with_few_channels_per_group_are_contiguous():
    network = next(networks()).to(memory_format=torch.channels_last)
    use_contiguous_norms(network)
    seen = {}

    def look(module, args, output):
        inside, after = args[0], output
        seen[module.num_channels // module.num_groups] = (inside.is_contiguous(), after)

    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        network.encode(torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last))
    assert {width: is_contiguous for width, (is_contiguous, _) in seen.items()} == {4: True, 16: False}
    assert all(after.is_contiguous(memory_format=torch.channels_last) for _, after in seen.values())


def test_a_network_with_contiguous_norms_can_be_pickled():
    network = next(networks())
    use_contiguous_norms(network)
    assert pickle.loads(pickle.dumps(network)).state_dict().keys() == network.state_dict().keys()
