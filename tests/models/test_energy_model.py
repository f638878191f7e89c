# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests of `EnergyModel`, and of the gradient that Langevin chains follow."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from energies import seeded
from model_tests import ModelTests, images, trained_parameters, unsettle

from ecvae_diffusers import EnergyModel
from ecvae_diffusers.energy import energy_and_gradient
from ecvae_diffusers.models.energy_model import PooledConv2d


CONFIGS = {
    "spectral_norm": {"num_scales": 2, "act_fn": "silu"},
    "plain": {"spectral_norm": False, "act_fn": "gelu", "layers_per_block": 2},
    "classes": {"num_class_embeds": 3, "num_scales": 2},
    "patches": {"patch_size": 4, "spectral_norm": False, "block_out_channels": (8,)},
}


def tiny(sample_size: int | tuple[int, int] = 16, in_channels: int = 1, **kwargs) -> EnergyModel:
    torch.manual_seed(0)
    kwargs = {"block_out_channels": (8, 12), **kwargs}
    return EnergyModel(sample_size=sample_size, in_channels=in_channels, **kwargs)


@pytest.fixture(params=CONFIGS)
def energy_model(request) -> EnergyModel:
    return unsettle(tiny(**CONFIGS[request.param]), images(3))


class TestEnergyModelModel(ModelTests):
    @pytest.fixture
    def model(self, energy_model):
        return energy_model

    def sample(self):
        return images(3)

    def outputs(self, model, sample):
        return [model(sample).energy]

    def loss(self, model, sample):
        """Data against other samples, with the regularization that bounds the loss."""
        energy = model(torch.cat([sample, torch.zeros_like(sample)])).energy
        real, fake = energy.chunk(2)
        return real.mean() - fake.mean() + 0.01 * (real.square().mean() + fake.square().mean())


@pytest.mark.parametrize(
    "in_channels, sample_size, block_out_channels, num_scales",
    [
        (1, 8, (8,), 1),
        (4, 16, (8, 12, 8), 3),
        (3, 32, (8,), 1),
        (1, 512, (4, 4, 4, 4, 4), 2),
        (1, (24, 40), (8, 12, 8), 3),
        (6, 20, (8, 8), 2),
    ],
)
def test_one_energy_per_image(in_channels, sample_size, block_out_channels, num_scales):
    model = tiny(sample_size, in_channels, block_out_channels=block_out_channels, num_scales=num_scales)
    with torch.no_grad():
        energy = model(images(2, in_channels, sample_size)).energy
        (first,) = model(images(1, in_channels, sample_size), return_dict=False)
    assert energy.shape == (2,) and first.shape == (1,) and torch.isfinite(energy).all() and energy[0] != energy[1]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_energy_is_float32(energy_model, dtype, autocast):
    """In any precision of the model, energies are summed and compared in float32."""
    energy_model.to(dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        energy = energy_model(images(3).to(dtype)).energy
    assert energy.shape == (3,) and energy.dtype == torch.float32
    assert torch.isfinite(energy).all()


@pytest.mark.parametrize("training", [False, True])
def test_energy_does_not_depend_on_neighbours(energy_model, training):
    """Nor does its gradient: the chain of one image must not depend on the other images of the batch."""
    batch = images(4)
    neighbours = torch.cat([batch[:1], images(3, seed=1)])
    # A copy each: in training mode, spectral norm moves with every forward pass.
    copies = [copy.deepcopy(energy_model).train(training) for _ in range(2)]
    assert torch.equal(copies[0](batch).energy[0], copies[1](neighbours).energy[0])
    sample = batch.requires_grad_()
    (gradient,) = torch.autograd.grad(energy_model.train(training)(sample).energy[0], sample)
    assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0


def energy_in_double(model: EnergyModel, sample: torch.Tensor) -> torch.Tensor:
    """The sum over the scales, without the cast to float32 that would drown the differences below."""
    size = sample.shape[-1]
    energy = torch.zeros(len(sample), dtype=torch.float64)
    for scale, network in enumerate(model.networks):
        width = 2**scale
        pooled = sample.reshape(*sample.shape[:2], size // width, width, size // width, width).mean(dim=(3, 5))
        energy = energy + network(pooled)
    return energy


@pytest.mark.parametrize(
    "act_fn, spectral_norm, num_scales",
    [("silu", True, 2), ("leaky_relu", False, 2), ("gelu", False, 1), ("relu", False, 1), ("mish", True, 1)],
)
def test_energy_and_its_gradient(act_fn, spectral_norm, num_scales):
    """
    The energy is the sum over networks on the image at full, half ... size. Its gradient, by central differences at every pixel in
    float64, whose error is h^2 and rounding / h: 1e-6 is generous.
    """
    model = tiny(8, 2, block_out_channels=(4, 6), act_fn=act_fn, spectral_norm=spectral_norm, num_scales=num_scales)
    unsettle(model, images(2, 2, 8)).double()
    sample = images(2, 2, 8).double()
    step = 1e-5
    energy, gradient = energy_and_gradient(model, sample)
    torch.testing.assert_close(energy.double(), energy_in_double(model, sample), rtol=1e-6, atol=1e-6)
    assert gradient.dtype == torch.float64 and gradient.shape == sample.shape and not gradient.requires_grad
    offsets = step * torch.eye(sample[0].numel(), dtype=torch.float64).view(-1, *sample.shape[1:])
    with torch.no_grad():
        for image, image_gradient in zip(sample, gradient, strict=True):
            difference = energy_in_double(model, image + offsets) - energy_in_double(model, image - offsets)
            numerical = (difference / (2 * step)).view_as(image_gradient)
            assert (numerical - image_gradient).abs().max() < 1e-6 * image_gradient.abs().max()


def test_spectral_norm_bounds_every_weight():
    """After enough power iterations, of which each training-mode forward pass takes one."""
    model = tiny(num_scales=2)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.mul_(7.0).add_(0.5 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
        model.train()
        for _ in range(100):
            model(images(1))
    convolutions = [module for module in model.eval().modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 11
    for conv in convolutions:
        value = torch.linalg.matrix_norm(conv.weight.detach().flatten(1).double(), ord=2)
        assert value.item() == pytest.approx(1.0, abs=0.01)


def test_spectral_norm_moves_in_training_mode_only():
    model = unsettle(tiny(), images(2))
    before = copy.deepcopy(model.state_dict())
    for training in (False, True):
        model.train(training)(images(2))
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert bool(moved) == training and all(name.endswith(("._u", "._v")) for name in moved)


def test_pooled_convolution_is_convolution_and_pooling():
    """Including borders and gradients."""
    torch.manual_seed(0)
    conv = PooledConv2d(3, 5, 3, padding=1).double()
    sample = torch.randn(2, 3, 8, 6, dtype=torch.float64).requires_grad_()
    results = conv(sample), F.avg_pool2d(nn.Conv2d.forward(conv, sample), 2)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, (sample, conv.weight, conv.bias), direction) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, value",
    [
        ("sample_size", 25), ("sample_size", 4), ("sample_size", 2**30), ("sample_size", (24, 15)), ("sample_size", (16, 4)),
         ("in_channels", 0), ("in_channels", 10**6),
        ("block_out_channels", ()), ("block_out_channels", (8, 10**6)), ("block_out_channels", (8, 8, 8, 8)),
        ("layers_per_block", 0), ("layers_per_block", 10**6), ("num_scales", 0), ("num_scales", 3),
    ],
)  # fmt: skip
def test_invalid_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        tiny(**{name: value})


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8), (1, 16, 16), (2, 1, 32, 32)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="`sample`"):
        tiny()(torch.zeros(shape))
