# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A decoder whose posterior is known."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from energies import randn


LATENTS, PIXELS, VARIANCE = 3, 8, 0.25


def posterior_of(mean: torch.Tensor, std: torch.Tensor) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.cat([mean, 2 * std.log()], 1))


class LinearDecoder:
    """G(z) = W z with orthogonal columns of different lengths: its posterior is Gaussian with a diagonal covariance."""

    def __init__(self):
        columns = torch.linalg.qr(randn(PIXELS, LATENTS))[0]
        self.weight = columns * torch.tensor([0.1, 1.0, 5.0])

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents.flatten(1) @ self.weight.T).view(-1, 1, 2, 4)

    def posterior(self, images: torch.Tensor) -> DiagonalGaussianDistribution:
        variance = 1 / (1 + self.weight.square().sum(0) / VARIANCE)
        mean = images.flatten(1) @ self.weight * variance / VARIANCE
        shape = (len(images), LATENTS, 1, 1)
        return posterior_of(mean.view(shape), variance.sqrt().view(1, -1, 1, 1).expand(shape))
