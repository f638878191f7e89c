# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compares reconstructed or restored images with their originals, image by image."""

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


# Values may exceed [0, 1] by this much, through rounding.
RANGE_TOLERANCE = 1e-3


def reconstruction_metrics(images: torch.Tensor, originals: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Compute PSNR and SSIM (Wang et al. 2004; Gaussian window of 11 px, sigma 1.5) per image.

    Args:
        images, originals (`torch.Tensor` of shape `(B, C, H, W)`): Floats in [0, 1], with H and W of at least 11 px.

    Returns:
        `dict` with `psnr` in dB and `ssim`, tensors of shape `(B,)`. The PSNR of identical images is infinite.

    Raises:
        ValueError: if the shapes differ, the images are smaller than the window, or values are not floats in [0, 1].
    """
    if images.shape != originals.shape or images.ndim != 4:
        raise ValueError(f"`images` and `originals` must be (B, C, H, W), not {images.shape} and {originals.shape}.")
    if min(images.shape[2:]) < 11:
        raise ValueError(
            f"`images` must have a height and width of at least 11 px for SSIM, but has shape {tuple(images.shape)}."
        )
    for name, values in (("images", images), ("originals", originals)):
        low, high = values.min().item(), values.max().item()
        # NaN fails this comparison too.
        if not values.is_floating_point() or not (-RANGE_TOLERANCE <= low and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(f"`{name}` must be floats in [0, 1], but is {values.dtype} from {low:.4g} to {high:.4g}.")
    images, originals = images.float(), originals.float()
    psnr = peak_signal_noise_ratio(images, originals, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(images, originals, data_range=1.0, reduction="none")
    return {"psnr": psnr, "ssim": ssim.view(-1)}
