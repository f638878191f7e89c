# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures and masks as people have them, PIL images, arrays or tensors, one or a list, checked and made tensors."""

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor


Images = PIL.Image.Image | np.ndarray | torch.Tensor | list


def check_sizes(name: str, sizes: list[tuple[int, ...]]) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(f"`{name}` must hold images of one size, but holds {sorted(set(sizes))}.")


def prepare_picture(image: Images, processor: VaeImageProcessor) -> tuple[torch.Tensor, bool]:
    """A tensor as it is, or a picture (PIL or numpy) as a tensor (B, C, H, W) in [0, 1]; and whether it is one."""
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError("`image` is an empty list.")
    if all(isinstance(one, torch.Tensor) for one in images):
        check_sizes("image", [tuple(one.shape) for one in images])
        tensor = torch.stack(images) if isinstance(image, list | tuple) else image
        if tensor.ndim < 2 or tensor.shape[0] == 0 or not tensor.is_floating_point():
            raise ValueError(
                "`image` as a tensor must be a floating-point measurement of shape (batch, ...), but is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        return tensor, False
    if all(isinstance(one, PIL.Image.Image) for one in images):
        sizes = {(one.size, one.mode) for one in images}
        if len(sizes) > 1:
            raise ValueError(f"`image` must hold pictures of one size and mode, but holds {sorted(sizes)}.")
        mode = images[0].mode
        if mode not in ("1", "L", "P", "RGB", "RGBA"):
            raise ValueError(f"`image` has mode {mode}: use image.convert('RGB') or image.convert('L').")
        image = [one.convert({"1": "L", "P": "RGB"}.get(mode, mode)) for one in images]
    elif all(isinstance(one, np.ndarray) for one in images):
        check_sizes("image", [one.shape for one in images])
        if images[0].ndim == 2:
            image = [one[..., None] for one in images]
    else:
        kinds = sorted({type(one).__name__ for one in images})
        raise ValueError(f"`image` must be PIL images, numpy arrays or a tensor, but holds {kinds}.")
    picture = processor.preprocess(image).float()
    finite = picture[picture.isfinite()]
    if len(finite) and (finite.min() < -1e-3 or finite.max() > 1 + 1e-3):
        raise ValueError(
            f"`image` as a picture must have values in [0, 1], but they go from {finite.min():.4g} to "
            f"{finite.max():.4g}."
        )
    return picture, True


def prepare_mask(
    mask_image: Images, processor: VaeImageProcessor, batch_size: int, height: int, width: int
) -> torch.Tensor:
    """Which pixels were observed, (1 or B, 1, H, W): those where the mask is black."""
    masks = list(mask_image) if isinstance(mask_image, list | tuple) else [mask_image]
    if not masks:
        raise ValueError("`mask_image` is an empty list.")
    if all(isinstance(one, PIL.Image.Image) for one in masks):
        check_sizes("mask_image", [one.size for one in masks])
        if any(one.mode in ("F", "I") for one in masks):
            raise ValueError(
                "`mask_image` has a mode whose white is not agreed on: use mask.convert('L') from 0 to 255."
            )
        transparent = [
            one for one in masks if one.has_transparency_data and one.convert("RGBA").getextrema()[3][0] < 255
        ]
        if transparent:
            raise ValueError(
                f"`mask_image` has mode {transparent[0].mode} with transparent pixels: give a mask in black and white, such as "
                "mask.getchannel('A') or mask.convert('L')."
            )
    elif all(isinstance(one, np.ndarray | torch.Tensor) for one in masks):
        check_sizes("mask_image", [tuple(one.shape) for one in masks])
        if not all(bool(((one >= 0) & (one <= 1)).all()) for one in masks):
            raise ValueError("`mask_image` as an array or tensor must have values from 0 (kept) to 1 (repainted).")
    else:
        kinds = sorted({type(one).__name__ for one in masks})
        raise ValueError(f"`mask_image` must be PIL images, numpy arrays or a tensor, but holds {kinds}.")
    mask = processor.preprocess(mask_image)
    if mask.ndim != 4 or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (height, width):
        raise ValueError(
            f"`mask_image` must have one channel and the image's {height}x{width} px, but has shape "
            f"{tuple(mask.shape)} (batch, channels, height, width)."
        )
    if mask.shape[0] not in (1, batch_size):
        raise ValueError(f"`mask_image` must be one or {batch_size}, as many as images, but is {mask.shape[0]}.")
    return mask < 0.5
