# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Calibration of an amortised posterior: what a chain on the true posterior does to the encoder's samples.

The posterior of a decoder G with a Gaussian likelihood of variance s^2 a pixel and a standard normal prior is
proportional to exp(-U), with

.. math:: U(z) = \frac{\| x - G(z) \|^2}{2 s^2} + \frac{\| z \|^2}{2}

(s^2 = beta / 2 is the likelihood that a bound with the squared error summed and beta times the KL divergence has). A chain that
starts at a sample of q(z|x) and follows U comes nearer to that posterior, and the encoder learns from where it ends, as a
generator learns from the ends of its own chains: [`EnergyCalibrator`] serves both.

It runs on whitened latents u = (z - m) / sigma, with the mean and standard deviation of q(z|x) held still. There q is standard
normal whatever it has learned, so that one drift step fits every dimension, those that are known to a hundredth and those
that the image says nothing of. With a noise of sqrt(2 a) a step, the chain is unadjusted Langevin dynamics, preconditioned by
sigma^2, whose stationary law is the posterior but for terms of the order of a.
"""

import math
from collections.abc import Callable

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .schedulers.scheduling_langevin import LangevinScheduler


class PosteriorEnergy:
    """
    U of a batch of images, as a function of whitened latents: an energy for `EnergyCalibrator.calibrate(..., energy_model=)`.

    Args:
        decode (`Callable`): G: latents (B, d, 1, 1) -> images (B, C, H, W).
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        posterior (`DiagonalGaussianDistribution`): q(z|x); its mean and standard deviation are taken as they are now.
        variance (`float`): s^2 > 0, a pixel.

    Raises:
        ValueError: if `variance` is not above 0.
    """

    def __init__(
        self, decode: Callable, images: torch.Tensor, posterior: DiagonalGaussianDistribution, variance: float
    ):
        if not 0 < variance < math.inf:
            raise ValueError(f"`variance` must be a finite number above 0, but is {variance}.")
        self.decode, self.images, self.variance = decode, images, variance
        self.mean, self.std = posterior.mean.detach().float(), posterior.std.detach().float()

    def whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """u = (z - m) / sigma, with gradients to z alone."""
        return (latents - self.mean) / self.std

    def unwhiten(self, whitened: torch.Tensor) -> torch.Tensor:
        """z = m + sigma u."""
        return self.mean + self.std * whitened

    def __call__(self, whitened: torch.Tensor) -> torch.Tensor:
        """U(m + sigma u), one number an image: shape (B,)."""
        latents = self.unwhiten(whitened)
        error = (self.decode(latents).float() - self.images.float()).square().flatten(1).sum(1)
        return error / (2 * self.variance) + latents.square().flatten(1).sum(1) / 2


def posterior_chain(num_steps: int, drift_step_size: float = 0.1) -> LangevinScheduler:
    """
    The chain of K steps on whitened latents: with a noise of sqrt(2 a) it leaves the posterior as it is, but for terms of
    the order of a. Steps are stable below 2 over the largest curvature of U in u, which is 1 where q is right.
    """
    return LangevinScheduler(
        num_steps=num_steps, drift_step_size=drift_step_size, noise_scale=math.sqrt(2 * drift_step_size)
    )


def negative_log_posterior(posterior: DiagonalGaussianDistribution, energy: PosteriorEnergy) -> Callable:
    """
    The other form of the constraint, for `EnergyCalibrator.calibrate(..., distance=)`: -log q(z~|x) less the entropy that q
    has now, in nats an image, which is 0 in the mean where the ends z~ of the chain are samples of q itself. Unlike the
    squared distance between a sample and its chain's end, it widens q where the chain's ends lie wider.

    Args:
        posterior (`DiagonalGaussianDistribution`): q(z|x), with gradients.
        energy ([`PosteriorEnergy`]): What the chain ran on.
    """

    def distance(samples: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        latents = energy.unwhiten(targets)
        squared = ((latents - posterior.mean) / posterior.std).square()
        # log sigma as it is now is in the entropy: it has no value here, but a gradient.
        widening = 0.5 * posterior.logvar - energy.std.log()
        return (0.5 * (squared - 1) + widening).flatten(1).sum(1)

    return distance
