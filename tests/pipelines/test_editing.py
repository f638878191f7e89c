# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the editing methods of ECVAEPipeline return, and what they refuse."""

import PIL.Image
import pytest
import torch

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.edits import classifier_normal, difference_of_means, held_out_accuracy
from ecvae_diffusers.pipelines import editing


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 1, 16, 16), generator=torch.Generator().manual_seed(0)).float() / 255


@pytest.fixture
def direction() -> torch.Tensor:
    return torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(1))


def test_encodings_are_posterior_means(pipe, images, monkeypatch):
    expected = pipe.vae.encode(2 * images - 1).latent_dist.mean.detach()
    torch.testing.assert_close(pipe.encode(images), expected)
    torch.testing.assert_close(pipe.encode(images), pipe.reconstruct(images, output_type="latent").images)
    monkeypatch.setattr(editing, "ENCODED_AT_A_TIME", 4)
    torch.testing.assert_close(pipe.encode(images), expected, rtol=0, atol=1e-5)


def test_an_edit_moves_the_latents_and_keeps_the_residual(pipe, images, direction):
    latents, strengths = pipe.encode(images), [-1.0, 0.0, 2.5]
    plain = pipe.edit(images, direction, strengths, keep_residual=False, output_type="pt").images
    moved = torch.cat([pipe(latents=latents + s * direction, output_type="pt").images for s in strengths])
    moved = moved.unflatten(0, (3, 6)).transpose(0, 1).flatten(0, 1)  # image by image
    torch.testing.assert_close(plain, moved, rtol=0, atol=1e-5)
    residual = (images - pipe.reconstruct(images, output_type="pt").images).repeat_interleave(3, dim=0)
    kept = pipe.edit(images, direction, strengths, output_type="pt").images
    torch.testing.assert_close(kept, (plain + residual).clamp(0, 1), rtol=0, atol=1e-5)
    assert not torch.allclose(kept, plain)


def test_strength_0_returns_the_picture_to_the_last_level(pipe, images, direction):
    picture = PIL.Image.fromarray((images[0, 0] * 255).round().byte().numpy())
    assert pipe.edit(picture, direction, 0.0).images[0].tobytes() == picture.tobytes()


def test_each_image_may_have_its_own_direction(pipe, images):
    directions = torch.randn(6, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    together = pipe.edit(images, directions, output_type="pt").images
    alone = [pipe.edit(image, own, output_type="pt").images for image, own in zip(images, directions)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method, expected", [("means", difference_of_means), ("classifier", classifier_normal)])
def test_directions_are_those_of_the_encodings(pipe, images, method, expected):
    many = torch.cat([images, 1 - images])
    a, b = pipe.encode(many[:7]).flatten(1), pipe.encode(many[7:]).flatten(1)
    found = pipe.direction(many[:7], list(many[7:]), method)
    assert found.direction.shape == (8, 1, 1)
    torch.testing.assert_close(found.direction.flatten(), expected(a, b))
    assert found.accuracy == held_out_accuracy(a, b, method)


def test_principal_directions_of_images_and_of_training(pipe, images):
    with pytest.raises(ValueError, match="`image` must be given"):
        pipe.principal_directions(2)
    found = pipe.principal_directions(3, images)
    latents = pipe.encode(images).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(latents.T, correction=0))
    torch.testing.assert_close(found.flatten(1).square().sum(1), values.flip(0)[:3], rtol=1e-3, atol=1e-6)
    assert torch.cosine_similarity(found[0].flatten(), vectors[:, -1], dim=0).abs() > 0.999
    pipe.vae.register_to_config(posterior_directions=found.flatten(1).tolist())
    torch.testing.assert_close(pipe.principal_directions(2), found[:2])
    with pytest.raises(ValueError, match="num_directions"):
        pipe.principal_directions(4)


def test_mixtures_are_weighted_means(pipe, images):
    latents = pipe.encode(images[:3])
    found = pipe.mix(images[:3], [[2, 0, 0], [1, 2, 1]], output_type="pt").images
    means = torch.stack([latents[0], latents[0] / 4 + latents[1] / 2 + latents[2] / 4])
    torch.testing.assert_close(found, pipe(latents=means, output_type="pt").images, rtol=0, atol=1e-5)
    assert len(pipe.mix(images[:3], [1, 1, 1]).images) == 1


def test_classes_pass_through(images, direction):
    torch.manual_seed(0)
    config = {"sample_size": 16, "in_channels": 1, "block_out_channels": (16, 16, 16), "num_class_embeds": 2}
    pipe = ECVAEPipeline(vae=AutoencoderEC(latent_channels=8, **config).eval())
    for name, weight in pipe.vae.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(weight)
    classes = [0, 1, None, 0, 1, None]
    together = pipe.edit(images, direction, [1.0, 2.0], output_type="pt", class_labels=classes).images
    alone = [
        pipe.edit(image, direction, [1.0, 2.0], output_type="pt", class_labels=label).images
        for image, label in zip(images, classes)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    first, other = (pipe.mix(images, [1] * 6, output_type="pt", class_labels=label).images for label in (0, 1))
    assert not torch.allclose(first, other)


def test_what_is_refused(pipe, images, direction):
    for argument, call in (
        ("direction", lambda: pipe.edit(images, direction[:4])),
        ("direction", lambda: pipe.edit(images, direction.expand(5, -1, -1, -1))),
        ("strength", lambda: pipe.edit(images, direction, float("nan"))),
        ("strength", lambda: pipe.edit(images, direction, [])),
        ("output_type", lambda: pipe.edit(images, direction, output_type="latent")),
        ("method", lambda: pipe.direction(images, images, "svm")),
        ("images_b", lambda: pipe.direction(images, images[:4])),
        ("weights", lambda: pipe.mix(images, [1, 2])),
        ("weights", lambda: pipe.mix(images, [1, -1, 1, 1, 1, 1])),
        ("weights", lambda: pipe.mix(images, [0] * 6)),
        ("num_directions", lambda: pipe.principal_directions(0, images)),
    ):
        with pytest.raises(ValueError, match=argument):
            call()
