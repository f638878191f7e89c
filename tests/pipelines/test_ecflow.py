# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What ECFlowPipeline computes and refuses."""

import pytest
import torch

from ecvae_diffusers import ECFlowPipeline, EnergyModel, FlowEC, LangevinScheduler


@pytest.fixture
def pipe() -> ECFlowPipeline:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "in_channels": 1}
    flow = FlowEC(**sizes, num_levels=2, steps_per_level=1, hidden_channels=8).eval()
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, flow.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    energy_model = EnergyModel(**sizes, block_out_channels=(8, 8)).eval()
    return ECFlowPipeline(flow=flow, energy_model=energy_model, scheduler=LangevinScheduler())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_the_inverse_of_latents(pipe):
    """Clamped to the range of images; the latents are those of the generator, times the temperature."""
    latents = pipe(batch_size=3, generator=generator(), output_type="latent").images
    torch.testing.assert_close(latents, torch.randn(3, 256, 1, 1, generator=generator()))
    with torch.no_grad():
        expected = (pipe.flow.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pipe(latents=latents, output_type="pt").images, expected)
    assert torch.equal(pipe(batch_size=3, generator=generator(), output_type="pt", return_dict=False)[0], expected)
    cooler = pipe(batch_size=3, generator=generator(), temperature=0.5, output_type="latent").images
    torch.testing.assert_close(cooler, 0.5 * latents)
    assert [image.size for image in pipe(batch_size=2).images] == [(16, 16)] * 2
    both = pipe(batch_size=2, generator=[generator(0), generator(1)], output_type="pt").images
    for seed in range(2):
        alone = pipe(generator=[generator(seed)], output_type="pt").images
        torch.testing.assert_close(both[seed : seed + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("batch_size", {"batch_size": 0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"latents": torch.zeros(2, 256, 1, 1), "temperature": 0.5}),
        ("latents", {"latents": torch.full((1, 256, 1, 1), 3e38)}),
        ("latents", {"latents": torch.zeros(2, 16)}),
    ],
)
def test_wrong_input(pipe, name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        pipe(**arguments)
