# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""The error that an autoencoder makes even of images whose latents it knows: how large it is, and at which frequencies.

An image is :math:`x \sim N(G(z), v C)`, v the mean squared error a pixel. Errors of neighbouring pixels are alike: C is the same
everywhere in the image and in all directions, so that Fourier's basis makes it diagonal, with a **spectrum** S(r) of the radius r
of a frequency (cycles a pixel) whose mean over the image's frequencies is 1. It is kept as its values at equal steps of r from 0 to
:math:`1 / \sqrt 2`, the corner of the plane of frequencies, between which it is linear: so it fits images of other sizes, too, as far as errors
that change over more than 20 pixels are no large part. Channels are taken to err independently, so that where they err alike what
`Colorization` leaves open is overstated.

The likelihood by which latents are searched has C = I (`restoration.py`); C tells only what is left open when they are known.
"""

import math

import torch


NUM_BANDS = 16
HIGHEST_FREQUENCY = math.sqrt(0.5)


def squared_error(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Mean squared error a pixel of each image, in the images' unit: its mean over data is an autoencoder's
    `reconstruction_variance`, the error that restoration allows the model itself.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`, float32.
    """
    return (reconstructions.float() - images.float()).square().flatten(1).mean(1)


def bands_around(
    height: int, width: int, num_bands: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The band below each frequency of `torch.fft.rfft2`, and how much the one above it counts, from 0 to 1: (H, W // 2 + 1)."""
    vertical = torch.fft.fftfreq(height, dtype=torch.float64, device=device)
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64, device=device)
    radius = torch.hypot(vertical[:, None], horizontal[None])  # cycles a pixel
    place = radius / HIGHEST_FREQUENCY * (num_bands - 1)
    below = place.floor().long().clamp(max=max(num_bands - 2, 0))
    return below, (place - below).clamp(0, 1)


def multiplicity(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """
    How many of all frequencies each one of `rfft2` stands for: 2, but for the columns that are their own mirror image, 1. Shape
    (H, W // 2 + 1).
    """
    count = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    return count.expand(height, -1)


def error_power(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Power of the error at each frequency, mean over images and channels: (H, W // 2 + 1), float64, on the CPU. Its mean over
    all frequencies is v.
    """
    error = (reconstructions.float() - images.float()).cpu().double()
    return torch.fft.rfft2(error, norm="ortho").abs().square().mean((0, 1))


def spectrum_of(power: torch.Tensor, width: int) -> list[float]:
    """
    S at its bands, from a power at each frequency (`error_power`'s, or a mean of such): what an autoencoder's config keeps as
    `reconstruction_spectrum`.

    Args:
        power (`torch.Tensor` of shape `(H, W // 2 + 1)`): Finite, and not 0 everywhere.
        width (`int`): W.

    Raises:
        ValueError: if `power` is not.
    """
    if not (power.isfinite().all() and power.sum() > 0):
        raise ValueError(f"`power` must be finite, and not 0 everywhere, but has the sum {power.sum().item()}.")
    height, count = power.shape[0], multiplicity(power.shape[0], width, power.device)
    below, above = bands_around(height, width, NUM_BANDS, power.device)
    sums, weights = power.new_zeros(NUM_BANDS), power.new_zeros(NUM_BANDS)
    for band, share in ((below, 1 - above), (below + 1, above)):
        sums.index_add_(0, band.flatten(), (share * count * power).flatten())
        weights.index_add_(0, band.flatten(), (share * count).flatten())
    # Small images have no frequency near some bands: those lie on the line between their neighbours.
    found = (weights > 1e-9).nonzero().flatten().tolist()
    values = (sums / weights.clamp(min=1e-9)).tolist()
    for missing in set(range(NUM_BANDS)).difference(found):
        left, right = max(b for b in found if b < missing), min((b for b in found if b > missing), default=None)
        weight = 0.0 if right is None else (missing - left) / (right - left)
        values[missing] = values[left] if right is None else (1 - weight) * values[left] + weight * values[right]
    spectrum = torch.tensor(values, dtype=torch.float64)
    return (spectrum / mean_over_frequencies(at_frequencies(spectrum, height, width), width)).tolist()


def mean_over_frequencies(values: torch.Tensor, width: int) -> torch.Tensor:
    """Of values at the frequencies of `rfft2`, each of which counts as often as it stands for."""
    count = multiplicity(values.shape[0], width, values.device)
    return (values * count).sum() / count.sum()


def at_frequencies(spectrum: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """S at the frequencies of `rfft2`, by its values at the bands: (H, W // 2 + 1)."""
    if len(spectrum) == 1:
        return spectrum.expand(height, width // 2 + 1)
    below, above = bands_around(height, width, len(spectrum), spectrum.device)
    return (1 - above) * spectrum[below] + above * spectrum[below + 1]


def colored(white: torch.Tensor, spectrum: list[float] | None) -> torch.Tensor:
    """
    C^(1/2) applied to images: of independent entries of variance 1 it makes such as the model's error, variance 1 a pixel too.

    Args:
        white (`torch.Tensor` of shape `(B, C, H, W)`): Images.
        spectrum (`list[float]`, *optional*): S at its bands; not given, C is the identity.
    """
    if spectrum is None:
        return white
    height, width = white.shape[-2:]
    values = at_frequencies(torch.tensor(spectrum, dtype=torch.float64), height, width)
    gain = (values / mean_over_frequencies(values, width)).sqrt().to(white)
    return torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(height, width))
