# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What ECVAERestorationPipeline makes of measurements, what it refuses, and how it is saved and loaded."""

import importlib.util
import math
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from ecvae_diffusers import ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.operators import (
    Blur,
    Colorization,
    Compose,
    CompressedSensing,
    Denoising,
    Inpainting,
    Stack,
    SuperResolution,
    gaussian_kernel,
    motion_kernel,
)


STEPS = 10


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 2, channels: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth images in [-1, 1]."""
    coarse = torch.rand(count, channels, height // 4, width // 4, generator=seeded(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def picture(image: torch.Tensor) -> PIL.Image.Image:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None] / 2 + 0.5))[0]


def box_mask(size: int = 16, white: int = 255) -> PIL.Image.Image:
    mask = PIL.Image.new("L", (size, size), 255 - white)
    mask.paste(white, (4, 4, 12, 12))
    return mask


@pytest.fixture
def restoration(make_pipeline):
    def make(in_channels: int = 1, with_energy: bool = True) -> ECVAERestorationPipeline:
        pipe = ECVAERestorationPipeline.from_pipe(make_pipeline(in_channels, with_energy))
        pipe.vae.register_to_config(reconstruction_variance=0.02)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(restoration) -> ECVAERestorationPipeline:
    return restoration()


def restore(pipe, image, operator=None, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt", **kwargs}
    return pipe(image, operator=operator, **kwargs)


OPERATORS = {
    "denoising": Denoising(),
    "box": Inpainting.box(16, 16, 4, 4, 8, 8),
    "a mask an image": Inpainting.random(16, 16, 0.3, seeded(), num_masks=2),
    "x4": SuperResolution(4),
    "x2, bicubic": SuperResolution(2, "bicubic"),
    "blur": Blur(gaussian_kernel(1.5), "reflect"),
    "motion": Blur(motion_kernel(5, 30)),
    "compressed": CompressedSensing.hadamard(generator=seeded()),
    "mask after blur": Compose([Inpainting.random(16, 16, 0.5, seeded()), Blur(gaussian_kernel(0.7))]),
    "stack": Stack([SuperResolution(4), Inpainting.random(16, 16, 0.2, seeded())], (1, 16, 16)),
    "functions": (lambda x: x[..., ::2], lambda y: torch.stack([y, torch.zeros_like(y)], -1).flatten(-2)),
    "tiles of a mask": Inpainting.random(33, 40, 0.5, seeded()),
    "tiles of a motion": Blur(motion_kernel(5, 30)),
    "tiles of a blur": Blur(gaussian_kernel(1.5), "reflect"),
    "tiles of x4": SuperResolution(4),
}
SHAPES = {
    "tiles of a mask": (1, 1, 33, 40),
    "tiles of a motion": (1, 1, 24, 16),
    "tiles of a blur": (1, 1, 33, 40),
    "tiles of x4": (1, 1, 24, 32),
}


def measure(operator, x: torch.Tensor) -> torch.Tensor:
    return operator[0](x) if isinstance(operator, tuple) else operator.A(x)


@pytest.mark.parametrize("name", OPERATORS)
def test_answers_agree_with_the_measurement(pipe, name):
    """Without noise to a relative 1e-5, whatever the network makes of it; it is a random one here. Larger images in tiles."""
    operator, (count, *shape) = OPERATORS[name], SHAPES.get(name, (2, 1, 16, 16))
    y = measure(operator, torch.rand(count, *shape, generator=seeded()) * 2 - 1)
    output = restore(pipe, y, operator, num_restorations=2)
    assert output.images.shape == (2 * count, *shape) and output.mean.shape == output.std.shape == (count, *shape)
    assert output.residual.shape == output.residual_output.shape == output.energy.shape == (2 * count,)
    assert output.residual_mean.shape == (count,) and output.residual_mean.max() < 1e-5
    assert output.residual.max() < 1e-5
    assert output.images.min() >= 0 and output.images.max() <= 1
    # What is returned is clamped, and its residual is that of what is returned.
    returned = (measure(operator, output.images[::2] * 2 - 1) - y).flatten(1).norm(dim=1)
    torch.testing.assert_close(output.residual_output[::2], returned / y.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)


def test_answers_differ_where_nothing_was_measured(pipe):
    mask = OPERATORS["box"].mask
    output = restore(pipe, OPERATORS["box"].A(images()), OPERATORS["box"], num_restorations=4)
    answers = output.images.unflatten(0, (2, 4))
    assert (answers[..., mask] - answers[:, :1][..., mask]).abs().max() < 1e-6
    assert answers[..., ~mask].std(1).mean() > 0.01
    torch.testing.assert_close(output.mean, answers.mean(1))
    # Half the spread of images in [-1, 1], and the model's own error where it does not know.
    assert output.std[..., mask].max() < 1e-3 and output.std[..., ~mask].min() > 0.5 * 0.02**0.5 - 1e-6
    expected = (answers.var(1) + 0.02 / 4 * ~mask).sqrt()
    torch.testing.assert_close(output.std, expected, rtol=1e-3, atol=1e-3)


def test_with_noise_answers_keep_its_distance(pipe):
    """Residuals of single answers are those of the noise, those of their mean lie below. Here in tiles."""
    clean, noise_std = images(1, height=24, width=32), 0.1
    y = clean + noise_std * torch.randn(clean.shape, generator=seeded(3))
    # An untrained decoder is off by as much as images are large.
    settings = {"num_restorations": 8, "energy_weight": 0.1, "reconstruction_variance": clean.square().mean().item()}
    output = restore(pipe, y, Denoising(), noise_std=noise_std, **settings)
    size = y.norm() / clean.numel() ** 0.5
    assert 0.8 < (output.residual * size / noise_std).mean() < 1.2
    assert output.residual_mean.item() < output.residual.mean()
    assert output.images.shape == (8, 1, 24, 32) and output.energy.shape == (8,)
    assert restore(pipe, y, Denoising(), noise_std=0.0).residual.max() < 1e-6


def test_a_picture_and_a_mask(pipe):
    """White is repainted, whatever stands there; black is kept, up to what 8 bits leave open."""
    x = images(1)
    damaged = x.clone()
    damaged[..., 4:12, 4:12] = 1
    kept = np.asarray(box_mask()) == 0
    output = pipe(picture(damaged[0]), mask_image=box_mask(), num_inference_steps=STEPS, generator=seeded())
    (restored,) = output.images
    assert restored.mode == "L" and restored.size == (16, 16)
    difference = np.abs(np.asarray(restored, float) - np.asarray(picture(x[0]), float))
    assert difference[kept].max() <= 3
    assert output.std.shape == (1, 16, 16, 1) and isinstance(output.mean[0], PIL.Image.Image)
    # What stood under the mask does not matter, not even values that are not finite.
    array = np.asarray(picture(damaged[0]), np.float32)[None, ..., None] / 255
    array[:, ~kept] = np.nan
    same = restore(pipe, array, mask_image=box_mask())
    other = restore(pipe, picture(damaged[0]), mask_image=box_mask())
    torch.testing.assert_close(same.images, other.images, atol=1e-5, rtol=0)
    # Without `noise_std` what 8 bits leave open is the noise of a picture; a tensor has none.
    rounding = restore(pipe, picture(damaged[0]), mask_image=box_mask(), noise_std=2 / (255 * 12**0.5))
    assert torch.equal(rounding.images, other.images)


def test_kinds_of_masks(pipe):
    array, x = (np.asarray(box_mask()) / 255).astype(np.float32), images()
    expected = restore(pipe, x, Inpainting.box(16, 16, 4, 4, 8, 8), noise_std=0.0).images
    assert torch.equal(restore(pipe, x, Inpainting.box(16, 16, 4, 4, 8, 8)).images, expected)
    tensor = torch.from_numpy(array)[None, None]
    forms = box_mask(), box_mask().convert("1"), array, tensor, [box_mask()] * 2, (array, array), [tensor[0]] * 2
    for mask in forms:
        found = restore(pipe, x / 2 + 0.5, mask_image=mask, noise_std=0.0).images
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Another for each image. The other polarity keeps the box.
    found = restore(pipe, x / 2 + 0.5, mask_image=[box_mask(), box_mask(white=0)], noise_std=0.0).images
    kept = torch.cat([tensor, 1 - tensor]) == 0
    torch.testing.assert_close(found[kept], (x / 2 + 0.5)[kept], rtol=0, atol=1e-5)
    assert (found - (x / 2 + 0.5))[~kept].abs().mean() > 0.01


def test_masks_of_all_and_of_nothing(pipe, caplog):
    x = images(1) / 2 + 0.5
    masks = (PIL.Image.new("L", (16, 16), white) for white in (255, 0))
    everything, nothing = (restore(pipe, x, mask_image=mask, num_restorations=3, noise_std=0.0) for mask in masks)
    assert everything.residual.max() == 0 and everything.images.std(0).mean() > 0.01  # draws of the prior
    torch.testing.assert_close(nothing.images, x.expand(3, -1, -1, -1), atol=1e-6, rtol=0)
    assert "`mask_image` repaints everything" in caplog.text and "`mask_image` repaints nothing" in caplog.text


def test_colour(restoration):
    pipe, gray = restoration(3), picture(images(1)[0])
    output = pipe(gray, operator=Colorization(), num_inference_steps=STEPS, noise_std=0.0)
    assert output.images[0].mode == "RGB" and output.residual.max() < 1e-5
    difference = np.asarray(output.images[0].convert("L"), float) - np.asarray(gray, float)
    assert np.abs(difference).mean() < 12  # colours out of range were clamped
    damaged = picture(images(1, channels=3)[0])
    assert pipe(damaged, mask_image=box_mask(), num_inference_steps=STEPS).images[0].mode == "RGB"


def test_functions_that_work_in_place_and_do_not_keep_brightness(pipe):
    """A picture p of an image in [0, 1] is y = 2 p - A 1 of it in [-1, 1]."""
    halved, y = (lambda x: x.mul_(0.5), lambda y: y.mul_(0.5)), 0.5 * images()
    before, p = y.clone(), (y / 2 + 0.25).permute(0, 2, 3, 1).numpy()
    expected = restore(pipe, y, (lambda x: x * 0.5, lambda y: y * 0.5)).images
    assert torch.equal(restore(pipe, y, halved).images, expected) and torch.equal(y, before)
    torch.testing.assert_close(restore(pipe, p, halved, noise_std=0.0).images, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["langevin", "map"])
def test_network_calls(pipe, method):
    counter = Counter()
    for name, network in (("d", pipe.vae.decoder), ("e", pipe.vae.encoder), ("f", pipe.energy_model)):
        network.register_forward_hook(lambda *_, name=name: counter.update([name]))
    y = SuperResolution(2).A(images())
    output = restore(pipe, y, SuperResolution(2), method=method, num_restorations=2)
    assert counter == {"d": STEPS + 1, "e": 1, "f": 1} and output.num_network_calls == STEPS + 3
    counter.clear()
    output = restore(pipe, y, SuperResolution(2), method=method, start="prior", energy_weight=1.0)
    assert counter["d"] == STEPS + 1 and "e" not in counter and output.num_network_calls == sum(counter.values())
    assert not any(p.grad is not None for p in pipe.vae.parameters())
    assert all(p.requires_grad for p in pipe.vae.parameters())


def test_callback(pipe):
    seen, y, operator = [], SuperResolution(2).A(images()), SuperResolution(2)

    def replace(pipe, step, timestep, kwargs):
        seen.append((step, timestep, tuple(kwargs["latents"].shape)))
        return {"latents": kwargs["latents"] * 0}

    output = restore(pipe, y, operator, callback_on_step_end=replace)
    assert seen == [(step, step, (2, 8, 1, 1)) for step in range(STEPS)]
    decoded = pipe.vae.decode(torch.zeros(2, 8, 1, 1)).sample
    expected = decoded + operator.A_dagger(y - operator.A(decoded))
    torch.testing.assert_close(output.images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_generators_and_latents(pipe):
    y, operator = SuperResolution(4).A(images()), SuperResolution(4)
    one_each = restore(pipe, y, operator, generator=[seeded(i) for i in range(4)], num_restorations=2)
    alone = restore(pipe, y[1:], operator, generator=[seeded(2), seeded(3)], num_restorations=2)
    torch.testing.assert_close(one_each.images[2:], alone.images, atol=1e-4, rtol=0)
    latents = torch.randn(2, 8, 1, 1, generator=seeded())
    found, again, other = (
        restore(pipe, y, operator, latents=z, method="map").images for z in (latents, latents, -latents)
    )
    assert torch.equal(again, found) and not torch.equal(other, found)


def test_answers_that_are_not_finite_are_refused(pipe):
    """They would be shown as black."""

    def callback(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * math.nan}

    with pytest.raises(ValueError, match="callback_on_step_end"):
        restore(pipe, images(), Denoising(), noise_std=0.1, callback_on_step_end=callback, output_type="pil")
    with pytest.raises(ValueError, match="`operator`"):
        restore(pipe, images(), (lambda x: x * math.nan, lambda y: y), noise_std=0.1)


def test_answers_that_disagree_with_their_measurement_are_told(pipe, caplog):
    """Rounding to 8 bits, blown up by a blur's inverse; another unit; a hole that is not 0."""
    operator, box = Blur(gaussian_kernel(1.0), "reflect"), OPERATORS["box"]
    exact = operator.A(images())
    rounded = (exact * 127.5).round() / 127.5
    for y, measured_by, noise_std, is_told in (
        (exact, operator, None, False),
        (rounded, operator, None, True),
        (rounded, operator, 2 / (255 * 12**0.5), False),
        ((images() + 1) * 127.5, Denoising(), 5.0, True),
        (images() + 0.5 * (1 - box.A(torch.ones(2, 1, 16, 16))), box, None, True),
        (box.A(images()), box, None, False),
    ):
        caplog.clear()
        restore(pipe, y, measured_by, noise_std=noise_std)
        assert ("`image`" in caplog.text and "`noise_std`" in caplog.text) == is_told


def test_operator_of_another_copy_of_the_package(pipe, tmp_path):
    """The code of a pipeline from the Hub has its own class of operators, and takes ours with all that they can do."""
    pipe.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("copied_pipeline", tmp_path / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    operator = OPERATORS["blur"]
    assert not isinstance(operator, module.LinearOperator) and module.as_operator(operator) is operator


def test_output_types_and_tuple(pipe, capsys):
    y = SuperResolution(2).A(images())
    pipe.set_progress_bar_config(disable=False)
    tensor = restore(pipe, y, SuperResolution(2))
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err
    with torch.no_grad():  # the energies of the answers, but for what was clamped
        expected = pipe.energy_model(tensor.images * 2 - 1).energy
    torch.testing.assert_close(tensor.energy, expected, rtol=0.05, atol=0.05)
    array = restore(pipe, y, SuperResolution(2), output_type="np")
    np.testing.assert_allclose(array.images, tensor.images.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pil = restore(pipe, y, SuperResolution(2), output_type="pil")
    np.testing.assert_allclose(np.asarray(pil.images[0]) / 255, array.images[0, ..., 0], atol=0.51 / 255)
    with torch.inference_mode():
        as_tuple = restore(pipe, y, SuperResolution(2), return_dict=False)
    assert as_tuple[-1] == tensor.num_network_calls and torch.equal(as_tuple[0], tensor.images)
    pipe.to(torch.bfloat16)
    coarse = restore(pipe, y, SuperResolution(2))
    assert coarse.images.dtype == torch.float32 and coarse.residual.max() < 1e-5


def test_functions_in_double_precision(pipe):
    """They are called in the measurement's precision all the way, whatever the networks compute in."""
    matrix = torch.linalg.qr(torch.randn(256, 64, generator=seeded(), dtype=torch.float64)).Q.mT
    functions = (lambda x: x.flatten(1) @ matrix.mT, lambda y: (y @ matrix).view(-1, 1, 16, 16))
    y = functions[0](images().double())
    assert restore(pipe, y, functions, noise_std=0.05).images.isfinite().all()
    assert restore(pipe, y, functions, start="prior", energy_weight=0.1).residual.max() < 1e-8


SEEN = torch.zeros(2, 1, 16, 16)
MASKED = {"operator": None, "image": SEEN, "mask_image": box_mask()}
WRONG = [
    ("operator", {"operator": None}),
    ("num_restorations", {"num_restorations": 2.0}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("noise_std", {"noise_std": math.nan}),
    ("noise_std", {"noise_std": 5.0}),
    ("energy_weight", {"energy_weight": -1}),
    ("method", {"method": "adam"}),
    ("start", {"start": "zeros"}),
    ("output_type", {"output_type": "latent"}),
    ("reconstruction_variance", {"reconstruction_variance": 400.0}),
    ("tile_overlap", {"tile_overlap": 16}),
    ("latents", {"latents": torch.zeros(1, 8, 1, 1)}),
    ("image", {"image": torch.full((2, 1, 8, 8), math.nan)}),
    ("image", {"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}),
    ("image", {"image": [picture(images(1)[0]), images(1)]}),
    ("image", {**MASKED, "image": images(1)}),
    ("image", {"image": torch.zeros(2, 3, 8, 8)}),
    ("image", {"image": torch.zeros(2, 1, 4, 4)}),
    ("image", {"operator": (lambda x: x[..., :8], lambda y: torch.zeros(len(y), 1, 16, 16))}),
    ("mask", {"image": SEEN, "operator": Inpainting(torch.ones(8, 8))}),
    ("mask_image", {**MASKED, "mask_image": box_mask(8)}),
    ("mask_image", {**MASKED, "mask_image": [box_mask()] * 3}),
    ("mask_image", {**MASKED, "mask_image": torch.full((1, 1, 16, 16), math.nan)}),
    ("mask_image", {**MASKED, "mask_image": "mask.png"}),
]


@pytest.mark.parametrize("name, changed", WRONG)
def test_wrong_input(pipe, name, changed):
    """One clear error each, before any network is asked."""
    asked = []
    pipe.vae.decoder.register_forward_hook(lambda *_: asked.append(1))
    arguments = {"image": torch.zeros(2, 1, 8, 8), "operator": SuperResolution(2), **changed}
    with pytest.raises(ValueError, match=f"`{name}`"):
        restore(pipe, **arguments)
    assert not asked


def test_a_model_without_an_energy_model_and_its_error(restoration):
    pipe = restoration(with_energy=False)
    pipe.vae.register_to_config(reconstruction_variance=None)
    with pytest.raises(ValueError, match="`reconstruction_variance`"):
        restore(pipe, images(), Denoising())
    with pytest.raises(ValueError, match="`energy_weight`"):
        restore(pipe, images(), Denoising(), reconstruction_variance=0.02, energy_weight=1.0)
    output = restore(pipe, images(), Denoising(), reconstruction_variance=0.02)
    assert output.energy is None and output.residual.max() < 1e-5


def test_shares_weights_with_the_generation_pipeline(make_pipeline, tmp_path, caplog):
    """And loads its folder, whose scheduler it does not take: the way back asks for one."""
    generation = make_pipeline()
    pipe = ECVAERestorationPipeline.from_pipe(generation)
    assert pipe.vae is generation.vae and pipe.energy_model is generation.energy_model
    assert set(pipe.components) == {"vae", "energy_model"} and "_scheduler" not in pipe.config
    with pytest.raises(ValueError, match="`scheduler`"):
        ECVAEPipeline.from_pipe(pipe)
    back = ECVAEPipeline.from_pipe(pipe, scheduler=None)
    assert back.vae is generation.vae and back.scheduler is None
    generation.vae.register_to_config(reconstruction_variance=0.02)
    generation.save_pretrained(tmp_path)
    assert set(ECVAERestorationPipeline.from_pretrained(tmp_path).components) == {"vae", "energy_model"}
    assert "scheduler" not in caplog.text
    assert 'custom_pipeline="restoration"' in (tmp_path / "README.md").read_text()
    pipe.save_pretrained(tmp_path / "restoration")
    card = (tmp_path / "restoration" / "README.md").read_text()
    assert "restored = pipe(picture, mask_image=mask).images" in card
    with pytest.raises(TypeError, match="scheduler"):
        ECVAERestorationPipeline(**generation.components)
