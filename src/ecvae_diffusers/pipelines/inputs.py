# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Readers of pictures, masks, tensors and latents, shared by training, evaluation and all pipelines."""

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..checks import LARGEST_TEMPERATURE, MODES, check_choice, check_number, prepare_labels


logger = logging.get_logger(__name__)

Images = PIL.Image.Image | np.ndarray | torch.Tensor | list
Generators = torch.Generator | list[torch.Generator] | None
ClassLabels = str | int | list[str | int | None] | torch.Tensor | None

GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
EXIF_ORIENTATION, TIFF_BITS = 0x0112, 0x0102
UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# Resizing and half precision overshoot [0, 1] by less than this.
RANGE_TOLERANCE = 1e-3
# A level of a mask below DARK is nearly black, and one above BRIGHT nearly white.
DARK, BRIGHT = 0.06, 0.94
# Smallest share of a mask's pixels that counts as a region of one label.
LEAST_REGION = 0.005
# A shade of a colour may differ from a multiple of the colour by this many levels.
SHADE_TOLERANCE = 2


# Pictures


def white_level(image: PIL.Image.Image) -> int | None:
    """Return the pixel value of white, or `None` if the picture's mode does not define it."""
    # Modes of float and 32-bit pixels do not define white, except in file formats that store 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 4095 if getattr(image, "tag_v2", {}).get(TIFF_BITS) == (12,) else 65535
    return None if image.mode in ("F", "I") else 255


def check_mode(image: PIL.Image.Image) -> int:
    """Return the pixel value of white. Raises `ValueError` if the picture's mode does not define it."""
    if (white := white_level(image)) is not None:
        return white
    low, high = np.asarray(image).min(), np.asarray(image).max()
    guess = next((level for level in (1, 255, 65535) if high <= level), high)
    raise ValueError(
        f"mode {image.mode} does not define white; its values are from {low:.4g} to {high:.4g}. If white is {guess:g}, use "
        f"PIL.Image.fromarray((numpy.asarray(image) / {guess:g} * 255).clip(0, 255).round().astype('uint8'))"
    )


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, from 1 (upright) to 8. Raises `ValueError` if the EXIF data can't be read."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error) as error:
        raise ValueError(f"the EXIF data can't be read ({error}). To ignore them: image.info.pop('exif')") from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture upright according to its EXIF data: cameras store photographs as they were held."""
    image.load()  # Pillow turns TIFF files upright itself when it loads them.
    stored = orientation(image)
    return image.transpose(UPRIGHT[stored]) if stored in UPRIGHT else image


def opacity(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the alpha channel of a picture of mode L, I;16 or RGB that has a transparent colour."""
    pixels, key = np.asarray(image), np.array(image.info["transparency"])
    if image.mode == "RGB" and key.max() > 255:
        key = key >> 8  # Pillow keeps only the high bytes of 16-bit pixels, but both bytes of the transparent colour.
    if image.mode == "L":
        # Pillow scales 2- and 4-bit pixels to 8 bits, but not the transparent colour.
        scales = [scale for scale in (1, 17, 85) if not (pixels % scale).any() and (pixels == key * scale).any()]
        key = key * (scales or [1])[0]
    transparent = (pixels == key).all(-1) if image.mode == "RGB" else pixels == key
    return PIL.Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))


def read_picture(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """
    Convert a picture of any mode to 1, 3 or 4 channels of 8 bits.

    The picture is turned upright according to its EXIF data, and 16 bits are scaled and rounded to 8. Transparent pixels are laid
    over white unless there are 4 channels.

    Raises:
        ValueError: if the mode does not define white, or the EXIF data can't be read.
    """
    white = check_mode(image)
    image = upright(image)
    alpha = None
    if "transparency" in image.info and (white > 255 or image.mode in ("L", "RGB")):
        alpha = opacity(image)
    if white > 255:
        levels = np.asarray(image).astype(np.float64) * (255 / white)
        image = PIL.Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if alpha is not None:
        image = image.convert("RGB")
        image.info.pop("transparency", None)
        image.putalpha(alpha)
    elif image.has_transparency_data:
        # Pillow converts La, whose colours are multiplied by alpha, only to LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if channels < 4 and image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    # Pillow converts LAB only to RGB.
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(MODES[channels])


# Masks


def read_mask(mask: PIL.Image.Image) -> np.ndarray:
    """
    Return which pixels a mask repaints, as a bool array of shape (H, W).

    A mask of black and one other level or colour repaints all that is not black. Examples are labels 0 and 1, a palette with one
    object, and painted strokes. A mask with shades of white, or of one bright colour, on a dark ground repaints pixels of at least
    half the level of white.

    Raises:
        ValueError: if a mask is of neither kind, or has transparent pixels. The message suggests a conversion.
    """
    white = white_level(mask)
    if mask.has_transparency_data and np.asarray(read_picture(mask, 4))[..., 3].min() < 255:
        alpha = "mask.convert('RGBA').getchannel('A')"
        raise ValueError(
            f"mode {mask.mode} has transparent pixels. To repaint transparent pixels: {alpha}.point(lambda a: 255 - a). "
            f"To repaint opaque pixels: {alpha}"
        )
    pixels = np.asarray(read_picture(mask, 3)) if white == 255 else np.asarray(upright(mask))[..., None]
    level = pixels.max(-1)
    brightest = pixels.reshape(-1, pixels.shape[-1])[level.argmax()]
    if level.min() == 0 and np.isfinite(brightest).all() and (pixels == brightest)[level > 0].all():
        return level > 0
    if white is not None:
        shades = (level / max(level.max(), 1))[..., None] * brightest
        is_gray = len(set(brightest.tolist())) == 1
        if np.abs(pixels - shades).max() <= SHADE_TOLERANCE and is_in_black_and_white(level / white, is_gray):
            return level >= white / 2
    frequent = Counter(map(tuple, pixels.reshape(-1, pixels.shape[-1]).tolist())).most_common(5)
    values = [one[0] if len(set(one)) == 1 else one for one, _ in frequent]
    example = next((value for value in values if value != 0), 0)
    array, each = ("numpy.asarray(mask.convert('RGB'))", ".all(-1)") if white == 255 else ("numpy.asarray(mask)", "")
    raise ValueError(
        f"mode {mask.mode} with the values {values} is not black (kept) and white (repainted). To repaint one of the values: "
        f"PIL.Image.fromarray(({array} == {example}){each})"
    )


def is_in_black_and_white(level: np.ndarray, gray: bool) -> bool:
    """Return whether the levels (H, W) of a mask, from 0 to 1, are bright shapes with soft edges on a dark ground, not labels."""
    levels = np.unique(level)
    if len(levels) == 1:
        return gray and levels[0] == 1
    if not (levels[0] < 0.5 <= levels[-1] and (levels[0] < DARK or levels[-1] > BRIGHT)):
        return False
    # A level fills a region if at least half of its pixels lie in 2 x 2 squares of it. Levels of soft edges do not.
    corner = level[:-1, :-1]
    square = (corner == level[1:, :-1]) & (corner == level[:-1, 1:]) & (corner == level[1:, 1:])
    inside = np.zeros(level.shape, bool)
    for part in (inside[:-1, :-1], inside[1:, :-1], inside[:-1, 1:], inside[1:, 1:]):
        part |= square
    inside_counts, counts = (
        np.bincount(np.searchsorted(levels, some), minlength=len(levels)) for some in (level[inside], level.ravel())
    )
    regions = levels[(inside_counts >= LEAST_REGION * level.size) & (2 * inside_counts >= counts)]
    regions = regions[(regions > levels[0]) & (regions < levels[-1])]
    only_white = (levels >= 0.5).sum() == 1  # False for JPEG files: their noise makes several bright levels
    return not (((regions > DARK) & (regions < BRIGHT)).any() or (only_white and (regions < 0.5).any()))


# Arguments of pipelines


def as_list(images: Images, name: str) -> list:
    """Return an argument as a list of PIL images, arrays or tensors. Raises `ValueError` for other or mixed types or sizes."""
    images = list(images) if isinstance(images, list | tuple) else [images]
    kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
    if not images or not any(all(isinstance(one, kind) for one in images) for kind in kinds):
        found = sorted({type(one).__name__ for one in images})
        raise ValueError(
            f"`{name}` must hold at least one PIL image, numpy array or tensor, all of one type, but holds {found}."
        )
    sizes = {one.size if isinstance(one, PIL.Image.Image) else tuple(one.shape) for one in images}
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must hold images of one size, but holds {sorted(sizes)}.")
    return images


def read_all(images: list[PIL.Image.Image], name: str, read: Callable[[PIL.Image.Image], np.ndarray]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.stack([read(one) for one in images]))
    except ValueError as error:
        raise ValueError(f"`{name}` can't be read: {error}") from error


def prepare_picture(image: Images, processor: VaeImageProcessor, channels: int) -> torch.Tensor:
    """
    Convert pictures to one tensor (B, C, H, W) in [0, 1].

    PIL images are converted to `channels` channels. Arrays (B, H, W, C) and tensors (B, C, H, W) keep their channels, and values
    that are not finite. Raises `ValueError` if pictures can't be read, are not floating-point, leave [0, 1], or are PIL images for a
    number of channels that PIL does not have.
    """
    images = as_list(image, "image")
    if isinstance(images[0], PIL.Image.Image):
        if channels not in MODES:
            raise ValueError(
                f"`image` must be an array or a tensor for a model of {channels} channels: PIL has 1, 3 or 4."
            )
        levels = read_all(images, "image", lambda one: np.atleast_3d(np.asarray(read_picture(one, channels))))
        if channels == 1 and any(has_colours(one) for one in images):
            logger.warning("`image` has colours, but the model is gray: it is converted to gray, as in training.")
        return levels.permute(0, 3, 1, 2).float() / 255
    if images[0].ndim == 2:
        images = [one[None] if isinstance(one, torch.Tensor) else one[..., None] for one in images]
    if not (first := torch.as_tensor(images[0])).is_floating_point():
        raise ValueError(f"`image` must be floating-point in [0, 1], but is {first.dtype}.")
    picture = processor.preprocess(images[0] if len(images) == 1 else images)
    finite = picture[picture.isfinite()]
    low, high = finite.aminmax() if len(finite) else (0, 1)
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"`image` must be in [0, 1], but is from {low:g} to {high:g}.")
    return picture


def has_colours(image: PIL.Image.Image) -> bool:
    if image.mode in GRAY_MODES:
        return False
    pixels = np.asarray(read_picture(image, 3))
    return bool((pixels[..., 1:] != pixels[..., :1]).any())


def prepare_mask(mask_image: Images, processor: VaeImageProcessor, like: torch.Tensor) -> torch.Tensor:
    """
    Return which pixels of pictures `like` (B, C, H, W) were observed, as a bool tensor (1 or B, 1, H, W): those where the mask is
    black. Raises `ValueError` if a mask can't be read or does not fit. Warns if a mask repaints nothing or everything.
    """
    masks = as_list(mask_image, "mask_image")
    if isinstance(masks[0], PIL.Image.Image):
        repainted = read_all(masks, "mask_image", read_mask).unsqueeze(1)
    else:
        if not all(((one >= 0) & (one <= 1)).all() for one in masks):
            raise ValueError("`mask_image` as an array or tensor must have values from 0 (kept) to 1 (repainted).")
        repainted = processor.preprocess(masks[0] if len(masks) == 1 else masks) >= 0.5
    count = 1 if len(repainted) == 1 else len(like)
    check_shape("mask_image", repainted, (count, 1, *like.shape[2:]))
    for found, what in ((~repainted.flatten(1).any(1), "nothing"), (repainted.flatten(1).all(1), "everything")):
        if found.any():
            logger.warning(
                f"`mask_image` repaints {what} in {int(found.sum())} of {count} mask(s): white is repainted, black is kept."
            )
    return ~repainted


def is_turned(images: Images) -> bool:
    """Return whether EXIF data turn any of the pictures."""
    return any(isinstance(one, PIL.Image.Image) and orientation(one) in UPRIGHT for one in as_list(images, "image"))


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(tensor.shape)}.")


def check_generator(generator: Generators, count: int) -> None:
    """Raise `ValueError` if `generator` is not one generator, or a list of one for each of `count` images."""
    kinds = [type(one) for one in generator] if isinstance(generator, list) else type(generator)
    if kinds not in (torch.Generator, [torch.Generator] * count, type(None)):
        raise ValueError(f"`generator` must be a torch.Generator or a list of {count}, one per image, but is {kinds}.")


def draw_classes(config: Any, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw class numbers (count,) by the training data's frequencies in a model's config, on the generator's device."""
    weights = torch.tensor(config.class_frequencies or [1.0] * config.num_class_embeds)
    weights = weights if generator is None else weights.to(generator.device)
    return weights.multinomial(count, replacement=True, generator=generator)


def known_labels(pipeline: Any, class_labels: ClassLabels, count: int) -> torch.Tensor | None:
    """Return class numbers (B,), with the unknown class where none is given. Return `None` for a model without classes."""
    labels = prepare_labels(class_labels, count, pipeline.vae.config)
    if labels is None:
        return None
    unknown = pipeline.vae.config.num_class_embeds
    numbers = [unknown if label is None else label for label in labels]
    return torch.tensor(numbers, device=pipeline._execution_device)


def check_finite(images: torch.Tensor, suspects: str) -> None:
    """Raise `ValueError` if decoded images are not finite: they would be displayed as black."""
    if not images.isfinite().all():
        raise ValueError(f"Images are not finite in {images.dtype}. Check {suspects}.")


def prepare_latents(
    batch_size: int,
    num_latents: int,
    temperature: float,
    generator: Generators,
    latents: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the given latents, or draw them: (batch_size, num_latents, 1, 1). Raises `ValueError` if an argument does not fit."""
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("temperature", temperature, 0, LARGEST_TEMPERATURE)
    if latents is not None and temperature != 1:
        raise ValueError(f"`temperature` must be 1 if `latents` are given, but is {temperature}.")
    if latents is not None and batch_size == 1:
        batch_size = max(1, len(latents))
    check_generator(generator, batch_size)
    shape = (batch_size, num_latents, 1, 1)
    if latents is None:
        return temperature * randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    check_shape("latents", latents, shape)
    return latents.to(device=device, dtype=dtype)


def check_output_type(output_type: str | None, channels: int, *others: str) -> None:
    """Raise `ValueError` if `output_type` is not one of `others`, or one in which images of so many channels exist."""
    choices = ("pil", "np", "pt", None, *others)
    if channels not in MODES:
        choices = choices[1:]
        if output_type == "pil":
            raise ValueError(
                f"`output_type` must be one of {choices} for images of {channels} channels, but is 'pil', which has 1, 3 or 4."
            )
    check_choice("output_type", output_type, choices)


def postprocess(sample: torch.Tensor, processor: VaeImageProcessor, output_type: str | None) -> Any:
    """Convert images in [-1, 1] to `output_type`. Denormalizes the batch at once, which the processor would do image by image."""
    return processor.postprocess(processor.denormalize(sample), output_type=output_type or "np")
