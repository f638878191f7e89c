# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What ECVAERestorationPipeline makes of measurements, what it refuses, and how it is saved and loaded."""

import importlib.util
import json
import math
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from without_package import run_without_package

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
    levels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)


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
}


def measure(operator, x: torch.Tensor) -> torch.Tensor:
    return operator[0](x) if isinstance(operator, tuple) else operator.A(x)


@pytest.mark.parametrize("name", OPERATORS)
def test_answers_agree_with_the_measurement(pipe, name):
    """Without noise to a relative 1e-5, whatever the network makes of it; it is a random one here."""
    operator = OPERATORS[name]
    y = measure(operator, images())
    output = restore(pipe, y, operator, num_restorations=3)
    assert output.images.shape == (6, 1, 16, 16) and output.mean.shape == output.std.shape == (2, 1, 16, 16)
    assert output.residual.shape == output.residual_output.shape == output.energy.shape == (6,)
    assert output.residual_mean.shape == (2,) and output.residual_mean.max() < 1e-5
    assert output.residual.max() < 1e-5
    assert output.images.min() >= 0 and output.images.max() <= 1
    # What is returned is clamped, and its residual is that of what is returned.
    returned = (measure(operator, output.images[::3] * 2 - 1) - y).flatten(1).norm(dim=1)
    torch.testing.assert_close(output.residual_output[::3], returned / y.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)
    again = restore(pipe, y, operator, num_restorations=3)
    assert torch.equal(again.images, output.images)


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
    y = Denoising().A(images())
    output = restore(pipe, y, Denoising(), noise_std=0.1, num_restorations=8)
    exact = restore(pipe, y, Denoising(), noise_std=0.0)
    assert exact.residual.max() < 1e-6 < 0.02 < output.residual.min()
    single = (output.images * 2 - 1).unflatten(0, (2, 8)) - y.unsqueeze(1)
    mean = output.mean * 2 - 1 - y
    assert mean.square().mean() < single.square().mean()


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
    # The other polarity keeps the box.
    swapped = restore(pipe, picture(damaged[0]), mask_image=box_mask(white=0))
    assert (swapped.images[0, 0, 4:12, 4:12] - 1).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["L", "1", "numpy", "tensor", "list"])
def test_kinds_of_masks(pipe, kind):
    array = (np.asarray(box_mask()) / 255).astype(np.float32)
    mask = {
        "L": box_mask(),
        "1": box_mask().convert("1"),
        "numpy": array,
        "tensor": torch.from_numpy(array)[None, None],
        "list": [box_mask(), box_mask()],
    }[kind]
    x = images()
    expected = restore(pipe, x, Inpainting.box(16, 16, 4, 4, 8, 8), noise_std=0.0)
    found = restore(pipe, x / 2 + 0.5, mask_image=mask, noise_std=0.0)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-5)


def test_masks_of_all_and_of_nothing(pipe):
    x = images(1) / 2 + 0.5
    everything, nothing = (
        restore(pipe, x, mask_image=PIL.Image.new("L", (16, 16), white), num_restorations=3, noise_std=0.0)
        for white in (255, 0)
    )
    assert everything.residual.max() == 0 and everything.images.std(0).mean() > 0.01  # draws of the prior
    torch.testing.assert_close(nothing.images, x.expand(3, -1, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(24, 16), (33, 40)])
def test_larger_images_are_restored_in_tiles(pipe, size):
    height, width = size
    x = torch.rand(1, 1, height, width, generator=seeded()) * 2 - 1
    mask = Inpainting.random(height, width, 0.5, seeded())
    for operator in (mask, Blur(motion_kernel(5, 30)), Blur(gaussian_kernel(1.5), "reflect")):
        output = restore(pipe, operator.A(x), operator, num_restorations=2)
        assert output.images.shape == (2, 1, height, width) and output.residual.max() < 1e-5
    small = SuperResolution(2)
    even = torch.rand(1, 1, 24, 32, generator=seeded()) * 2 - 1
    output = restore(pipe, small.A(even), small)
    assert output.images.shape == (1, 1, 24, 32) and output.residual.max() < 1e-5


def test_colour(restoration):
    pipe, gray = restoration(3), picture(images(1)[0])
    output = pipe(gray, operator=Colorization(), num_inference_steps=STEPS, noise_std=0.0)
    assert output.images[0].mode == "RGB" and output.residual.max() < 1e-5
    difference = np.asarray(output.images[0].convert("L"), float) - np.asarray(gray, float)
    assert np.abs(difference).mean() < 12  # colours out of range were clamped
    damaged = picture(images(1, channels=3)[0])
    assert pipe(damaged, mask_image=box_mask(), num_inference_steps=STEPS).images[0].mode == "RGB"


def test_pictures_of_operators_that_do_not_keep_brightness(pipe):
    """A picture p of an image in [0, 1] is y = 2 p - A 1 of it in [-1, 1]."""
    double = (lambda x: 2 * x[..., ::2], lambda y: 2 * torch.stack([y, torch.zeros_like(y)], -1).flatten(-2))
    x = images(1)
    p = (2 * (x / 2 + 0.5)[..., ::2]).permute(0, 2, 3, 1).numpy() / 2
    halved = (lambda x: double[0](x) / 2, lambda y: double[1](y) / 2)
    from_picture = restore(pipe, p, halved, noise_std=0.0)
    from_tensor = restore(pipe, halved[0](x), halved)
    torch.testing.assert_close(from_picture.images, from_tensor.images, atol=1e-5, rtol=0)


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


def test_without_an_energy_model(restoration):
    pipe = restoration(with_energy=False)
    assert restore(pipe, images(), Denoising()).energy is None
    with pytest.raises(ValueError, match="`energy_weight`"):
        restore(pipe, images(), Denoising(), energy_weight=1.0)


def test_generators_and_latents(pipe):
    y, operator = SuperResolution(4).A(images()), SuperResolution(4)
    one_each = restore(pipe, y, operator, generator=[seeded(i) for i in range(4)], num_restorations=2)
    alone = restore(pipe, y[1:], operator, generator=[seeded(2), seeded(3)], num_restorations=2)
    torch.testing.assert_close(one_each.images[2:], alone.images, atol=1e-4, rtol=0)
    latents = torch.randn(2, 8, 1, 1, generator=seeded())
    found, again, other = (
        restore(pipe, y, operator, latents=start, method="map").images for start in (latents, latents, -latents)
    )
    torch.testing.assert_close(again, found)
    assert not torch.equal(other, found)


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

    seen.clear()
    output = restore(pipe, y, operator, callback_on_step_end=lambda *arguments: seen.append(arguments[1]))
    assert seen == list(range(STEPS))
    torch.testing.assert_close(output.images, restore(pipe, y, operator).images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_answers_that_are_not_finite_are_refused(pipe, output_type):
    """They would be shown as black."""
    y = images()

    def callback(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * math.nan}

    with pytest.raises(ValueError, match="callback_on_step_end"):
        restore(pipe, y, Denoising(), noise_std=0.1, callback_on_step_end=callback, output_type=output_type)
    with pytest.raises(ValueError, match="`operator`"):
        restore(pipe, y, (lambda x: x * math.nan, lambda y: y), noise_std=0.1, output_type=output_type)
    with torch.no_grad():
        next(pipe.vae.decoder.parameters())[0] = math.nan
    with pytest.raises(ValueError, match="decoder"):
        restore(pipe, y, Denoising(), noise_std=0.1, output_type=output_type)


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_functions_may_work_in_place(pipe, noise_std):
    y = 0.5 * images()
    before = y.clone()
    expected = restore(pipe, y, (lambda x: x * 0.5, lambda y: y * 0.5), noise_std=noise_std)
    output = restore(pipe, y, (lambda x: x.mul_(0.5), lambda y: y.mul_(0.5)), noise_std=noise_std)
    assert torch.equal(y, before)
    torch.testing.assert_close(output.images, expected.images)


def test_noise_that_is_taken_at_its_word_is_told(pipe, caplog):
    """Rounding to 8 bits, blown up by a blur's inverse that must agree to the last digit."""
    operator = Blur(gaussian_kernel(1.0), "reflect")
    exact = operator.A(images())
    restore(pipe, exact, operator)
    assert "noise_std" not in caplog.text
    rounded = (exact * 127.5).round() / 127.5
    assert restore(pipe, rounded, operator).residual.max() < 1e-5
    assert "`noise_std`" in caplog.text
    caplog.clear()
    restore(pipe, rounded, operator, noise_std=2 / (255 * 12**0.5))
    assert "noise_std" not in caplog.text


def test_measurements_in_another_unit_are_told(pipe, caplog):
    """A tensor in 8-bit levels, with noise in levels too."""
    levels = (images() + 1) * 127.5
    restore(pipe, levels, Denoising(), noise_std=5.0)
    assert "`image`" in caplog.text and "`noise_std`" in caplog.text


def test_operator_of_another_copy_of_the_package(pipe, tmp_path):
    """The code of a pipeline from the Hub has its own class of operators, and takes ours with all that they can do."""
    pipe.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("copied_pipeline", tmp_path / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    operator = Blur(gaussian_kernel(1.5), "reflect")
    assert not isinstance(operator, module.LinearOperator) and module.as_operator(operator) is operator
    copied = module.ECVAERestorationPipeline(**pipe.components)
    copied.set_progress_bar_config(disable=True)
    y = operator.A(images())
    torch.testing.assert_close(restore(copied, y, operator).images, restore(pipe, y, operator).images)


def test_output_types_and_tuple(pipe):
    y = SuperResolution(2).A(images())
    tensor = restore(pipe, y, SuperResolution(2))
    array = restore(pipe, y, SuperResolution(2), output_type="np")
    np.testing.assert_allclose(array.images, tensor.images.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(array.std, tensor.std.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pil = restore(pipe, y, SuperResolution(2), output_type="pil")
    np.testing.assert_allclose(np.asarray(pil.images[0]) / 255, array.images[0, ..., 0], atol=0.51 / 255)
    as_tuple = restore(pipe, y, SuperResolution(2), return_dict=False)
    assert torch.equal(as_tuple[0], tensor.images) and as_tuple[-1] == tensor.num_network_calls


def test_inference_mode(pipe):
    y = SuperResolution(2).A(images())
    with torch.inference_mode():
        found = restore(pipe, y.clone(), SuperResolution(2)).images
    torch.testing.assert_close(found.clone(), restore(pipe, y, SuperResolution(2)).images)


@pytest.mark.parametrize(
    "kwargs", [{}, {"method": "map"}, {"noise_std": 0.05}, {"start": "prior", "energy_weight": 0.1}]
)
def test_functions_in_double_precision(pipe, kwargs):
    """They are called in the measurement's precision all the way, whatever the networks compute in."""
    matrix = torch.linalg.qr(torch.randn(256, 64, generator=seeded(), dtype=torch.float64)).Q.mT
    functions = (lambda x: x.flatten(1) @ matrix.mT, lambda y: (y @ matrix).view(-1, 1, 16, 16))
    output = restore(pipe, functions[0](images().double()), functions, **kwargs)
    assert output.images.isfinite().all()
    if "noise_std" not in kwargs:
        assert output.residual.max() < 1e-8


def test_says_where_answers_do_not_agree_with_the_measurement(pipe, caplog):
    operator = Inpainting.box(16, 16, 4, 4, 8, 8)
    damaged = images() + 0.5 * (1 - operator.A(torch.ones(2, 1, 16, 16)))  # the hole is not 0
    with caplog.at_level("WARNING"):
        output = restore(pipe, damaged, operator)
    assert output.residual.max() > 1e-2 and "`noise_std` is 0" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        restore(pipe, operator.A(damaged), operator)
    assert caplog.text == ""


def test_progress_is_shown(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    restore(pipe, SuperResolution(2).A(images()), SuperResolution(2))
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


def test_rounding_is_the_noise_of_pictures(pipe):
    """`noise_std` not given: 2 / (255 sqrt(12)) for a picture, nothing for a tensor."""
    damaged, rounding = picture(images(1)[0]), 2 / (255 * 12**0.5)
    found = restore(pipe, damaged, mask_image=box_mask()).images
    assert torch.equal(found, restore(pipe, damaged, mask_image=box_mask(), noise_std=rounding).images)
    y = SuperResolution(2).A(images())
    found = restore(pipe, y, SuperResolution(2)).images
    assert torch.equal(found, restore(pipe, y, SuperResolution(2), noise_std=0.0).images)


def test_two_masks_of_two_images(pipe):
    other = PIL.Image.new("L", (16, 16), 0)
    other.paste(255, (0, 0, 8, 16))
    clean = images(2)
    masks = [box_mask(), other]
    output = restore(pipe, [picture(one) for one in clean], mask_image=masks, noise_std=0.0)
    for image, restored, mask in zip(clean, output.images, masks):
        kept = torch.from_numpy(np.asarray(mask) == 0)
        given = ((image + 1) * 127.5).round() / 255
        torch.testing.assert_close(restored[:, kept], given[:, kept], rtol=0, atol=1e-5)
        assert (restored[:, ~kept] - given[:, ~kept]).abs().max() > 1e-3


def test_tiles_of_a_noisy_measurement(pipe):
    """Residuals of single answers are those of the noise, those of their mean lie below."""
    clean, noise_std = images(1, height=24, width=32), 0.1
    noise = noise_std * torch.randn(clean.shape, generator=seeded(3))
    # An untrained decoder is off by as much as images are large.
    settings = {"num_restorations": 8, "energy_weight": 0.1, "reconstruction_variance": clean.square().mean().item()}
    output = restore(pipe, clean + noise, Denoising(), noise_std=noise_std, **settings)
    size = (clean + noise).norm() / clean.numel() ** 0.5
    assert 0.8 < (output.residual * size / noise_std).mean() < 1.2
    assert output.residual_mean.item() < output.residual.mean()
    assert output.images.shape == (8, 1, 24, 32) and output.energy.shape == (8,)


def test_energies_are_those_of_the_answers(pipe):
    output = restore(pipe, SuperResolution(2).A(images()), SuperResolution(2), num_restorations=2)
    with torch.no_grad():
        expected = pipe.energy_model(output.images * 2 - 1).energy
    # But for what was clamped.
    torch.testing.assert_close(output.energy, expected, rtol=0.05, atol=0.05)


def test_bf16_networks(pipe):
    pipe.to(torch.bfloat16)
    output = restore(pipe, SuperResolution(2).A(images()), SuperResolution(2))
    assert output.images.dtype == torch.float32 and output.residual.max() < 1e-5


SEEN = torch.zeros(2, 1, 16, 16)
MASKED = {"operator": None, "image": SEEN, "mask_image": box_mask()}
WRONG = {
    "neither": ("operator", {"operator": None}),
    "both": ("operator", {"mask_image": box_mask()}),
    "no operator": ("operator", {"operator": "blur"}),
    "answers": ("num_restorations", {"num_restorations": 0}),
    "steps": ("num_inference_steps", {"num_inference_steps": 0}),
    "negative noise": ("noise_std", {"noise_std": -0.1}),
    "NaN noise": ("noise_std", {"noise_std": math.nan}),
    "noise of 8-bit levels": ("noise_std", {"noise_std": 5.0}),
    "negative energy weight": ("energy_weight", {"energy_weight": -1}),
    "NaN energy weight": ("energy_weight", {"energy_weight": math.nan}),
    "method": ("method", {"method": "adam"}),
    "start": ("start", {"start": "zeros"}),
    "output type": ("output_type", {"output_type": "latent"}),
    "variance": ("reconstruction_variance", {"reconstruction_variance": 0}),
    "variance of 8-bit levels": ("reconstruction_variance", {"reconstruction_variance": 400.0}),
    "overlap": ("tile_overlap", {"tile_overlap": 16}),
    "generators": ("generator", {"generator": [seeded()] * 3}),
    "latents": ("latents", {"latents": torch.zeros(1, 8, 1, 1)}),
    "too large": ("image", {"image": torch.full((2, 1, 8, 8), 1e20)}),
    "NaN": ("image", {"image": torch.full((2, 1, 8, 8), math.nan)}),
    "levels": ("image", {"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}),
    "empty": ("image", {"image": []}),
    "mixed": ("image", {"image": [picture(images(1)[0]), images(1)]}),
    "levels of an array": ("image", {"image": np.zeros((1, 8, 8, 1), np.uint8)}),
    "levels of a tensor": ("image", {**MASKED, "image": SEEN.byte()}),
    "tensor in the model's range": ("image", {**MASKED, "image": images(1)}),
    "range": ("image", {"image": np.full((1, 8, 8, 1), 255.0)}),
    "channels": ("image", {"image": torch.zeros(2, 3, 8, 8)}),
    "channels of a picture": ("image", {**MASKED, "image": torch.zeros(2, 3, 16, 16)}),
    "too small": ("image", {"image": torch.zeros(2, 1, 4, 4)}),
    "operator for another size": ("mask", {"image": SEEN, "operator": Inpainting(torch.ones(8, 8))}),
    "measurement of another size": (
        "image",
        {"operator": (lambda x: x[..., :8], lambda y: torch.zeros(len(y), 1, 16, 16))},
    ),
    "mask of another size": ("mask_image", {**MASKED, "mask_image": box_mask(8)}),
    "three masks": ("mask_image", {**MASKED, "mask_image": [box_mask()] * 3}),
    "three masks of one picture": ("mask_image", {**MASKED, "image": SEEN[:1], "mask_image": [box_mask()] * 3}),
    "masks of two sizes": ("mask_image", {**MASKED, "mask_image": [box_mask(), box_mask(8)]}),
    "mask with NaN": ("mask_image", {**MASKED, "mask_image": torch.full((1, 1, 16, 16), math.nan)}),
    "mask that is none": ("mask_image", {**MASKED, "mask_image": "mask.png"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input(pipe, wrong):
    """One clear error each, before any network is asked."""
    asked = []
    pipe.vae.decoder.register_forward_hook(lambda *_: asked.append(1))
    name, changed = WRONG[wrong]
    arguments = {"image": torch.zeros(2, 1, 8, 8), "operator": SuperResolution(2), **changed}
    with pytest.raises(ValueError, match=f"`{name}`"):
        restore(pipe, **arguments)
    assert not asked


def test_errors_of_functions_are_their_own(pipe):
    def A(x):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        restore(pipe, torch.zeros(2, 1, 8, 8), (A, A))


def test_a_model_that_does_not_know_its_error(pipe):
    pipe.vae.register_to_config(reconstruction_variance=None)
    y = SuperResolution(2).A(images())
    with pytest.raises(ValueError, match="`reconstruction_variance`"):
        restore(pipe, y, SuperResolution(2))
    assert restore(pipe, y, SuperResolution(2), reconstruction_variance=0.02).residual.max() < 1e-5


# Saving and loading


def test_shares_weights_with_the_generation_pipeline(make_pipeline, tmp_path, caplog):
    """And loads its folder, whose scheduler it does not take."""
    generation = make_pipeline()
    pipe = ECVAERestorationPipeline.from_pipe(generation)
    assert pipe.vae is generation.vae and pipe.energy_model is generation.energy_model
    assert set(pipe.components) == {"vae", "energy_model"} and "_scheduler" not in pipe.config
    assert ECVAEPipeline.from_pipe(pipe).vae is generation.vae
    generation.save_pretrained(tmp_path)
    assert set(ECVAERestorationPipeline.from_pretrained(tmp_path).components) == {"vae", "energy_model"}
    assert "scheduler" not in caplog.text
    with pytest.raises(TypeError, match="scheduler"):
        ECVAERestorationPipeline(**generation.components)


WITHOUT_PACKAGE = """
folder, kwargs, image = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **json.loads(kwargs))
kwargs = {"num_inference_steps": 10, "output_type": "pt"}
x, pair = torch.load(image), (lambda x: x[..., ::2], lambda y: torch.stack([y, torch.zeros_like(y)], -1).flatten(-2))
mask = (torch.arange(256.0).view(1, 1, 16, 16) < 99).float()
masked = pipe(x, mask_image=mask, generator=torch.Generator().manual_seed(0), **kwargs)
measured = pipe(x[..., ::2], operator=pair, **kwargs)
print(json.dumps([type(pipe).__name__, masked.images.sum().item(), measured.residual.max().item()]))
"""


def test_saved_loaded_and_used_without_the_package(pipe, make_pipeline, tmp_path):
    """From its own folder, and from that of the generation pipeline, which holds its code as `restoration.py`."""
    pipe.save_pretrained(tmp_path / "restoration")
    generation = make_pipeline()
    generation.vae.register_to_config(reconstruction_variance=0.02)
    generation.save_pretrained(tmp_path / "generation")
    index = json.loads((tmp_path / "restoration" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ECVAERestorationPipeline"]
    card = (tmp_path / "restoration" / "README.md").read_text()
    assert "restored = pipe(picture, mask_image=mask).images" in card
    assert 'custom_pipeline="restoration"' in (tmp_path / "generation" / "README.md").read_text()

    x = images(1) / 2 + 0.5
    mask = (torch.arange(256.0).view(1, 1, 16, 16) < 99).float()
    sums = []
    for folder in ("restoration", "generation"):
        loaded = ECVAERestorationPipeline.from_pretrained(tmp_path / folder)
        sums.append(restore(loaded, x, mask_image=mask).images.sum().item())
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "restoration")) is ECVAERestorationPipeline
    torch.save(x, tmp_path / "image.pt")
    for folder, kwargs, expected in (
        ("restoration", {}, sums[0]),
        ("generation", {"custom_pipeline": "restoration"}, sums[1]),
    ):
        arguments = [str(tmp_path / folder), json.dumps(kwargs), str(tmp_path / "image.pt")]
        (name, total, residual), errors = run_without_package(WITHOUT_PACKAGE, *arguments)
        assert name == "ECVAERestorationPipeline" and residual < 1e-5 and "scheduler" not in errors
        assert total == pytest.approx(expected, rel=1e-4)
