# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Reads images of any number of channels: arrays in `.npy` files, and the pages of a TIFF file, one channel each.

Pictures that Pillow reads at once have 1, 3 or 4 channels.
"""

import io
from pathlib import Path
from typing import IO

import numpy as np
import PIL.Image

from ecvae_diffusers.checks import MODES
from ecvae_diffusers.pipelines.inputs import GRAY_MODES, read_picture


ARRAY = ".npy"
MAX_BANDS = 16
# What can hold images of other numbers of channels than `MODES`.
BAND_FILES = {ARRAY, ".tif", ".tiff"}
# The value of white by the dtype of an array.
WHITE = {"uint8": 255, "uint16": 65535, "float16": 1, "float32": 1, "float64": 1}
# Rounding may leave [0, 1] by less than this.
TOLERANCE = 1e-3


def has_bands(source: dict | None, channels: int | None) -> bool:
    """Return whether an undecoded image is read by `read_bands`: an array, or one of a number of channels that pictures lack."""
    is_array = source is not None and str(source["path"]).lower().endswith(ARRAY)
    return is_array or channels not in (None, *MODES)


def num_bands(path: Path) -> int:
    """Return the number of channels in a `.npy` file. Raises `ValueError` if it can't be read."""
    try:
        with open(path, "rb") as file:
            return load_array(file).shape[-1]
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} can't be read: {error}") from error


def load_array(file: IO[bytes]) -> np.ndarray:
    """Return the array of a `.npy` file as (H, W, C). Raises `ValueError` if it is damaged, or neither (H, W, C) nor (H, W)."""
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"it is no array: {error}") from error
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.shape[-1] > min(array.shape[0], MAX_BANDS):
        found = f"must have shape (height, width, channels), with at most {MAX_BANDS} channels, but has {array.shape}"
        raise ValueError(f"the array {found}")
    return array


def read_bands(source: dict | None, channels: int | None) -> np.ndarray:
    """
    Return an undecoded image as uint8 (H, W, C). White is 255 for uint8, 65535 for uint16 and 1 for floating-point numbers.

    Args:
        source (`dict`): Path and bytes of a `.npy` file with an array (H, W, C) or (H, W), or of a TIFF file with C gray pages.
        channels (`int`, *optional*): C.

    Raises:
        ValueError: if the file has another number of channels, another dtype, or values that leave the range.
    """
    if source is None:
        raise ValueError("there is no image")
    is_array = str(source["path"]).lower().endswith(ARRAY)
    with io.BytesIO(source["bytes"]) if source["bytes"] is not None else open(source["path"], "rb") as content:
        bands = to_levels(load_array(content)) if is_array else read_pages(content)
    if channels not in (None, bands.shape[-1]):
        raise ValueError(f"it has {bands.shape[-1]} channel(s), not {channels}")
    return bands


def to_levels(array: np.ndarray) -> np.ndarray:
    if (white := WHITE.get(array.dtype.name)) is None:
        raise ValueError(f"the array must have one of the dtypes {', '.join(WHITE)}, but has {array.dtype}")
    if white == 255:
        return array
    if not np.isfinite(array).all() or array.min() < -TOLERANCE or array.max() > white + TOLERANCE:
        raise ValueError(f"the array must be in [0, {white}], but is from {array.min():g} to {array.max():g}")
    return (array.astype(np.float64) * (255 / white)).round().clip(0, 255).astype(np.uint8)


def read_pages(content: IO[bytes]) -> np.ndarray:
    try:
        image = PIL.Image.open(content)
    except PIL.UnidentifiedImageError:
        raise ValueError("cannot identify image file") from None  # Pillow's message holds a memory address
    with image:
        pages = []
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            if image.mode not in GRAY_MODES:
                raise ValueError(f"its pages must be gray, one per channel, but page {page} has mode {image.mode}")
            pages.append(np.asarray(read_picture(image, 1)))
    if len(sizes := {page.shape for page in pages}) > 1:
        raise ValueError(f"its pages must have one size, but have {sorted(sizes)}")
    return np.stack(pages, axis=-1)
