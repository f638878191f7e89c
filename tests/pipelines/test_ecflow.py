# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What ECFlowPipeline computes, what it refuses, and that a stranger can load it."""

import pytest
import torch
from diffusers import DiffusionPipeline
from without_package import run_without_package

from ecvae_diffusers import ECFlowPipeline, EnergyModel, FlowEC, LangevinScheduler


WITHOUT_PACKAGE = """
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
print(json.dumps(pipe(batch_size=2, generator=generator, output_type="pt").images.tolist()))
"""


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
    assert torch.equal(pipe(batch_size=3, generator=generator(), output_type="pt").images, expected)
    cooler = pipe(batch_size=3, generator=generator(), temperature=0.5, output_type="latent").images
    torch.testing.assert_close(cooler, 0.5 * latents)


def test_output_types(pipe):
    images = pipe(batch_size=2, generator=generator(), output_type="pt").images
    assert [image.size for image in pipe(batch_size=2).images] == [(16, 16)] * 2
    array = pipe(batch_size=2, generator=generator(), output_type="np").images
    assert array.shape == (2, 16, 16, 1)
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), images)
    assert torch.equal(pipe(batch_size=2, generator=generator(), output_type="pt", return_dict=False)[0], images)


def test_a_generator_an_image(pipe):
    both = pipe(batch_size=2, generator=[generator(0), generator(1)], output_type="pt").images
    for seed in range(2):
        alone = pipe(generator=[generator(seed)], output_type="pt").images
        torch.testing.assert_close(both[seed : seed + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_onloads_all_that_sampling_needs(pipe, offload_type):
    """Noted is what the hooks bring, since here the device that they bring it to is the one that it is on."""
    expected = pipe(batch_size=2, generator=generator(), output_type="pt").images
    pipe.flow.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )
    brought = set()
    for name, module in pipe.flow.named_modules():
        if hasattr(module, "_diffusers_hook"):
            group = module._diffusers_hook.get_hook("group_offloading").group
            onload = group.onload_
            tensors = [p for m in group.modules for p in m.parameters()] + list(group.parameters)

            def note(onload=onload, tensors=tensors):
                brought.update(map(id, tensors))
                return onload()

            group.onload_ = note
    assert torch.equal(pipe(batch_size=2, generator=generator(), output_type="pt").images, expected)
    assert [name for name, p in pipe.flow.named_parameters() if id(p) not in brought] == []


def test_a_flow_whose_weights_are_stored_in_8_bits_computes_in_16(pipe):
    expected = pipe(batch_size=2, generator=generator(), output_type="pt").images
    pipe.flow.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert pipe.flow.levels[0].blocks[0].coupling.net[0].weight.dtype == torch.float8_e4m3fn
    images = pipe(batch_size=2, generator=generator(), output_type="pt").images
    assert images.dtype == torch.bfloat16
    torch.testing.assert_close(images.float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("batch_size", {"batch_size": 0}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"latents": torch.zeros(2, 256, 1, 1), "temperature": 0.5}),
        ("latents", {"latents": torch.full((1, 256, 1, 1), 3e38)}),
        ("latents", {"latents": torch.zeros(2, 16)}),
        ("generator", {"batch_size": 2, "generator": [generator()] * 3}),
    ],
)
def test_wrong_input(pipe, name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        pipe(**arguments)


def test_loads_with_the_package_and_without(pipe, tmp_path):
    """By its class, by the generic one, and in a process that has only diffusers."""
    expected = pipe(batch_size=2, generator=generator(), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    for loaded in (ECFlowPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is ECFlowPipeline
        assert torch.equal(loaded(batch_size=2, generator=generator(), output_type="pt").images, expected)
    assert ECFlowPipeline.from_pretrained(tmp_path, energy_model=None).energy_model is None
    found, _ = run_without_package(WITHOUT_PACKAGE, str(tmp_path))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-6)
    card = (tmp_path / "README.md").read_text()
    assert "normalizing flow" in card and "ECFlowPipeline.from_pretrained" in card and "Restoration" not in card
