# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What ECVAEPipeline computes, what it costs, and what it refuses."""

import math
from collections import Counter

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from ecvae_diffusers import ECVAEPipeline, EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.pipelines import pipeline_ecvae
from ecvae_diffusers.posterior import PosteriorEnergy, posterior_chain


MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(count: int) -> list[torch.Generator]:
    return [generator(seed) for seed in range(count)]


def random_images(batch_size: int = 2, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Images on the 256 levels that PIL can hold, so that every format says the same."""
    shape = (batch_size, channels, 16, 16)
    return torch.randint(0, 256, shape, generator=generator(seed)).float() / 255


to_numpy, to_pil = VaeImageProcessor.pt_to_numpy, lambda images: VaeImageProcessor.numpy_to_pil(to_numpy(images))


def sample(pipe: ECVAEPipeline, output_type: str = "pt", **kwargs) -> torch.Tensor:
    kwargs = {"batch_size": 3, "generator": generator(), **kwargs}
    return pipe(output_type=output_type, **kwargs).images


@pytest.fixture
def calls(pipe) -> Counter:
    """Counts the forward passes of the pipeline's networks."""
    counter = Counter()
    for name, network in (*pipe.vae.named_children(), ("energy_model", pipe.energy_model)):
        network.register_forward_hook(lambda *_, name=name: counter.update([name]))
    return counter


def test_network_calls(pipe, calls):
    images = random_images()
    for call, expected in (
        (lambda: pipe(batch_size=5), {"decoder": 1}),
        (lambda: pipe(batch_size=3, output_type="latent"), {}),
        (lambda: pipe(batch_size=3, num_refinement_steps=4), {"decoder": 1, "energy_model": 4}),
        (lambda: pipe.reconstruct(images), {"encoder": 1, "decoder": 1}),
        (lambda: pipe.interpolate(images, images, num_steps=5), {"encoder": 2, "decoder": 1}),
        (lambda: pipe.score(images), {"energy_model": 1}),
    ):
        calls.clear()
        call()
        assert calls == expected


def test_large_batches_are_decoded_in_parts(pipe, calls, monkeypatch):
    """On a CPU, or where slicing asks for it: each image once, and the same images."""
    latents = torch.randn(7, 8, 1, 1, generator=generator())
    whole = sample(pipe, batch_size=7, latents=latents)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(sample(pipe, batch_size=7, latents=latents), whole, rtol=0, atol=1e-5)
    pipe.vae.disable_slicing()
    assert calls == {"decoder": 1 + 7}
    calls.clear()
    monkeypatch.setattr(pipeline_ecvae, "CPU_PART_BYTES", 3 * 16 * 16**2 * 4)  # three images of 16 channels
    torch.testing.assert_close(sample(pipe, batch_size=7, latents=latents), whole, rtol=0, atol=1e-5)
    assert calls == {"decoder": 3}


def test_latents_seeds_and_temperature(pipe):
    latents = sample(pipe, "latent")
    assert latents.shape == (3, 8, 1, 1)
    for batch_size in (1, np.int64(3)):  # 1 is the default: latents say themselves how many they are.
        assert torch.equal(pipe(batch_size=batch_size, latents=latents, output_type="pt").images, sample(pipe))
    assert not torch.equal(sample(pipe), sample(pipe, generator=generator(1)))
    torch.testing.assert_close(sample(pipe, "latent", temperature=0.5), 0.5 * latents)
    frozen = sample(pipe, temperature=0.0, generator=generators(3))
    assert torch.equal(frozen, frozen[:1].expand_as(frozen))
    for num_refinement_steps in (0, 3):
        kwargs = {"num_refinement_steps": num_refinement_steps, "output_type": "pt"}
        batch = pipe(batch_size=3, generator=generators(3), **kwargs).images
        singles = torch.cat([pipe(generator=one, **kwargs).images for one in generators(3)])
        torch.testing.assert_close(batch, singles, atol=1e-5, rtol=0)


def test_oversampling_keeps_the_lowest_energy_of_each_image_s_draws(pipe, calls):
    first, others = generator(), generator()
    draws = sample(pipe, batch_size=12, generator=others).unflatten(0, (3, 4))
    energies = torch.stack([pipe.score(each) for each in draws])
    best, calls_before = energies.argmin(1), calls.copy()
    assert len(set(best.tolist())) > 1  # not always the same draw
    kept = sample(pipe, generator=first, oversample=4)
    assert calls - calls_before == {"decoder": 1, "energy_model": 1}
    torch.testing.assert_close(kept, draws[torch.arange(3), best])
    # With a generator per image, an image does not depend on the others.
    batch = sample(pipe, generator=generators(3), oversample=4)
    singles = [sample(pipe, batch_size=1, generator=[one], oversample=4) for one in generators(3)]
    torch.testing.assert_close(batch, torch.cat(singles), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_out_and_in_says_the_same(make_pipeline, channels):
    pipe = make_pipeline(in_channels=channels)
    tensors, arrays, images = (sample(pipe, output_type) for output_type in ("pt", "np", "pil"))
    assert tensors.shape == (3, channels, 16, 16) and tensors.min() >= 0 and tensors.max() <= 1
    np.testing.assert_array_equal(arrays, to_numpy(tensors))
    for image, array in zip(images, arrays):
        assert image.mode == MODES[channels]
        levels = np.asarray(image, dtype=np.float64).reshape(16, 16, channels)
        assert np.abs(levels - 255 * array.astype(np.float64)).max() <= 0.5 + 1e-4

    images = random_images(channels=channels)
    expected = pipe.reconstruct(images, output_type="latent").images
    score = pipe.score(images)
    assert score.shape == (2,) and score.dtype == torch.float32 and not score.requires_grad
    torch.testing.assert_close(score, pipe.energy_model(2 * images - 1).energy.detach())
    formats = [to_numpy(images), list(to_numpy(images)), tuple(images), to_pil(images)]
    formats += [images[0], to_numpy(images)[0], to_pil(images)[0], images + 1e-6]
    if channels == 1:
        formats += [list(images[:, 0]), list(to_numpy(images)[..., 0]), images[0, 0], to_numpy(images)[0, ..., 0]]
    for image in formats:
        found = pipe.reconstruct(image, output_type="latent").images
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pipe.score(image), score[: len(found)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning_weight", [0.0, 0.5])
def test_refinement_is_the_calibrating_chain(make_pipeline, conditioning_weight):
    # The pipeline sets the number of steps, whatever the scheduler was saved with.
    pipe = make_pipeline(num_steps=7, conditioning_weight=conditioning_weight, noise_scale=0.01)
    latents = sample(pipe, "latent")
    refined = pipe(latents=latents, generator=generator(1), num_refinement_steps=3, output_type="pt").images

    scheduler = LangevinScheduler.from_config(pipe.scheduler.config, num_steps=3)
    calibrator = EnergyCalibrator(pipe.energy_model, scheduler)
    decoded = pipe.vae.decode(latents).sample
    chain_end = calibrator.run_chain(decoded, generator=generator(1))
    # It may be a calibrator's: with another length, its tolerance would be another.
    assert len(pipe.scheduler) == 7
    torch.testing.assert_close(refined, chain_end / 2 + 0.5, atol=1e-6, rtol=0)
    assert (chain_end - decoded).abs().max() > 1e-3


def test_a_training_energy_model_is_used_but_not_changed(pipe):
    """In training mode spectral norm takes a power iteration a call: scores would drift, and the model with them."""
    images = random_images()
    expected = pipe.score(images)
    pipe.energy_model.train()
    before = {name: value.clone() for name, value in pipe.energy_model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in pipe.energy_model.parameters()]
    torch.testing.assert_close(pipe.score(images), expected)
    pipe(num_refinement_steps=2)
    assert pipe.energy_model.training
    assert [parameter.requires_grad for parameter in pipe.energy_model.parameters()] == trained
    assert all(torch.equal(value, before[name]) for name, value in pipe.energy_model.state_dict().items())


def test_reconstruction_is_the_decoded_posterior_mean_or_a_draw(pipe):
    images = random_images()
    expected = pipe.vae(images * 2 - 1).sample / 2 + 0.5
    mean, drawn, same, other = (
        pipe.reconstruct(images, sample_posterior, generator=generator(seed), output_type="pt").images
        for sample_posterior, seed in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    torch.testing.assert_close(mean, expected)
    assert torch.equal(drawn, same) and not torch.equal(drawn, other) and not torch.equal(drawn, mean)


def test_refined_reconstructions_descend_to_the_likeliest_latents(pipe):
    images = random_images()

    def energies(steps: int) -> torch.Tensor:
        latents = pipe.reconstruct(images, num_refinement_steps=steps, output_type="latent").images
        error = (pipe.vae.decode(latents).sample - (images * 2 - 1)).square().flatten(1).sum(1)
        return error / (2 * 0.5) + latents.square().flatten(1).sum(1) / 2

    with torch.no_grad():
        falling = [energies(steps) for steps in (0, 1, 5, 50)]
    assert all((b < a).all() for a, b in zip(falling, falling[1:]))
    assert not pipe.vae.training and all(p.requires_grad for p in pipe.vae.parameters())


def test_refined_draws_are_ends_of_a_chain_on_the_posterior(pipe):
    images, num_steps = random_images(), 4
    kwargs = {"sample_posterior": True, "num_refinement_steps": num_steps, "variance": 2.0, "output_type": "latent"}
    found = pipe.reconstruct(images, generator=generator(0), **kwargs).images
    with torch.no_grad():
        posterior = pipe.vae.encode(images * 2 - 1).latent_dist
    draws = generator(0)
    latents = posterior.sample(generator=draws)
    energy = PosteriorEnergy(lambda z: pipe.vae.decode(z).sample, images * 2 - 1, posterior, variance=2.0)
    calibrator = EnergyCalibrator(energy, posterior_chain(num_steps))
    torch.testing.assert_close(found, energy.unwhiten(calibrator.run_chain(energy.whiten(latents), draws)))
    assert not torch.equal(found, pipe.reconstruct(images, generator=generator(1), **kwargs).images)


def test_interpolation_goes_from_one_reconstruction_to_the_other(pipe):
    image_a, image_b = random_images(seed=0), random_images(seed=1)
    path = pipe.interpolate(image_a, image_b, num_steps=5, output_type="pt").images.unflatten(0, (2, 5))
    for index, image in ((0, image_a), (-1, image_b)):
        ends = pipe.reconstruct(image, output_type="pt").images
        torch.testing.assert_close(path[:, index], ends, atol=1e-5, rtol=0)
    latents = pipe.interpolate(image_a, image_b, num_steps=5, output_type="latent").images.unflatten(0, (2, 5))
    torch.testing.assert_close(latents[:, 2], (latents[:, 0] + latents[:, 4]) / 2)
    assert len(pipe.interpolate(to_pil(image_a), to_pil(image_b)[0]).images) == 2 * 8
    with pytest.raises(RuntimeError):
        pipe.interpolate(random_images(3), random_images(2))


IMAGES, LATENTS = random_images(), torch.zeros(2, 8, 1, 1)
WRONG = [
    ("batch_size", lambda pipe: pipe(batch_size=0)),
    ("temperature", lambda pipe: pipe(temperature=1e308)),
    ("temperature", lambda pipe: pipe(latents=LATENTS, temperature=0.5)),
    ("num_refinement_steps", lambda pipe: pipe(num_refinement_steps=1.5)),
    ("num_refinement_steps", lambda pipe: pipe(num_refinement_steps=1, output_type="latent")),
    ("num_refinement_steps", lambda pipe: ECVAEPipeline(pipe.vae, pipe.energy_model)(num_refinement_steps=1)),
    ("oversample", lambda pipe: pipe(oversample=0)),
    ("oversample", lambda pipe: pipe(latents=LATENTS, oversample=2)),
    ("oversample", lambda pipe: pipe(output_type="latent", oversample=2)),
    ("oversample", lambda pipe: ECVAEPipeline(pipe.vae)(oversample=2)),
    ("generator", lambda pipe: pipe(latents=LATENTS, generator=generators(3))),
    ("latents", lambda pipe: pipe(latents=LATENTS[:, :7])),
    ("latents", lambda pipe: pipe(latents=LATENTS, batch_size=3)),
    ("latents", lambda pipe: pipe(latents=LATENTS + 3e38)),
    ("num_refinement_steps", lambda pipe: pipe.reconstruct(IMAGES, num_refinement_steps=-1)),
    ("variance", lambda pipe: pipe.reconstruct(IMAGES, variance=0.0)),
    ("score", lambda pipe: ECVAEPipeline(pipe.vae).score(IMAGES)),
    ("num_steps", lambda pipe: pipe.interpolate(IMAGES, IMAGES, num_steps=1)),
    ("image", lambda pipe: pipe.interpolate(IMAGES, None)),
    ("image", lambda pipe: pipe.score(torch.zeros(2, 3, 16, 16))),
    ("image", lambda pipe: pipe.score(torch.zeros(0, 1, 16, 16))),
    ("image", lambda pipe: pipe.score([PIL.Image.new("L", (16, 16)), PIL.Image.new("L", (8, 8))])),
    ("image", lambda pipe: pipe.score([PIL.Image.new("L", (16, 16)), np.zeros((16, 16))])),
    ("image", lambda pipe: pipe.score(IMAGES - 1)),
    ("image", lambda pipe: pipe.score(np.zeros((16, 16), np.uint8))),
    ("image", lambda pipe: pipe.score(np.full((16, 16), math.nan))),
    ("image", lambda pipe: pipe.score("a.png")),
]


@pytest.mark.parametrize("name, call", WRONG)
def test_wrong_arguments(pipe, name, call):
    with pytest.raises(ValueError, match=f"`{name}`"):
        call(pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run(pipe, dtype):
    expected = sample(pipe, temperature=0.0)
    pipe.to(dtype)
    images = sample(pipe, num_refinement_steps=2)
    assert images.dtype == dtype and images.isfinite().all()
    torch.testing.assert_close(sample(pipe, temperature=0.0).float(), expected, atol=2e-2, rtol=0)
    assert np.isfinite(sample(pipe, "np")).all()
    assert pipe.score(IMAGES).isfinite().all() and pipe.score(IMAGES).dtype == torch.float32
    assert pipe.interpolate(IMAGES, IMAGES, output_type="pt").images.isfinite().all()


def test_latents_are_drawn_where_the_decoder_will_run(pipe):
    expected = sample(pipe, "latent")
    pipe.energy_model.to("meta")
    assert sample(pipe).device.type == "cpu"
    accelerate.cpu_offload_with_hook(pipe.vae, execution_device=torch.device("meta"))
    for latents in (None, expected):
        assert sample(pipe, "latent", generator=None, latents=latents).device.type == "meta"


def test_missing_components_and_dtypes_by_component(make_pipeline, tmp_path):
    pipe = make_pipeline(with_energy=False)
    pipe.save_pretrained(tmp_path / "without")
    loaded = ECVAEPipeline.from_pretrained(tmp_path / "without")
    assert loaded.energy_model is None and loaded.scheduler is None
    assert torch.equal(sample(loaded), sample(pipe))
    assert "pipe.score" not in (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    make_pipeline().save_pretrained(tmp_path)
    loaded = ECVAEPipeline.from_pretrained(tmp_path, dtype={"vae": torch.bfloat16, "default": torch.float64})
    assert loaded.vae.dtype == torch.bfloat16 and loaded.energy_model.dtype == torch.float64
    assert sample(loaded, num_refinement_steps=1).isfinite().all()
