# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""The error of an autoencoder's decoder at the right latents: its size, and how it spreads over frequencies.

An image is :math:`x \sim N(G(z), v C)`, where v is the mean squared error per pixel. Errors of neighbouring pixels are correlated. The
correlation C is assumed to be the same everywhere in the image and in all directions, so that the Fourier basis makes it diagonal. Its
diagonal is a **spectrum** S(r) of the radius r of a frequency in cycles per pixel, with mean 1 over the image's frequencies. A config
holds S at 16 equally spaced r from 0 to :math:`1 / \sqrt 2`, the corner of the frequency plane, and S is linear in between. It thus
applies to images of other sizes too, except for errors that change over more than 20 pixels. Channels are assumed to err independently.

The search for latents uses C = I (`restoration.py`). C only describes the uncertainty that remains at given latents.
"""

import math

import numpy as np
import torch


NUM_BANDS = 16
HIGHEST_FREQUENCY = math.sqrt(0.5)


def squared_error(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Return the mean squared error per pixel of each image, shape (B,), float32. Images have shape (B, C, H, W) and lie in [-1, 1].
    The mean over data is the `reconstruction_variance` of an autoencoder, its error in restoration.
    """
    return (reconstructions.float() - images.float()).square().flatten(1).mean(1)


def bands_around(height: int, width: int, num_bands: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the band below each frequency of `torch.fft.rfft2`, and the weight of the band above, both (H, W // 2 + 1)."""
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64)
    radius = torch.hypot(vertical[:, None], horizontal[None])  # cycles per pixel
    place = radius / HIGHEST_FREQUENCY * (num_bands - 1)
    below = place.floor().long().clamp(max=max(num_bands - 2, 0))
    return below, (place - below).clamp(0, 1)


def multiplicity(height: int, width: int) -> torch.Tensor:
    """Return how many frequencies of `fft2` each of `rfft2` stands for: 1 in columns that mirror themselves, 2 elsewhere."""
    count = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
    count[0] = 1
    count[width - width // 2 :] = 1  # a column that only an even width has
    return count.expand(height, -1)


def error_power(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the mean power of the error at each frequency, (H, W // 2 + 1), float64 on the CPU. Its overall mean is v."""
    error = (reconstructions.float() - images.float()).cpu().double()
    return torch.fft.rfft2(error, norm="ortho").abs().square().mean((0, 1))


def spectrum_of(power: torch.Tensor, width: int) -> list[float]:
    """
    Return S at its 16 bands, the `reconstruction_spectrum` of an autoencoder, from the mean `error_power` (H, W // 2 + 1) of images of
    `width` W. Raises `ValueError` if `power` is not finite or 0 everywhere.
    """
    if not (power.isfinite().all() and power.sum() > 0):
        raise ValueError(f"`power` must be finite and not 0 everywhere, but sums to {power.sum().item()}.")
    height, count = power.shape[0], multiplicity(power.shape[0], width)
    below, above = bands_around(height, width, NUM_BANDS)
    sums, weights = power.new_zeros(NUM_BANDS), power.new_zeros(NUM_BANDS)
    for band, share in ((below, 1 - above), (below + 1, above)):
        sums.index_add_(0, band.flatten(), (share * count * power).flatten())
        weights.index_add_(0, band.flatten(), (share * count).flatten())
    # Small images have no frequency near some bands. Those are interpolated from their neighbours.
    found = (weights > 1e-9).nonzero().flatten().numpy()
    values = (sums / weights.clamp(min=1e-9)).numpy()
    spectrum = torch.from_numpy(np.interp(np.arange(NUM_BANDS), found, values[found]))
    return (spectrum / mean_over_frequencies(at_frequencies(spectrum, height, width), width)).tolist()


def mean_over_frequencies(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return the mean over all frequencies of values given at the frequencies of `rfft2`."""
    count = multiplicity(values.shape[0], width)
    return (values * count).sum() / count.sum()


def at_frequencies(spectrum: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate S from its bands to the frequencies of `rfft2`, (H, W // 2 + 1)."""
    if len(spectrum) == 1:
        return spectrum.expand(height, width // 2 + 1)
    below, above = bands_around(height, width, len(spectrum))
    return (1 - above) * spectrum[below] + above * spectrum[below + 1]


def colored(white: torch.Tensor, spectrum: list[float] | None) -> torch.Tensor:
    """
    Apply C^(1/2) to white noise (B, C, H, W) of variance 1. The result has the correlations of the model's error, and variance 1 per
    pixel. Without a `spectrum`, C is the identity.
    """
    if spectrum is None:
        return white
    height, width = white.shape[-2:]
    values = at_frequencies(torch.tensor(spectrum, dtype=torch.float64), height, width)
    gain = (values / mean_over_frequencies(values, width)).sqrt().to(white)
    return torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(height, width))
