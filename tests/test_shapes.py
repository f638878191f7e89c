# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images that are not square, and images of other channels than gray and RGB, from a pipeline's call to its folder."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, ECVAERestorationPipeline, EnergyModel, LangevinScheduler
from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.grid import lay_out
from ecvae_diffusers.onnx import OnnxECVAEPipeline
from ecvae_diffusers.onnx.export import export_onnx
from ecvae_diffusers.operators import SuperResolution
from ecvae_diffusers.page.page import write_page


SHAPES = {"24x40 gray": ((24, 40), 1), "48x32 RGB": ((48, 32), 3), "20x20x6": (20, 6)}


@pytest.fixture(scope="module", params=SHAPES)
def pipe(request) -> ECVAEPipeline:
    torch.manual_seed(0)
    sample_size, in_channels = SHAPES[request.param]
    config = {"sample_size": sample_size, "in_channels": in_channels, "block_out_channels": (8, 16)}
    pipeline = ECVAEPipeline(
        vae=AutoencoderEC(latent_channels=8, reconstruction_variance=0.02, **config).eval(),
        energy_model=EnergyModel(**config).eval(),
        scheduler=LangevinScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shape_of(pipe: ECVAEPipeline) -> tuple[int, int, int]:
    return pipe.vae.config.in_channels, *height_and_width(pipe.vae.config.sample_size)


def some_images(pipe: ECVAEPipeline, count: int = 2) -> torch.Tensor:
    return torch.rand(count, *shape_of(pipe), generator=torch.Generator().manual_seed(0))


def test_tensors_and_arrays_go_in_and_out(pipe):
    images, (channels, height, width) = some_images(pipe), shape_of(pipe)
    arrays = images.permute(0, 2, 3, 1).numpy()
    sampled = pipe(batch_size=3, generator=torch.Generator().manual_seed(1), output_type="pt", num_refinement_steps=1)
    assert sampled.images.shape == (3, channels, height, width)
    decoded = pipe.reconstruct(images, output_type="pt").images
    np.testing.assert_allclose(
        pipe.reconstruct(arrays, output_type="np").images, decoded.permute(0, 2, 3, 1).numpy(), atol=1e-6
    )
    assert len(pipe.interpolate(images, images, num_steps=2, output_type="np").images) == 4
    torch.testing.assert_close(pipe.score(images), pipe.score(arrays))
    with pytest.raises(ValueError, match="`image`"):
        pipe.score(images.mT if height != width else images[..., 1:])


def test_pictures_of_pil_have_1_3_or_4_channels(pipe):
    channels, height, width = shape_of(pipe)
    picture = PIL.Image.new("RGB", (width, height), "red")
    if channels in (1, 3):
        (image,) = pipe.reconstruct(picture).images
        assert image.size == (width, height) and image.mode == {1: "L", 3: "RGB"}[channels]
        return
    restoration = ECVAERestorationPipeline.from_pipe(pipe)
    calls = [pipe, lambda: pipe.reconstruct(some_images(pipe)), lambda: restoration(some_images(pipe), lambda x: x)]
    for call in calls:
        with pytest.raises(ValueError, match="`output_type`"):
            call()
    for call in (pipe.score, lambda image: restoration(image, mask_image=picture, output_type="np")):
        with pytest.raises(ValueError, match="`image`"):
            call(picture)


@pytest.mark.parametrize("kind", ["mask", "operator", "tiles"])
def test_restorations_agree_with_their_measurement(pipe, kind):
    """Also where the image is larger than the model, in each direction by another number of tiles."""
    restoration = ECVAERestorationPipeline.from_pipe(pipe)
    restoration.set_progress_bar_config(disable=True)
    channels, height, width = shape_of(pipe)
    x = torch.rand(1, channels, *((height + 8, 2 * width) if kind == "tiles" else (height, width)))
    if kind == "mask":
        measured = {"mask_image": (torch.rand(1, 1, height, width) < 0.5).float(), "noise_std": 0.0}
    else:
        operator = SuperResolution(2)
        x, measured = operator.A(2 * x - 1), {"operator": operator}
    output = restoration(
        x, num_inference_steps=4, num_restorations=2, generator=torch.Generator().manual_seed(0), output_type="pt", **measured
    )  # fmt: skip
    assert (output.residual <= 1e-5).all() and output.images.shape[1] == channels
    assert output.energy.isfinite().all() and output.std.isfinite().all()
    assert output.images.shape[2:] == ((height + 8, 2 * width) if kind == "tiles" else (height, width))


def test_folders_keep_the_shape(pipe, tmp_path):
    """In the config as one number if the image is square, as in folders of earlier versions, or else as a list."""
    pipe.save_pretrained(tmp_path)
    loaded = ECVAEPipeline.from_pretrained(tmp_path)
    channels, height, width = shape_of(pipe)
    for name in ("vae", "energy_model"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["sample_size"] == (height if height == width else [height, width])
        assert getattr(loaded, name).config.sample_size == getattr(pipe, name).config.sample_size
    latents = torch.randn(2, 8, 1, 1)
    assert torch.equal(
        loaded(latents=latents, output_type="pt").images, pipe(latents=latents, output_type="pt").images
    )
    assert torch.equal(loaded.score(some_images(pipe)), pipe.score(some_images(pipe)))


def test_cards_say_the_shape_and_give_arrays_where_pil_has_none(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    card, (channels, height, width) = (tmp_path / "README.md").read_text(), shape_of(pipe)
    assert f"{height}x{width} px" in card and ('output_type="np"' in card) == (channels not in (1, 3))


def test_onnx_files_have_the_shape(pipe, tmp_path):
    export_onnx(pipe, tmp_path / "onnx")
    exported = OnnxECVAEPipeline(tmp_path / "onnx")
    levels = (some_images(pipe).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    decoded = pipe.reconstruct(levels / np.float32(255), output_type="np").images
    assert np.abs(exported.reconstruct(levels) / 255 - decoded).max() <= 1.5 / 255
    np.testing.assert_allclose(exported.score(levels), pipe.score(levels / np.float32(255)).numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="`image`"):
        exported.score(levels[:, :, :-1])
    with pytest.raises(ValueError, match="`pipeline`"):
        write_page(pipe, tmp_path / "page")


def test_squares_are_one_number_in_configs():
    config = {"in_channels": 1, "block_out_channels": (8,)}
    for kind in (AutoencoderEC, EnergyModel):
        assert kind(sample_size=[16, 16], **config).config.sample_size == 16
        assert kind(sample_size=(16, 8), **config).config.sample_size == [16, 8]


@pytest.mark.parametrize("channels, shown", [(1, [0]), (2, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 2])])
def test_pictures_show_the_first_channels(channels, shown):
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 6, channels), dtype=np.uint8)
    picture = np.atleast_3d(np.asarray(lay_out(images, 1)))
    assert np.array_equal(picture, images[0][..., shown])
