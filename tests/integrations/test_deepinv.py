"""The adapters for deepinv, with objects that have what they ask of it. `tests/slow/test_deepinv_itself.py` runs deepinv."""

from types import SimpleNamespace

import pytest
import torch

from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.integrations.deepinv import ECVAEDenoiser, ECVAEGenerator, ECVAEReconstructor
from ecvae_diffusers.operators import Denoising, SuperResolution


class ZeroNoise:
    pass


class GaussianNoise:
    def __init__(self, sigma):
        self.sigma = sigma


class PoissonNoise:
    sigma = 0.1


def physics(operator, noise=None):
    return SimpleNamespace(A=operator.A, A_adjoint=operator.A_adjoint, noise_model=noise or ZeroNoise())


@pytest.fixture
def restoration(pipe):
    pipe.vae.register_to_config(reconstruction_variance=0.05)
    return ECVAERestorationPipeline.from_pipe(pipe)


FEW = {"num_inference_steps": 4, "num_restorations": 2}


def test_a_reconstruction_is_the_mean_of_the_pipeline_s_answers(restoration):
    """Whatever the range of images: a measurement of images in [0, 1] is one of those in [-1, 1], shifted and scaled."""
    operator, images = SuperResolution(2), torch.rand(2, 1, 16, 16)
    y = operator.A(images)
    model = ECVAEReconstructor(restoration, seed=3, **FEW)
    found = model(y, physics(operator))
    generator = torch.Generator().manual_seed(3)
    expected = restoration(
        2 * y - 1, operator=operator, noise_std=0.0, generator=generator, output_type="pt", **FEW
    ).mean
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # Without noise it agrees with the measurement, up to the clamping of its images.
    inside = found.clamp(0, 1) == found
    assert inside.float().mean() > 0.5 and (operator.A(found) - y).abs().median() < 1e-3


def test_the_noise_is_that_of_the_physics_or_the_given_one(restoration, monkeypatch):
    given = []
    call = type(restoration).__call__
    monkeypatch.setattr(
        type(restoration),
        "__call__",
        lambda self, *own, noise_std, **others: (
            given.append(noise_std) or call(self, *own, noise_std=noise_std, **others)
        ),
    )
    y = torch.rand(1, 1, 16, 16)
    for noise in (GaussianNoise(0.1), GaussianNoise(torch.tensor([0.1])), ZeroNoise()):
        ECVAEReconstructor(restoration, **FEW)(y, physics(Denoising(), noise))
    ECVAEReconstructor(restoration, noise_std=0.2, **FEW)(y, physics(Denoising(), PoissonNoise()))
    assert given == pytest.approx([0.2, 0.2, 0.0, 0.4])
    for noise in (PoissonNoise(), GaussianNoise(torch.tensor([0.1, 0.2]))):
        with pytest.raises(ValueError, match="`physics`.*noise"):
            ECVAEReconstructor(restoration)(y, physics(Denoising(), noise))
    with pytest.raises(ValueError, match="`physics`.*linear"):
        ECVAEReconstructor(restoration)(y, SimpleNamespace(A=torch.sin))


def test_a_denoiser_keeps_the_image_without_noise_and_reconstructs_it_in_strong_noise(pipe):
    with pytest.raises(ValueError, match="reconstruction_variance"):
        ECVAEDenoiser(pipe)
    pipe.vae.register_to_config(reconstruction_variance=0.05)
    denoiser, images = ECVAEDenoiser(pipe), torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(denoiser(images, 0.0), images)
    expected = pipe.reconstruct(images, output_type="latent").images
    decoded = pipe.vae.decode(expected).sample / 2 + 0.5
    torch.testing.assert_close(denoiser(images, 1e4), decoded)
    # One level of noise per image: v / (v + (2 sigma)^2) is a half.
    sigma = torch.tensor([0.0, 0.05**0.5 / 2])
    half = torch.stack([images[0], (images[1] + decoded[1]) / 2])
    torch.testing.assert_close(denoiser(images, sigma), half)


def test_a_generator_decodes_with_gradients(pipe):
    generator = ECVAEGenerator(pipe)
    latents = torch.randn(2, generator.nz, 1, 1, requires_grad=True)
    images = generator(latents)
    torch.testing.assert_close(images.detach().clamp(0, 1), pipe(latents=latents.detach(), output_type="pt").images)
    images.sum().backward()
    assert latents.grad.abs().sum() > 0
