# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lays images out as one picture and writes it. Imports no torch: `ecvae sample --backend onnx` runs without it."""

from pathlib import Path

import numpy as np
import PIL.Image

from .atomic import replacing
from .checks import MODES


def displayed(images: np.ndarray) -> np.ndarray:
    """Return the channels (..., C) that pictures show: all of 1, 3 or 4, the first of 2 as gray, and the first three of more as RGB."""
    channels = images.shape[-1]
    return images if channels in MODES else images[..., : 1 if channels == 2 else 3]


def lay_out(images: np.ndarray, num_columns: int, scale: int = 1) -> PIL.Image.Image:
    """
    Lay images out in rows, with a line of one pixel between them.

    Args:
        images (`np.ndarray` of shape `(batch_size, height, width, channels)`, uint8):
            Gray, RGB or RGBA. Of 2 channels the first is shown as gray, and of more than 4 the first three as RGB.
        num_columns (`int`): Images per row.
        scale (`int`, *optional*, defaults to 1): Whole-number magnification, without smoothing.
    """
    images = displayed(images)
    batch_size, height, width, channels = images.shape
    num_rows = -(-batch_size // num_columns)
    mode = MODES[channels]
    grid = PIL.Image.new(mode, (num_columns * (width + 1) - 1, num_rows * (height + 1) - 1), "white")
    for i, image in enumerate(images):
        tile = PIL.Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        grid.paste(tile, ((i % num_columns) * (width + 1), (i // num_columns) * (height + 1)))
    return magnify(grid, scale)


def magnify(picture: PIL.Image.Image, scale: int) -> PIL.Image.Image:
    """Return a picture magnified by a whole number, without smoothing."""
    return picture.resize((picture.width * scale, picture.height * scale), PIL.Image.Resampling.NEAREST)


def display_scale(height: int, width: int) -> int:
    """Return the whole-number magnification that brings small images to up to 64 px, so that they can be looked at."""
    return max(1, 64 // max(height, width))


def save_atomically(image: PIL.Image.Image, path: Path) -> None:
    """Write a PNG. Raises `WriteError` if it can't be written."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
