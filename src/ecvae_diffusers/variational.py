# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""The variational bound that the autoencoder is trained on, and what guards it against posterior collapse.

.. math::
    L = \mathbb E_x \Big[ \| x - \hat x \|^2 + \beta \sum_j \max\big(\lambda_\text{free}, \mathbb E_x
    \operatorname{KL}(q(z_j|x) \,\|\, p(z_j))\big) \Big]

with the squared error SUMMED over an image, which is -log p(x|z) up to constants at a variance of 1/2. Free bits (Kingma
et al. 2016, arXiv 1606.04934) leave each latent dimension its first nats without charge.
"""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput


# Variance over the data above which the posterior mean of a latent dimension says something (Burda et al. 2016,
# arXiv 1509.00519, section 5.2).
ACTIVE_VARIANCE = 0.01


@dataclass
class ELBOOutput(BaseOutput):
    """
    Output of `elbo_loss`: tensors of no dimension.

    Args:
        loss (`torch.Tensor`): L, with gradients.
        reconstruction (`torch.Tensor`): Squared error, summed over an image and averaged over the batch. No gradient.
        kl (`torch.Tensor`): KL divergence in nats, summed over dimensions and averaged over the batch, without beta
            and free bits. No gradient.
    """

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


def kl_per_dimension(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """KL(q(z_j|x) || N(0, 1)) = (mean^2 + var - 1 - log var) / 2 in nats: shape (B, d)."""
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar)
    return kl.flatten(1)


def elbo_loss(
    sample: torch.Tensor,
    reconstruction: torch.Tensor,
    posterior: DiagonalGaussianDistribution,
    kl_weight: float = 1.0,
    free_bits: float = 0.0,
) -> ELBOOutput:
    """
    The (negative) variational bound.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`), reconstruction: Images in [-1, 1], and what the decoder made.
        posterior ([`DiagonalGaussianDistribution`]): q(z|x), latents of shape (B, d, 1, 1).
        kl_weight (`float`, *optional*, defaults to 1.0): beta, at least 0.
        free_bits (`float`, *optional*, defaults to 0.0): Nats a dimension, at least 0, averaged over this batch.

    Returns:
        [`ELBOOutput`]
    """
    error = (reconstruction.float() - sample).square().flatten(1).sum(1).mean()
    kl = kl_per_dimension(posterior).mean(0)
    charged = kl.clamp(min=free_bits) if free_bits > 0 else kl
    return ELBOOutput(loss=error + kl_weight * charged.sum(), reconstruction=error.detach(), kl=kl.detach().sum())


def kl_warmup(kl_weight: float, step: int, num_steps: int) -> float:
    """
    beta of a step: from `kl_weight` / `num_steps` at step 0 up to `kl_weight` in equal parts, against posterior collapse
    (Bowman et al. 2016, arXiv 1511.06349). `num_steps` 0 is no warm-up.
    """
    return kl_weight * min(1.0, (step + 1) / max(num_steps, 1))


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


def active_units(posterior_mean: torch.Tensor) -> torch.Tensor:
    """
    Number of latent dimensions whose posterior mean varies over the data, by more than 0.01 in variance.

    Args:
        posterior_mean (`torch.Tensor` of shape `(B, d, 1, 1)` or `(B, d)`):.
    """
    return (posterior_mean.float().flatten(1).var(0, correction=0) > ACTIVE_VARIANCE).sum()
