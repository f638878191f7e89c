# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Read pictures and masks: one reader for training, for evaluation and for every pipeline."""

import struct

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging


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
# Values of pictures that are beyond [0, 1] by less are rounding, of a resize or of half precision.
RANGE_TOLERANCE = 1e-3
# Levels of a mask that are nearly black and nearly white.
DARK, BRIGHT = 0.06, 0.94
# Share of the pixels of a mask that a region of labels has at least.
LEAST_REGION = 0.005
# Masks of more colours may be paint as JPEG files blur it, besides labels.
MAX_LABELS = 8
PAINT_ON_DARK = (
    "To repaint bright paint on a dark ground: PIL.Image.fromarray(numpy.asarray(mask.convert('RGB')).max(-1) >= 128)"
)
PAINT_ON_BRIGHT = (
    "To repaint coloured paint on a bright ground: "
    "PIL.Image.fromarray(numpy.ptp(numpy.asarray(mask.convert('RGB')), axis=-1) >= 64)"
)
# Shades of one colour are equal to so many of 255 levels, or of 65,535.
SHADE_TOLERANCE = 2


# Pictures of PIL


def white_level(image: PIL.Image.Image) -> int | None:
    """Return the value of white in a picture's pixels, `None` if the mode has no agreed one."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in FORMATS_OF_16_BITS):
        return 4095 if getattr(image, "tag_v2", {}).get(TIFF_BITS) == (12,) else 65535
    return None if image.mode in UNRANGED_MODES else 255


def check_pixels(image: PIL.Image.Image) -> None:
    """Raise `ValueError` if pixels are not finite."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("mode F holds values that are not finite.")


def check_mode(image: PIL.Image.Image) -> None:
    """Raise `ValueError` if the mode has no agreed white, or if pixels are not finite."""
    check_pixels(image)
    if white_level(image) is None:
        low, high = image.getextrema()
        white = next((level for level in (1, 255, 65535) if high <= level), high)
        raise ValueError(
            f"mode {image.mode} has no agreed range, and the values go from {low:.4g} to {high:.4g}. If white is {white:g}: "
            f"PIL.Image.fromarray((numpy.asarray(image) / {white:g} * 255).clip(0, 255).round().astype('uint8'))"
        )


def orientation(image: PIL.Image.Image) -> int:
    """
    Return how the EXIF data say that a picture lies, from 1 (upright) to 8.

    Raises:
        ValueError: if the EXIF data can't be read.
    """
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error) as error:
        raise ValueError(
            f"the EXIF data can't be read ({error}). To read the pixels as they are stored: image.info.pop('exif')"
        ) from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture as its EXIF data say. Photographs are stored as the camera was held."""
    image.load()  # Pillow turns TIFF files itself.
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def opacity(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the alpha channel that the transparent colour of an L, I;16 or RGB picture stands for."""
    pixels, key = np.asarray(image), np.array(image.info["transparency"])
    if image.mode == "RGB" and key.max() > 255:
        key = key >> 8  # Pillow keeps the high bytes of 16-bit pixels, and the whole key.
    if image.mode == "L":
        # Pillow spreads 2- and 4-bit pixels over 8 bits, and leaves the key.
        scales = [scale for scale in (1, 17, 85) if not (pixels % scale).any() and (pixels == key * scale).any()]
        key = key * (scales or [1])[0]
    transparent = pixels == key
    return PIL.Image.fromarray(
        np.where(transparent.all(-1) if image.mode == "RGB" else transparent, 0, 255).astype("u1")
    )


def read_picture(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """
    Bring a picture of any mode to 1, 3 or 4 channels of 8 bits: upright by its EXIF data, with 16 bits scaled and rounded, and
    with transparency on white unless the channels include alpha.

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
        # Pillow converts La, whose colours are multiplied by alpha, to LA alone.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if channels < 4 and image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    # Pillow converts LAB to RGB alone.
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(MODES[channels])


# Masks of PIL


def read_mask(mask: PIL.Image.Image) -> np.ndarray:
    """
    Return which pixels of a mask are to be repainted, a bool array of shape (H, W). Of black and one other level or colour, that is
    whatever is not black: labels 0 and 1, palettes of one object, paint. Of shades of white, or of one bright paint, on a dark
    ground, it is what has at least half of white.

    Raises:
        ValueError: if the mask is neither, or has pixels that are transparent or not finite; with what it holds.
    """
    check_pixels(mask)
    white = white_level(mask)
    if mask.has_transparency_data and read_picture(mask, 4).getextrema()[3][0] < 255:
        alpha = "mask.convert('RGBA').getchannel('A')"
        raise ValueError(
            f"mode {mask.mode} with transparent pixels does not say what is to be repainted. What is transparent or erased: "
            f"{alpha}.point(lambda a: 255 - a). What is opaque or painted: {alpha}"
        )
    if white == 255:
        picture = read_picture(mask, 3)
        pixels, found = np.asarray(picture), picture.getcolors(256)
        paint_recipe = PAINT_ON_DARK if np.median(pixels.max(-1)) < 128 else PAINT_ON_BRIGHT
        if found is None:
            raise ValueError(f"mode {mask.mode} with more than 256 colours is not in black and white. {paint_recipe}")
        counts, colours = zip(*sorted(found, key=lambda one: max(one[1])))
    else:
        pixels = np.asarray(upright(mask))[..., None]
        values, counts = np.unique(pixels, return_counts=True)
        colours = values[:, None]
    colours = np.array(colours)
    level = colours.max(1)  # in ascending order
    if level[0] == 0 and (len(level) == 1 or (len(level) == 2 and level[1] > 0)):
        return pixels.any(-1)
    # Shades of one colour, white or a paint, on black.
    shades = np.abs(colours - level[:, None] / max(level[-1], 1) * colours[-1]).max() <= SHADE_TOLERANCE
    if white is not None and shades and is_in_black_and_white(pixels.max(-1) / white, gray=len(set(colours[-1])) == 1):
        return pixels.max(-1) >= white / 2
    texts = [str(one[0] if len(set(one)) == 1 else tuple(one)) for one in colours.tolist()]
    most = np.argsort(counts)[::-1]
    named = ", ".join(texts[i] for i in sorted(most[:5])) + (", ..." if len(texts) > 5 else "")
    example = texts[next((i for i in most if level[i] > 0), 0)]
    equal = (
        f"(numpy.asarray(mask.convert('RGB')) == {example}).all(-1)"
        if white == 255
        else f"numpy.asarray(mask) == {example}"
    )
    raise ValueError(
        f"mode {mask.mode} with the values {named} is not in black (kept) and white (repainted). To repaint one of them: "
        f"PIL.Image.fromarray({equal})" + (f". {paint_recipe}" if white == 255 and len(texts) > MAX_LABELS else "")
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


# What pipelines are given


def as_list(image: Images, name: str) -> list:
    """Return what an argument holds as a list of PIL images, of arrays or of tensors; arrays and tensors of one shape."""
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError(f"`{name}` is an empty list.")
    if not any(all(isinstance(one, kind) for one in images) for kind in (PIL.Image.Image, np.ndarray, torch.Tensor)):
        kinds = sorted({type(one).__name__ for one in images})
        raise ValueError(
            f"`{name}` must be PIL images, numpy arrays or a tensor, or a list of one, but holds {kinds}."
        )
    if not isinstance(images[0], PIL.Image.Image):
        check_sizes(name, [tuple(one.shape) for one in images])
    return images


def check_sizes(name: str, sizes: list[tuple[int, ...]]) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(f"`{name}` must hold images of one size, but holds {sorted(set(sizes))}.")


def prepare_measurement(image: Images) -> torch.Tensor:
    """Return tensors (one, or a list of one shape) as one floating-point tensor (batch, ...), with their values."""
    images = as_list(image, "image")
    tensor = torch.stack(images) if isinstance(image, list | tuple) else image
    if tensor.ndim < 2 or tensor.shape[0] == 0 or not tensor.is_floating_point():
        raise ValueError(
            "`image` as a tensor must be a floating-point measurement of shape (batch, ...), but is "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    return tensor


def prepare_picture(image: Images, processor: VaeImageProcessor, channels: int) -> torch.Tensor:
    """
    Return pictures as one tensor (B, C, H, W) in [0, 1]. PIL images get `channels` channels; arrays (B, H, W, C) and tensors
    (B, C, H, W) keep theirs, and may hold values that are not finite.

    Raises:
        ValueError: if there is none, sizes differ, or a picture can't be read or is not in [0, 1].
    """
    images = as_list(image, "image")
    if isinstance(images[0], PIL.Image.Image):
        try:
            pictures = [read_picture(one, channels) for one in images]
        except ValueError as error:
            raise ValueError(f"`image` can't be read: {error}") from error
        check_sizes("image", [one.size for one in pictures])
        if channels == 1 and any(has_colours(one) for one in images):
            logger.warning(
                "`image` has colours, and the model is gray: it is read as gray, as training with 1 channel does."
            )
        levels = np.stack([np.asarray(one).reshape(*one.size[::-1], channels) for one in pictures])
        return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255
    kind = images[0].dtype
    if not (kind.is_floating_point if isinstance(images[0], torch.Tensor) else np.issubdtype(kind, np.floating)):
        raise ValueError(
            f"`image` as an array or tensor must be floating-point in [0, 1], but is {kind}. Of levels from 0 to 255: image / 255."
        )
    image = images if isinstance(image, tuple) else image
    if images[0].ndim == 2:
        image = [one[None] if isinstance(one, torch.Tensor) else one[..., None] for one in images]
    picture = processor.preprocess(image)
    finite = picture[picture.isfinite()]
    if len(finite) and (finite.min() < -RANGE_TOLERANCE or finite.max() > 1 + RANGE_TOLERANCE):
        of_model = finite.min() >= -1 - RANGE_TOLERANCE and finite.max() <= 1 + RANGE_TOLERANCE
        raise ValueError(
            f"`image` must have values in [0, 1], but they go from {finite.min():.4g} to {finite.max():.4g}."
            + (" From [-1, 1]: image / 2 + 0.5." if of_model else "")
        )
    return picture


def has_colours(image: PIL.Image.Image) -> bool:
    if image.mode in GRAY_MODES:
        return False
    pixels = np.asarray(read_picture(image, 3))
    return bool((pixels[..., 1:] != pixels[..., :1]).any())


def prepare_mask(
    mask_image: Images, processor: VaeImageProcessor, batch_size: int, height: int, width: int
) -> torch.Tensor:
    """
    Return which pixels were observed, bool of shape (1 or B, 1, H, W): those where the mask is black. Warns of a mask that repaints
    nothing or everything.

    Raises:
        ValueError: if a mask can't be read, or number, size or values do not fit.
    """
    masks = as_list(mask_image, "mask_image")
    if isinstance(masks[0], PIL.Image.Image):
        try:
            read = [read_mask(one) for one in masks]
        except ValueError as error:
            raise ValueError(f"`mask_image` can't be read: {error}") from error
        check_sizes("mask_image", [one.shape for one in read])
        repainted = torch.from_numpy(np.stack(read)).unsqueeze(1)
    else:
        if not all(bool(((one >= 0) & (one <= 1)).all()) for one in masks):
            raise ValueError("`mask_image` as an array or tensor must have values from 0 (kept) to 1 (repainted).")
        repainted = processor.preprocess(masks if isinstance(mask_image, tuple) else mask_image) >= 0.5
    if repainted.ndim != 4 or repainted.shape[1] != 1 or tuple(repainted.shape[2:]) != (height, width):
        raise ValueError(
            f"`mask_image` must have one channel and the image's {height}x{width} px, but has shape "
            f"{tuple(repainted.shape)} (batch, channels, height, width)."
        )
    if repainted.shape[0] not in (1, batch_size):
        raise ValueError(f"`mask_image` must be one or {batch_size}, as many as images, but is {repainted.shape[0]}.")
    flat = repainted.flatten(1)
    for found, what in ((~flat.any(1), "nothing"), (flat.all(1), "everything")):
        if found.any():
            logger.warning(
                f"`mask_image` repaints {what} in {int(found.sum())} of {len(found)} mask(s): white is repainted."
            )
    return ~repainted


def check_turned_together(image: Images, mask_image: Images) -> None:
    """Warn where the EXIF data turn pictures, and their masks say nothing of it."""

    def turned(argument: Images) -> bool:
        images = argument if isinstance(argument, list | tuple) else [argument]
        return any(isinstance(one, PIL.Image.Image) and orientation(one) in UPRIGHT for one in images)

    if turned(image) and not turned(mask_image):
        logger.warning(
            "`image` is turned upright by its EXIF data, and `mask_image`, which has none, is taken to be upright. Of a picture as "
            "it is stored: draw the mask on PIL.ImageOps.exif_transpose(image)."
        )
