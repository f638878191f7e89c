"""The convolution that stands for a convolution and a pooling is equal to the two, borders and gradients included."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ecvae_diffusers.models.energy_model import PooledConv2d


def one_after_the_other(conv, sample):
    return F.avg_pool2d(nn.Conv2d.forward(conv, sample), 2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_is_the_two_in_turn(channels_last):
    torch.manual_seed(0)
    conv = PooledConv2d(3, 5, 3, padding=1).double()
    sample = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    if channels_last:
        conv, sample = conv.to(memory_format=torch.channels_last), sample.to(memory_format=torch.channels_last)
    sample.requires_grad_()
    results = [function(conv, sample) for function in (PooledConv2d.__call__, one_after_the_other)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(results[0])
    wanted = (sample, conv.weight, conv.bias)
    gradients = [torch.autograd.grad(result, wanted, direction) for result in results]
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
