# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""How far images lie from what a model can explain, per pixel and per image.

**Residual.** The best reconstruction y of an image x ignores what the model cannot explain. As in the page's quick way to fill holes,
pixels are replaced and the image is encoded again, here with a weight per pixel instead of a mask. From :math:`y_0 = G(m(x))`,

.. math:: y_{k+1} = G(m(y_k + w_k (x - y_k))), \qquad w_k = \frac{1}{1 + e_k / (c v)}, \qquad e_k = B (x - y_k)^2,

where m is the encoder's mean, B the mean over channels and 3 x 3 pixels, v the model's error per pixel (`model_error.py`) and c = 16.
This is iteratively reweighted least squares for an error with the tails of a Cauchy distribution. The map has :math:`B (x - y)^2 / v`
per pixel. An image has the error in units of the model's own error spectrum S,

.. math:: \frac1{D v} \sum_k \frac{|F(x - y)_k|^2}{(1 + S_k) / 2}

with the Fourier transform F. Half of the error is taken to be white, because S is nearly 0 at some frequencies of smooth images. A small
defect changes this error little, so an image also has the mean of the largest twentieth of its map.

**Energy.** An image has its energy f(x), and the map :math:`B (\partial f / \partial x)^2` per pixel.

**Combination.** The parts have different units. Each is replaced by how rarely a value as large occurs in normal images, in bits:
:math:`t(a) = -\log_2 P(A \ge a)`. P is measured on held-out normal images (`evaluation/anomaly.py`), with an exponential tail beyond
the largest quantile that enough values exceed. The map is :math:`t_{residual} + t_{energy} / 4`, and the score is
:math:`t_{residual} + t_{largest} + t_{energy} / 4`. The sum of -log P is Fisher's method of combining tests. The energy counts less,
because it tells less.

Without such a measurement the energy has no unit. Score and map then hold the residual alone, for an exponential distribution of mean 1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .model_error import at_frequencies, mean_over_frequencies, multiplicity


NUM_REFINEMENTS = 3
OUTLIER_SCALE = 16.0  # c
WINDOW = 3
LARGEST_SHARE = 0.05
# The weights of the parts of scores and maps. The first part is the one that needs no measurement.
SCORE = {"residual": 1.0, "largest": 1.0, "energy": 0.25}
MAP = {"pixel_residual": 1.0, "pixel_energy": 0.25}
# A tail is exponential beyond the smallest 2^-k that this many values exceed, and beyond 2^-LARGEST_LEVEL.
VALUES_IN_TAIL, LARGEST_LEVEL = 16, 10
# The tail of a residual whose distribution was not measured.
UNMEASURED = {"quantiles": [0.0], "scale": 1.0}


def local_mean(values: torch.Tensor) -> torch.Tensor:
    """Apply B to values (B, C, H, W): the mean over channels and 3 x 3 pixels, (B, 1, H, W)."""
    margin = (WINDOW // 2,) * 4
    return F.avg_pool2d(F.pad(values.mean(1, keepdim=True), margin, mode="replicate"), WINDOW, stride=1)


def robust_reconstruction(
    reconstruct: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, variance: float
) -> torch.Tensor:
    """
    Return y, the reconstruction that ignores what the model cannot explain.

    Args:
        reconstruct (`Callable`): Encodes and decodes images.
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        variance (`float`): v, above 0.
    """
    found = reconstruct(images)
    for _ in range(NUM_REFINEMENTS):
        residual = images - found
        weight = 1 / (1 + local_mean(residual.square()) / (OUTLIER_SCALE * variance))
        found = reconstruct(found + weight * residual)
    return found


def spectral_error(residual: torch.Tensor, variance: float, spectrum: list[float] | None) -> torch.Tensor:
    """Return the error of residuals (B, C, H, W) in units of the error spectrum, (B,). It is near 1 for normal images."""
    height, width = residual.shape[-2:]
    power = torch.fft.rfft2(residual.float(), norm="ortho").abs().square().mean(1)
    expected = torch.ones(height, width // 2 + 1, dtype=torch.float64)
    if spectrum is not None:
        expected = at_frequencies(torch.tensor(spectrum, dtype=torch.float64), height, width)
        expected = (1 + expected / mean_over_frequencies(expected, width)) / 2
    weights = multiplicity(height, width) / expected
    return (power * weights.to(power)).sum((1, 2)) / (height * width * variance)


def measure_tail(values: torch.Tensor) -> dict[str, Any]:
    """
    Return the distribution of a part over normal images, as `bits` needs it: the quantiles that a share of 2^-k of the values reaches,
    k = 0, 1, ..., and the scale of an exponential tail beyond the last one. Raises `ValueError` if there are fewer than 32 values.
    """
    values = values.detach().flatten().double().cpu().sort().values
    if len(values) < 2 * VALUES_IN_TAIL:
        raise ValueError(f"`values` must be at least {2 * VALUES_IN_TAIL}, but are {len(values)}.")
    last = min(int(math.log2(len(values) / VALUES_IN_TAIL)), LARGEST_LEVEL)
    places = [len(values) - math.ceil(len(values) / 2**k) for k in range(last + 1)]
    scale = (values[places[-1] :] - values[places[-1]]).mean().item()
    return {"quantiles": values[places].tolist(), "scale": max(scale, 1e-12)}


def bits(values: torch.Tensor, tail: dict[str, Any]) -> torch.Tensor:
    """Return -log2 of the share of normal values that are at least as large, at least 0, in the shape of `values`, float32."""
    quantiles = torch.tensor(tail["quantiles"], device=values.device, dtype=torch.float32)
    last, values = len(quantiles) - 1, values.float().contiguous()
    beyond = last + (values - quantiles[-1]).clamp(min=0) / (tail["scale"] * math.log(2))
    if last == 0:
        return beyond
    level = torch.searchsorted(quantiles, values, right=True).clamp(1, last)
    low, high = quantiles[level - 1], quantiles[level]
    between = level - 1 + ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return torch.where(values >= quantiles[-1], beyond, between)


def largest(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the largest twentieth of a map (B, H, W) of each image, (B,)."""
    count = max(1, round(LARGEST_SHARE * values[0].numel()))
    return values.flatten(1).topk(count, dim=1).values.mean(1)


def combine(parts: dict[str, torch.Tensor], tails: dict[str, Any] | None, weights: dict[str, float]) -> torch.Tensor:
    """
    Return the weighted sum of parts in bits.

    Args:
        parts (`dict[str, torch.Tensor]`): The parts, in their own units. The energy may be missing.
        tails (`dict`, *optional*): What `measure_tail` found for each part. Without it, the sum is the first part alone.
        weights (`dict[str, float]`): `SCORE` or `MAP`.
    """
    if tails is None:
        return bits(parts[next(iter(weights))], UNMEASURED)
    found = [weight * bits(parts[name], tails[name]) for name, weight in weights.items() if name in parts]
    return torch.stack(found).sum(0)
