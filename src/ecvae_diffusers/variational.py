# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""The variational loss that the autoencoder is trained on, and bounds on the likelihood of images.

.. math:: L = \mathbb E_x \big[ \| x - \hat x \|^2 + \beta \operatorname{KL}(q(z|x) \,\|\, p(z)) \big]

The squared error is SUMMED per image. It is -log p(x|z) for a variance of 1/2, up to a constant.

The likelihood of images is measured by the importance-weighted bound (Burda et al. 2016, arXiv 1509.00519),

.. math:: \log p(x) \ge \mathbb E_{z_1..z_K \sim q(z|x)} \log \tfrac1K \sum_k \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)},

which at K = 1 is the evidence lower bound and rises with K.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


# A latent dimension is active if the variance of its posterior mean over the data is above this (Burda et al. 2016,
# arXiv 1509.00519, section 5.2).
ACTIVE_VARIANCE = 0.01


@dataclass
class ELBOOutput(BaseOutput):
    """
    Output of `elbo_loss`: 0-dimensional tensors.

    Args:
        loss (`torch.Tensor`): L, with gradients.
        reconstruction (`torch.Tensor`): Squared error, summed per image and averaged over the batch. No gradient.
        kl (`torch.Tensor`): KL divergence in nats, averaged over the batch, without beta. No gradient.
    """

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


def elbo_loss(
    sample: torch.Tensor,
    reconstruction: torch.Tensor,
    posterior: DiagonalGaussianDistribution,
    kl_weight: float = 1.0,
) -> ELBOOutput:
    """
    Return the loss L: the negative variational bound with KL weight beta.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`), reconstruction: Images in [-1, 1], and their reconstructions.
        posterior ([`DiagonalGaussianDistribution`]): q(z|x), latents of shape (B, d, 1, 1).
        kl_weight (`float`, *optional*, defaults to 1.0): beta, at least 0.

    Returns:
        [`ELBOOutput`]
    """
    error = (reconstruction.float() - sample).square().flatten(1).sum(1).mean()
    kl = posterior.kl().mean()
    return ELBOOutput(loss=error + kl_weight * kl, reconstruction=error.detach(), kl=kl.detach())


@torch.no_grad()
def error_gradient_norm(sample: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """
    Return the Euclidean norm of the gradient that one reconstruction receives from its squared error, averaged over the batch:
    2 mean |x - x^|, a 0-dimensional tensor.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`), reconstruction: Images in [-1, 1], and their reconstructions.
    """
    return 2 * (reconstruction.float() - sample).flatten(1).norm(dim=1).mean()


def kl_warmup(kl_weight: float, step: int, num_steps: int) -> float:
    """
    Return beta at a step: it rises linearly from `kl_weight` / `num_steps` at step 0 to `kl_weight`, against posterior collapse
    (Bowman et al. 2016, arXiv 1511.06349). If `num_steps` is 0, there is no warm-up.
    """
    return kl_weight * min(1.0, (step + 1) / max(num_steps, 1))


def active_units(posterior_mean: torch.Tensor) -> torch.Tensor:
    """
    Return the number of latent dimensions whose posterior mean, of shape `(B, d, 1, 1)` or `(B, d)`, has a variance above 0.01 over
    the data.
    """
    return (posterior_mean.float().flatten(1).var(0, correction=0) > ACTIVE_VARIANCE).sum()


@dataclass
class LikelihoodBounds(BaseOutput):
    """
    Output of `likelihood_bounds`: nats per image, shape (B,), float32.

    Args:
        importance_weighted (`torch.Tensor`): The importance-weighted bound on log p(x).
        elbo (`torch.Tensor`): The evidence lower bound, estimated from the same latents.
    """

    importance_weighted: torch.Tensor
    elbo: torch.Tensor


@torch.no_grad()
def likelihood_bounds(
    sample: torch.Tensor,
    posterior: DiagonalGaussianDistribution,
    decode: Callable[[torch.Tensor], torch.Tensor],
    num_samples: int = 500,
    variance: float = 0.5,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> LikelihoodBounds:
    """
    Return lower bounds on the log-density of images in [-1, 1] under p(x|z) = N(G(z), variance I), p(z) = N(0, I).

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
        posterior ([`DiagonalGaussianDistribution`]): q(z|x) of these images, latents (B, d, 1, 1).
        decode (`Callable`): The decoder G: latents (N, d, 1, 1) -> images (N, C, H, W).
        num_samples (`int`, *optional*, defaults to 500): Number K of latents per image, at least 1.
        variance (`float`, *optional*, defaults to 0.5): Variance per pixel. The training loss implies 1/2 at beta 1.
            Bounds at different variances can't be compared.
        generator (`torch.Generator`, *optional*): Draws the latents.
        batch_size (`int`, *optional*, defaults to 256): Number of latents decoded at a time.

    Returns:
        [`LikelihoodBounds`]

    Raises:
        ValueError: if `num_samples` or `batch_size` is below 1 or `variance` is not a finite number above 0.
    """
    if num_samples < 1 or batch_size < 1 or not 0 < variance < math.inf:
        allowed = "`num_samples` and `batch_size` must be at least 1, and `variance` finite and above 0"
        raise ValueError(f"{allowed}, but they are {num_samples}, {batch_size} and {variance}.")
    count, dimension = len(sample), sample[0].numel()
    mean, spread = posterior.mean.float(), posterior.std.float()
    # All at once: drawn in parts, the numbers would depend on `batch_size`.
    draws = randn_tensor((num_samples, *mean.shape), generator=generator, device=mean.device)
    parts = []
    for noise in draws.split(max(1, batch_size // count)):
        latents = mean + spread * noise
        images = decode(latents.flatten(0, 1).to(posterior.mean.dtype)).float().unflatten(0, (-1, count))
        error = (images - sample.float()).square().flatten(2).sum(2)
        log_likelihood = -0.5 * (error / variance + dimension * math.log(2 * math.pi * variance))
        # log p(z) - log q(z|x), where the 2 pi of both cancel.
        log_prior = -0.5 * (latents.square() - noise.square() - 2 * spread.log()).flatten(2).sum(2)
        parts.append(log_likelihood + log_prior)
    log_weights = torch.cat(parts)
    if log_weights.device.type != "mps":  # MPS has no float64
        log_weights = log_weights.double()
    return LikelihoodBounds(
        importance_weighted=(log_weights.logsumexp(0) - math.log(num_samples)).float(),
        elbo=log_weights.mean(0).float(),
    )
