# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Directions in the latent space, along which images are edited.

Let m(x) be the posterior mean of an image. An edit with strength s along a direction v is

.. math:: x' = G(m + s v) + (x - G(m)),

where the second term, the residual, is what the reconstruction lost. Three kinds of directions:

**Difference of means** of two sets of images, :math:`v = \bar m_b - \bar m_a`.

**Normal of a linear classifier** of the two sets, Fisher's discriminant :math:`w = \Sigma^{-1} (\bar m_b - \bar m_a)`. The covariance
within the sets is shrunk towards that of the prior as if d more latents had been drawn from it,
:math:`\Sigma = (n \hat\Sigma + d I) / (n + d)`. The direction is :math:`v = w (w \cdot (\bar m_b - \bar m_a)) / (w \cdot w)`. It thus
crosses from the level of a to that of b at strength 1, as the difference of means does, but moves less in what both sets share.

**Principal directions** of the aggregated posterior, the eigenvectors of :math:`\mathrm{Cov}_x(m(x))`, each as long as its standard
deviation.
"""

import numpy as np
import torch


NUM_FOLDS = 5


def difference_of_means(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the difference (d,) of the means of latents a (N, d) and b (M, d)."""
    return b.mean(0) - a.mean(0)


def classifier_normal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Fisher's discriminant (d,) of latents a (N, d) and b (M, d), as long as its part of the difference of means."""
    difference, centered = difference_of_means(a, b), torch.cat([a - a.mean(0), b - b.mean(0)])
    count, dim = centered.shape
    covariance = (centered.T @ centered + dim * torch.eye(dim).to(centered)) / (count + dim)
    normal = torch.linalg.solve(covariance, difference)
    return normal * (normal @ difference) / (normal @ normal).clamp(min=1e-30)


METHODS = {"means": difference_of_means, "classifier": classifier_normal}


def held_out_accuracy(a: torch.Tensor, b: torch.Tensor, method: str) -> float:
    """
    Return how often a direction from four fifths of latents a (N, d) and b (M, d) tells which set another latent is from: by
    whether it lies beyond the middle of the two means. Every latent is held out once. Both sets count the same.

    Args:
        method (`str`): `"means"` or `"classifier"`.
    """
    right: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for fold in range(NUM_FOLDS):
        held_out = [torch.arange(len(latents), device=latents.device) % NUM_FOLDS == fold for latents in (a, b)]
        rest = a[~held_out[0]], b[~held_out[1]]
        direction, middle = METHODS[method](*rest), (rest[0].mean(0) + rest[1].mean(0)) / 2
        right[0].append((a[held_out[0]] - middle) @ direction < 0)
        right[1].append((b[held_out[1]] - middle) @ direction > 0)
    return sum(torch.cat(found).float().mean().item() for found in right.values()) / 2


def principal_directions(latents: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the mean (d,) of latents (N, d) and their first principal directions (K, d), each as long as its standard deviation. K is at
    most `count`, N and d.
    """
    mean = latents.mean(axis=0)
    _, values, directions = np.linalg.svd(latents - mean, full_matrices=False)
    count = min(count, len(directions))
    return mean, directions[:count] * values[:count, None] / len(latents) ** 0.5
