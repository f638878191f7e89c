# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests of `AutoencoderEC`."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32
from energies import seeded
from model_tests import ModelTests, images, unsettle

from ecvae_diffusers import AutoencoderEC
from ecvae_diffusers.models import AutoencoderECOutput


CONFIGS = {
    "group": {
        "norm_num_groups": 4, "act_fn": "gelu", "reconstruction_variance": 0.01, "reconstruction_spectrum": [2.0, 0.5, 0.0],
    },
    "batch": {"norm_type": "batch", "layers_per_block": 2},
    "classes": {"num_class_embeds": 3, "class_frequencies": [0.2, 0.3, 0.5]},
    "patches": {"patch_size": 2},
}  # fmt: skip


def tiny(sample_size: int | tuple[int, int] = 16, in_channels: int = 1, **kwargs) -> AutoencoderEC:
    torch.manual_seed(0)
    kwargs = {"latent_channels": 4, "block_out_channels": (8, 16), **kwargs}
    return AutoencoderEC(sample_size=sample_size, in_channels=in_channels, **kwargs)


def latents(batch_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 4, 1, 1, generator=seeded(seed))


@pytest.fixture
def vae() -> AutoencoderEC:
    return unsettle(tiny(), images(3))


class TestAutoencoderECModel(ModelTests):
    @pytest.fixture(params=CONFIGS)
    def model(self, request):
        return unsettle(tiny(**CONFIGS[request.param]), self.sample())

    def sample(self):
        return images(3)

    def outputs(self, model, sample):
        # Latents and noise are drawn in float32; they follow the precision of the model.
        output = model(sample, True, latents(2), latents(len(sample), seed=1))
        return [output.sample, output.latent_dist.parameters, output.prior_sample]

    def loss(self, model, sample):
        """The negative ELBO, plus a term on prior samples in place of calibration."""
        output = model(sample, True, latents(2), posterior_noise=latents(len(sample), seed=1))
        squared_error = (output.sample - sample).square().flatten(1).sum(1).mean()
        return squared_error + output.latent_dist.kl().mean() + output.prior_sample.square().mean()


@pytest.mark.parametrize(
    "sample_size, in_channels, block_out_channels, num_excitations",
    [
        (8, 1, (8, 8), 0), (32, 4, (8, 12, 16), 0), (64, 1, (8,), 0), (128, 3, (8,) * 6, 1), (128, 1, (4, 8, 8, 12), 0),
        (256, 1, (4, 4, 8, 8, 8, 12, 16), 2), ((24, 40), 1, (8, 12, 16), 0), ((48, 32), 3, (8, 12), 0), (20, 6, (8, 12), 0),
        (25, 2, (8,), 0), ((64, 160), 1, (4, 4, 8, 8, 12), 1),
    ],
)  # fmt: skip
def test_shapes_and_range(sample_size, in_channels, block_out_channels, num_excitations):
    """
    Images are in [-1, 1] whatever the latents are. A resolution from 128 px on has an excitation if there is one that is 16 times
    smaller, and each of them acts.
    """
    vae = tiny(sample_size, in_channels, block_out_channels=block_out_channels)
    assert len(vae.decoder.excitations) == num_excitations
    # Weights as wild as this reach both ends of the range.
    unsettle(vae, images(1, in_channels, sample_size))
    with torch.no_grad():
        posterior = vae.encode(images(2, in_channels, sample_size)).latent_dist
        assert posterior.mean.shape == posterior.std.shape == (2, 4, 1, 1)
        decoded = vae.decode(100 * latents(2)).sample
        assert decoded.shape == images(2, in_channels, sample_size).shape
        assert decoded.min() >= -1 and decoded.max() <= 1 and decoded.std() > 0
        reference = vae.decode(latents(1)).sample
        for excitation in vae.decoder.excitations.values():
            excitation.conv2.bias += 2.0
            assert (vae.decode(latents(1)).sample - reference).abs().max() > 1e-3
            excitation.conv2.bias -= 2.0


@pytest.mark.parametrize(
    "channels, norm_num_groups, expected", [(64, 8, 8), (16, 8, 4), (2, 8, 1), (16, 32, 4), (16, 1, 1), (18, 8, 2)]
)
def test_group_counts_adapt(channels, norm_num_groups, expected):
    """With 16 channels, 8 groups would have 2 each: group normalization would near instance normalization."""
    vae = tiny(8, block_out_channels=(channels,), norm_num_groups=norm_num_groups)
    norms = [module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) == 6 and {norm.num_groups for norm in norms} == {expected}


@pytest.mark.parametrize("sample_posterior", [False, True])
def test_forward_is_encode_and_decode(vae, sample_posterior):
    """In one pass over everything, also with prior latents and with images to encode only. As a tuple it holds what was asked for."""
    sample, extra, noise, prior = images(3), images(2, seed=5), latents(3, seed=1), latents(5, seed=2)
    with torch.no_grad():
        alone = vae(sample, sample_posterior, posterior_noise=noise)
        output, as_tuple = (
            vae(sample, sample_posterior, prior, noise, return_dict, extra_sample=extra)
            for return_dict in (True, False)
        )
        posterior, extra_posterior = vae.encode(sample).latent_dist, vae.encode(extra).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise if sample_posterior else posterior.mean).sample
        expected = (decoded, posterior.parameters, vae.decode(prior).sample, extra_posterior.parameters)
    assert alone.prior_sample is None and alone.extra_latent_dist is None
    for found in (alone.to_tuple(), output.to_tuple(), as_tuple):
        for part, value in zip(found, expected[: len(found)], strict=True):
            torch.testing.assert_close(getattr(part, "parameters", part), value, rtol=1e-5, atol=1e-5)
    assert len(as_tuple) == 4


def test_posterior_is_float32_under_autocast(vae):
    """The KL divergence is a sum of small differences, which bfloat16 rounds away. Accelerate rebuilds what `forward` returns."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae(images(3), True, latents(2), generator=seeded(0))
    assert output.latent_dist.parameters.dtype == output.latent_dist.kl().dtype == torch.float32
    assert torch.allclose(output.latent_dist.kl(), vae.encode(images(3)).latent_dist.kl(), rtol=0.05)
    converted = convert_to_fp32(output)
    assert isinstance(converted, AutoencoderECOutput)
    assert output.sample.dtype == torch.bfloat16 and torch.equal(converted.sample, output.sample.float())
    assert torch.equal(converted.latent_dist.parameters, output.latent_dist.parameters)


def test_every_parameter_gets_a_gradient():
    """In one forward pass of prior and posterior: DistributedDataParallel waits for each of them."""
    vae, sample = tiny(128, block_out_channels=(4, 4, 4, 4, 8)), images(2, 1, 128)
    output = vae(sample, True, prior_latents=latents(2), generator=seeded(0))
    loss = F.mse_loss(output.sample, sample) + output.latent_dist.kl().mean() + output.prior_sample.square().mean()
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in vae.parameters())


@pytest.mark.parametrize("norm_type", ["group", "batch"])
def test_neighbours_in_the_batch(norm_type):
    """Only batch normalization sees them, and only in training."""
    vae = unsettle(tiny(norm_type=norm_type), images(3))
    batch = images(4)
    neighbours = torch.cat([batch[:1], images(3, seed=1)])
    with torch.no_grad():
        for training in (False, True):
            first, second = (vae.train(training)(sample).sample[0] for sample in (batch, neighbours))
            assert torch.allclose(first, second, atol=1e-6) != (training and norm_type == "batch")


def test_slicing(vae):
    """One image at a time through either half, and the same outputs."""
    batches = []
    for half in (vae.encoder, vae.decoder):
        half.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    with torch.no_grad():
        whole = vae(images(3), prior_latents=latents(2))
        vae.enable_slicing()
        sliced = vae(images(3), prior_latents=latents(2))
    assert batches == [3, 5] + [1] * 8
    assert torch.allclose(sliced.sample, whole.sample, atol=1e-5)
    assert torch.allclose(sliced.latent_dist.parameters, whole.latent_dist.parameters, atol=1e-5)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("sample_size", value) for value in (25, 6, 2**30, 16.0, (24, 15), (16,), (16, 16, 16), (16, 4))),
        ("in_channels", 0), ("in_channels", 17), ("latent_channels", 0), ("latent_channels", 10**6),
        ("layers_per_block", 0), ("layers_per_block", 10**6), ("block_out_channels", (8,) * 4), ("block_out_channels", ()),
        ("block_out_channels", (8, 10**6)), ("norm_type", "layer"),
        *(("reconstruction_spectrum", value) for value in ([], [0.0], [1, -1], [float("nan")])),
    ],
)  # fmt: skip
def test_invalid_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        tiny(**{name: value})


def test_other_shapes_are_refused(vae):
    for shape in ((2, 3, 16, 16), (2, 1, 8, 8), (1, 16, 16), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match="`x`"):
            vae(torch.zeros(shape))
    for shape in ((2, 4), (2, 3, 1, 1), (2, 4, 2, 2), (4, 1, 1)):
        with pytest.raises(ValueError, match="`z`"):
            vae.decode(torch.zeros(shape))


def test_patches_are_channels_of_the_first_and_the_last_layer():
    """With patches of 2, networks at 16 px are those at 8 px with 4 times the channels at their ends."""
    whole, patched = tiny(8, in_channels=4), tiny(16, in_channels=1, patch_size=2)
    patched.load_state_dict(whole.state_dict())
    z, x = latents(2), images(2)
    shuffle = torch.nn.functional.pixel_shuffle
    torch.testing.assert_close(patched.decode(z).sample, shuffle(whole.decode(z).sample, 2))
    moments = whole.encode(torch.nn.functional.pixel_unshuffle(x, 2)).latent_dist.parameters
    torch.testing.assert_close(patched.encode(x).latent_dist.parameters, moments)
    for sample_size, patch_size in ((16, 3), (16, 8), (8, 4)):
        with pytest.raises(ValueError, match="`patch_size`"):
            tiny(sample_size, patch_size=patch_size)
