# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Reads pictures, masks, tensors and latents: one reader for training, for evaluation and for every pipeline."""

import struct
from collections import Counter
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

Images = PIL.Image.Image | np.ndarray | torch.Tensor | list

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
# Float and 32-bit pixels have no agreed white, except in formats that store 16 bits.
UNRANGED_MODES = {"F", "I"}
FORMATS_OF_16_BITS = {"PNG", "PPM"}
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
# Resizing and half precision leave [0, 1] by less than this.
RANGE_TOLERANCE = 1e-3
# Levels of a mask below and above which it is nearly black and nearly white.
DARK, BRIGHT = 0.06, 0.94
# Share of a mask's pixels that a region of labels has at least.
LEAST_REGION = 0.005
# A mask with more colours may be paint that JPEG blurred instead of labels.
MAX_LABELS = 8
# Shades of one colour differ from its multiples by at most this many levels.
SHADE_TOLERANCE = 2
# Latents have a standard deviation of 1 in training.
LARGEST_TEMPERATURE = 100.0


# Pictures


def white_level(image: PIL.Image.Image) -> int | None:
    """Return the level of white in a picture's pixels, or `None` if its mode has no agreed one."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in FORMATS_OF_16_BITS):
        return 4095 if getattr(image, "tag_v2", {}).get(TIFF_BITS) == (12,) else 65535
    return None if image.mode in UNRANGED_MODES else 255


def check_mode(image: PIL.Image.Image) -> None:
    """Raise `ValueError` if the picture's mode has no agreed white."""
    if white_level(image) is None:
        low, high = image.getextrema()
        white = next((level for level in (1, 255, 65535) if high <= level), high)
        raise ValueError(
            f"mode {image.mode} has no agreed range, and the values go from {low:.4g} to {high:.4g}. If white is {white:g}: "
            f"PIL.Image.fromarray((numpy.asarray(image) / {white:g} * 255).clip(0, 255).round().astype('uint8'))"
        )


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation from 1 (upright) to 8, or raise `ValueError` if the EXIF data can't be read."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error) as error:
        raise ValueError(
            f"the EXIF data can't be read ({error}). To read the pixels as they are stored: image.info.pop('exif')"
        ) from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture upright by its EXIF data: cameras store photographs as they were held."""
    image.load()  # Pillow turns TIFF files itself.
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def opacity(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the alpha channel of an L, I;16 or RGB picture with a transparent colour."""
    pixels, key = np.asarray(image), np.array(image.info["transparency"])
    if image.mode == "RGB" and key.max() > 255:
        key = key >> 8  # Pillow keeps the high bytes of 16-bit pixels, and the whole key.
    if image.mode == "L":
        # Pillow spreads 2- and 4-bit pixels over 8 bits, but not the key.
        scales = [scale for scale in (1, 17, 85) if not (pixels % scale).any() and (pixels == key * scale).any()]
        key = key * (scales or [1])[0]
    transparent = pixels == key
    return PIL.Image.fromarray(
        np.where(transparent.all(-1) if image.mode == "RGB" else transparent, 0, 255).astype("u1")
    )


def read_picture(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """
    Convert a picture of any mode to 1, 3 or 4 channels of 8 bits.

    The EXIF data turn it upright, 16 bits are scaled and rounded, and transparency is laid on white unless alpha is a channel.

    Raises:
        ValueError: if the mode has no agreed white, or the EXIF data can't be read.
    """
    check_mode(image)
    white = white_level(image)
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
    Return the pixels that a mask repaints, a bool array of shape (H, W).

    A mask of black and one other level or colour repaints all that is not black: labels 0 and 1, palettes of one object, paint.
    A mask of shades of white, or of one bright paint, on a dark ground repaints what has at least half of white.

    Raises:
        ValueError: if the mask is neither, or has transparent pixels. The message says what it holds and how to convert it.
    """
    white = white_level(mask)
    if mask.has_transparency_data and read_picture(mask, 4).getextrema()[3][0] < 255:
        alpha = "mask.convert('RGBA').getchannel('A')"
        raise ValueError(
            f"mode {mask.mode} with transparent pixels does not say what to repaint. To repaint what is transparent or erased: "
            f"{alpha}.point(lambda a: 255 - a). To repaint what is opaque or painted: {alpha}"
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
    counts = Counter(map(tuple, pixels.reshape(-1, pixels.shape[-1]).tolist()))
    values = [one[0] if len(set(one)) == 1 else one for one, _ in counts.most_common(5)]
    example = next((value for value in values if value != 0), 0)
    array = "numpy.asarray(mask.convert('RGB'))" if white == 255 else "numpy.asarray(mask)"
    recipe = f"PIL.Image.fromarray({f'({array} == {example}).all(-1)' if white == 255 else f'{array} == {example}'})"
    if white == 255 and len(counts) > MAX_LABELS:
        recipe += f". To repaint paint: PIL.Image.fromarray(abs({array}.astype(int) - {values[0]}).max(-1) >= 96)"
    raise ValueError(
        f"mode {mask.mode} with the values {', '.join(map(str, values))}{', ...' if len(counts) > 5 else ''} is not in black "
        f"(kept) and white (repainted). To repaint one of them: {recipe}"
    )


def is_in_black_and_white(level: np.ndarray, gray: bool) -> bool:
    """Tell whether the levels (H, W) of a mask, from 0 to 1, are a dark ground, bright shapes and soft edges, instead of labels."""
    levels = np.unique(level)
    if len(levels) == 1:
        return gray and levels[0] == 1
    if not (levels[0] < 0.5 <= levels[-1] and (levels[0] < DARK or levels[-1] > BRIGHT)):
        return False
    # Levels that fill regions: at least half of their pixels lie in squares of 2 x 2. Those of soft edges do not.
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
    only_white = (levels >= 0.5).sum() == 1  # JPEG files have noise on both sides
    return not (((regions > DARK) & (regions < BRIGHT)).any() or (only_white and (regions < 0.5).any()))


# Arguments of pipelines


def as_list(images: Images, name: str) -> list:
    """Return an argument as a list of PIL images, of arrays or of tensors."""
    images = list(images) if isinstance(images, list | tuple) else [images]
    kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
    if not images or not any(all(isinstance(one, kind) for one in images) for kind in kinds):
        found = sorted({type(one).__name__ for one in images})
        raise ValueError(f"`{name}` must hold PIL images, numpy arrays or tensors, at least one, but holds {found}.")
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

    PIL images get `channels` channels. Arrays (B, H, W, C) and tensors (B, C, H, W) keep theirs, and may hold values that are
    not finite.

    Raises:
        ValueError: if there is no picture, sizes differ, or a picture can't be read or is not in [0, 1].
    """
    images = as_list(image, "image")
    if isinstance(images[0], PIL.Image.Image):
        levels = read_all(images, "image", lambda one: np.atleast_3d(read_picture(one, channels)))
        if channels == 1 and any(has_colours(one) for one in images):
            logger.warning("`image` has colours, and the model is gray: it is converted to gray, as training does.")
        return levels.permute(0, 3, 1, 2).float() / 255
    if images[0].ndim == 2:
        images = [one[None] if isinstance(one, torch.Tensor) else one[..., None] for one in images]
    picture = processor.preprocess(images[0] if len(images) == 1 else images)
    if not picture.is_floating_point():
        raise ValueError(
            f"`image` must be floating-point in [0, 1], but is {picture.dtype}. From 8-bit levels: image / 255."
        )
    finite = picture[picture.isfinite()]
    if ((finite < -RANGE_TOLERANCE) | (finite > 1 + RANGE_TOLERANCE)).any():
        low, high = finite.min(), finite.max()
        recipe = " From [-1, 1]: image / 2 + 0.5." if max(-low, high) <= 1 + RANGE_TOLERANCE else ""
        raise ValueError(f"`image` must have values in [0, 1], but they go from {low:.4g} to {high:.4g}.{recipe}")
    return picture


def has_colours(image: PIL.Image.Image) -> bool:
    if image.mode in GRAY_MODES:
        return False
    pixels = np.asarray(read_picture(image, 3))
    return bool((pixels[..., 1:] != pixels[..., :1]).any())


def prepare_mask(mask_image: Images, processor: VaeImageProcessor, like: torch.Tensor) -> torch.Tensor:
    """
    Return the pixels that were observed, bool of shape (1 or B, 1, H, W): those where the mask is black.

    Warns of a mask that repaints nothing or everything.

    Raises:
        ValueError: if a mask can't be read, or its number, size or values do not fit pictures `like` (B, C, H, W).
    """
    masks = as_list(mask_image, "mask_image")
    if isinstance(masks[0], PIL.Image.Image):
        repainted = read_all(masks, "mask_image", read_mask).unsqueeze(1)
    else:
        if not all(((one >= 0) & (one <= 1)).all() for one in masks):
            raise ValueError("`mask_image` as an array or tensor must have values from 0 (kept) to 1 (repainted).")
        repainted = processor.preprocess(masks[0] if len(masks) == 1 else masks) >= 0.5
    batch_size, _, *size = like.shape
    if list(repainted.shape) not in ([1, 1, *size], [batch_size, 1, *size]):
        raise ValueError(
            f"`mask_image` must have shape (1 or {batch_size}, 1, {size[0]}, {size[1]}), but has {tuple(repainted.shape)}."
        )
    for found, what in ((~repainted.flatten(1).any(1), "nothing"), (repainted.flatten(1).all(1), "everything")):
        if found.any():
            logger.warning(
                f"`mask_image` repaints {what} in {int(found.sum())} of {len(found)} mask(s): white is repainted."
            )
    return ~repainted


def check_turned_together(image: Images, mask_image: Images) -> None:
    """Warn if the EXIF data turn pictures, but not their masks."""

    def turned(images: Images) -> bool:
        return any(
            isinstance(one, PIL.Image.Image) and orientation(one) in UPRIGHT for one in as_list(images, "image")
        )

    if turned(image) and not turned(mask_image):
        logger.warning(
            "`image` is turned upright by its EXIF data, and `mask_image`, which has none, is taken to be upright. To draw a mask "
            "on the upright picture: PIL.ImageOps.exif_transpose(image)."
        )


def check_generator(generator: torch.Generator | list[torch.Generator] | None, count: int, of: str = "images") -> None:
    """Raise `ValueError` if `generator` is not one generator, or a list of one for each of `count` draws."""
    kinds = [type(one) for one in generator] if isinstance(generator, list) else type(generator)
    if kinds not in (torch.Generator, [torch.Generator] * count, type(None)):
        raise ValueError(
            f"`generator` must be a torch.Generator or a list of {count}, one for each of the {of}, but is {kinds}."
        )


def prepare_latents(
    batch_size: int,
    num_latents: int,
    temperature: float,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """
    Return latents of shape (batch_size, num_latents, 1, 1): those given, or draws with a standard deviation of `temperature`.

    Raises:
        ValueError: if an argument is outside its range, or `latents` do not fit the others.
    """
    if not 0 <= temperature <= LARGEST_TEMPERATURE or (temperature != 1.0 and latents is not None):
        raise ValueError(
            f"`temperature` must be from 0 to {LARGEST_TEMPERATURE:g}, and 1 with `latents`, but is {temperature}."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
    if latents is not None and batch_size == 1:
        batch_size = max(1, len(latents))
    check_generator(generator, batch_size)
    shape = (batch_size, num_latents, 1, 1)
    if latents is None:
        return temperature * randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` must have shape {shape}, but has {tuple(latents.shape)}.")
    return latents.to(device=device, dtype=dtype)


def check_finite(images: torch.Tensor, temperature: float) -> None:
    """Raise `ValueError` if decoded images are not finite: they would be shown as black."""
    if not images.isfinite().all():
        raise ValueError(
            f"Images at a `temperature` of {temperature:g} or of the given `latents` are not finite in {images.dtype}: lower "
            "`temperature`, or load the pipeline with dtype=torch.float32."
        )


def postprocess(
    sample: torch.Tensor, processor: VaeImageProcessor, output_type: str | None
) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    """Convert images in [-1, 1] to `output_type`. The processor would denormalize them one by one."""
    if output_type not in ("pil", "np", "pt", None):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
    return processor.postprocess(processor.denormalize(sample), output_type=output_type or "np")
