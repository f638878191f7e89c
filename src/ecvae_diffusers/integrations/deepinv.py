# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""A trained model in the hands of deepinv (https://deepinv.github.io), which is not imported: its classes call their parts by name.

deepinv's images lie in [0, 1], and its physics measures them, :math:`y = A x + n`. With :math:`x' = 2 x - 1`, the image in [-1, 1],
the same measurement of :math:`x'` is :math:`y' = 2 y - A 1`, with noise of twice the standard deviation.
"""

import math
from typing import Any

import torch
import torch.nn as nn

from ..operators import FunctionOperator
from ..pipelines import ECVAEPipeline, ECVAERestorationPipeline


__all__ = ["ECVAEDenoiser", "ECVAEGenerator", "ECVAEReconstructor"]


class ECVAEReconstructor(nn.Module):
    """
    A pipeline for restoration as a `Reconstructor` of deepinv: `model(y, physics)` returns images.

    Args:
        pipe ([`ECVAERestorationPipeline`]): The pipeline.
        noise_std (`float`, *optional*):
            Standard deviation of the noise, for images in [0, 1]. Default: that of the physics, `physics.noise_model.sigma`.
        seed (`int`, *optional*, defaults to 0): Seed of the search.
        **arguments: Further arguments of the pipeline's call, such as `num_restorations` and `num_inference_steps`.
    """

    def __init__(
        self, pipe: ECVAERestorationPipeline, noise_std: float | None = None, seed: int = 0, **arguments: Any
    ):
        super().__init__()
        if not isinstance(pipe, ECVAERestorationPipeline):
            raise ValueError(f"`pipe` must be an ECVAERestorationPipeline, but is a {type(pipe).__name__}.")
        self.pipe, self.noise_std, self.seed, self.arguments = pipe, noise_std, seed, arguments

    def forward(self, y: torch.Tensor, physics: Any, **kwargs: Any) -> torch.Tensor:
        """
        Return the mean of the answers, images (B, C, H, W) in [0, 1].

        Args:
            y (`torch.Tensor`): Measurements of B images.
            physics: A linear physics, with `A`, `A_adjoint` and a `noise_model`.

        Raises:
            ValueError: if the physics is not linear, its noise is not Gaussian with one standard deviation, or `y` does not fit.
        """
        operator = FunctionOperator(physics.A, linear_adjoint(physics))
        noise_std = noise_of(physics) if self.noise_std is None else self.noise_std
        output: Any = self.pipe(
            2 * y - physics.A(torch.ones_like(operator.A_adjoint(y))),
            operator=operator,
            noise_std=2 * noise_std,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="pt",
            **self.arguments,
        )
        return output.mean.to(y.device)


class ECVAEDenoiser(nn.Module):
    r"""
    A pipeline as a `Denoiser` of deepinv, for its plug-and-play priors (`PnP`, `RED`, `ScorePrior`).

    The image :math:`x_\sigma` is encoded and decoded, and what the model can't explain is kept as far as it is no noise. With the
    model's error v per pixel (`reconstruction_variance`, for images in [-1, 1]),

    .. math:: D(x_\sigma, \sigma) = G(m(x_\sigma)) + \frac{v}{v + 4 \sigma^2} (x_\sigma - G(m(x_\sigma))),

    the mean of the image given its latents :math:`m(x_\sigma)`. The encoder has not learned to see through strong noise: keep
    :math:`\sigma` small, 0.05 for example.

    Args:
        pipe ([`ECVAEPipeline`]): The pipeline. Images must have its size.

    Raises:
        ValueError: if the autoencoder has no `reconstruction_variance`, which training measures.
    """

    def __init__(self, pipe: ECVAEPipeline):
        super().__init__()
        if not (variance := pipe.vae.config.reconstruction_variance):
            raise ValueError(
                f"`pipe` must have a `reconstruction_variance` in its autoencoder's config, but it is {variance}."
            )
        self.vae, self.variance = pipe.vae, variance

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Denoise images (B, C, H, W) in [0, 1]. `sigma` is the standard deviation of their noise, one number or one per image.
        """
        noise = 2 * torch.as_tensor(sigma, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
        noisy = (2 * x - 1).to(self.vae.dtype)
        decoded = self.vae.decode(self.vae.encode(noisy).latent_dist.mode()).sample
        denoised = decoded + self.variance / (self.variance + noise.square()) * (noisy - decoded)
        return (denoised / 2 + 0.5).to(x.dtype)


class ECVAEGenerator(nn.Module):
    """
    A decoder as a generative prior of deepinv, such as `CSGMGenerator(backbone_generator=ECVAEGenerator(pipe))`.

    Args:
        pipe ([`ECVAEPipeline`]): The pipeline.
    """

    def __init__(self, pipe: ECVAEPipeline):
        super().__init__()
        self.vae, self.nz = pipe.vae, pipe.vae.config.latent_channels

    def forward(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Decode latents (B, nz, 1, 1) to images (B, C, H, W) in [0, 1]. deepinv draws them from U(-1, 1), the decoder expects N(0, I): a
        search moves them further.
        """
        return (self.vae.decode(z.to(self.vae.dtype)).sample / 2 + 0.5).to(z.dtype)


def linear_adjoint(physics: Any) -> Any:
    """Return the adjoint of a physics. Raises `ValueError` if it has none, because it is not linear."""
    if not callable(getattr(physics, "A_adjoint", None)):
        raise ValueError(f"`physics` must be linear, with `A` and `A_adjoint`, but is {type(physics).__name__}.")
    return physics.A_adjoint


def noise_of(physics: Any) -> float:
    """Return the standard deviation of a physics' Gaussian noise, 0 without noise. Raises `ValueError` for other noise."""
    noise = getattr(physics, "noise_model", None)
    if noise is None or type(noise).__name__ == "ZeroNoise":
        return 0.0
    sigma = getattr(noise, "sigma", None) if type(noise).__name__ == "GaussianNoise" else None
    values = torch.as_tensor(math.nan if sigma is None else sigma, dtype=torch.float64).flatten()
    if not len(values) or not ((values == values[0]) & (values >= 0) & (values <= 0.5)).all():
        raise ValueError(
            f"`physics` must have Gaussian noise with one standard deviation of at most 0.5, but has {noise}: give `noise_std` to the reconstructor."
        )
    return values[0].item()
