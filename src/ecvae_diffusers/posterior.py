# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Calibration of an amortised posterior: a chain on the true posterior corrects the encoder's samples.

The posterior of a decoder G with a Gaussian likelihood of variance s^2 per pixel and a standard normal prior is
proportional to exp(-U), with

.. math:: U(z) = \frac{\| x - G(z) \|^2}{2 s^2} + \frac{\| z \|^2}{2}

A loss of the summed squared error plus beta times the KL divergence implies s^2 = beta / 2. A chain on U that starts at a sample of
q(z|x) moves towards the posterior. The encoder learns from the ends of these chains, as a generator learns from the ends of its chains,
so [`EnergyCalibrator`] serves both.

The chain runs on whitened latents u = (z - m) / sigma, with the frozen mean m and standard deviation sigma of q(z|x). In these units
q is always standard normal, so one drift step a suits every dimension, whether or not the image determines it. With noise of scale
sqrt(2 a), the chain is unadjusted Langevin dynamics preconditioned by sigma^2. Its stationary distribution is the posterior up to
terms of order a.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from .energy import energy_and_gradient, frozen, out_of_inference_mode
from .schedulers.scheduling_langevin import LangevinScheduler
from .variational import LikelihoodBounds, likelihood_bounds


# Drift step a on whitened latents. On a standard normal posterior, a step of 1 would reach the mode at once.
DRIFT_STEP = 0.1
# Learning rate of Adam, for the mean (in standard deviations) and the log-variance.
LEARNING_RATE = 0.1


class PosteriorEnergy:
    """
    The energy U of a batch of images, as a function of whitened latents, for `EnergyCalibrator.calibrate(..., energy_model=)`.

    Args:
        decode (`Callable`): The decoder G: latents (B, d, 1, 1) -> images (B, C, H, W).
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        posterior (`DiagonalGaussianDistribution`): q(z|x), whose mean and standard deviation are frozen.
        variance (`float`): s^2 > 0, per pixel.

    Raises:
        ValueError: if `variance` is not above 0.
    """

    def __init__(
        self, decode: Callable, images: torch.Tensor, posterior: DiagonalGaussianDistribution, variance: float
    ):
        if not 0 < variance < math.inf:
            raise ValueError(f"`variance` must be a finite number above 0, but is {variance}.")
        self.decode, self.variance, self.images = decode, variance, out_of_inference_mode(images)
        moments = (posterior.mean, posterior.std)
        self.mean, self.std = (out_of_inference_mode(moment.detach().float()) for moment in moments)

    def whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """Return u = (z - m) / sigma, with gradients to z alone."""
        return (latents - self.mean) / self.std

    def unwhiten(self, whitened: torch.Tensor) -> torch.Tensor:
        """Return z = m + sigma u."""
        return self.mean + self.std * whitened

    def __call__(self, whitened: torch.Tensor) -> torch.Tensor:
        """Return U(m + sigma u), shape (B,)."""
        latents = self.unwhiten(whitened)
        error = (self.decode(latents).float() - self.images.float()).square().flatten(1).sum(1)
        return error / (2 * self.variance) + latents.square().flatten(1).sum(1) / 2


def posterior_chain(num_steps: int, drift_step_size: float = DRIFT_STEP) -> LangevinScheduler:
    """
    Return the scheduler of a chain of K steps on whitened latents, with noise of scale sqrt(2 a). The chain leaves the posterior
    unchanged up to terms of order a. It is stable if a is below 2 / (largest curvature of U in u), a curvature that is 1 if q is
    the posterior.
    """
    noise_scale = math.sqrt(2 * drift_step_size)
    return LangevinScheduler(num_steps=num_steps, drift_step_size=drift_step_size, noise_scale=noise_scale)


def refine(
    energy: PosteriorEnergy,
    whitened: torch.Tensor,
    steps: Iterable,
    noise: bool,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Return the end of `posterior_chain` from whitened latents or, without noise, the end of gradient descent on U. The steps are
    written out, because a pipeline on the Hub has only the scheduler that it was saved with.

    The step size suits a q near the posterior. For an image unlike the data, q may be far too wide and a step may lead uphill.
    Descent rejects such a step and halves the later steps of that image, so U never rises.

    Args:
        energy ([`PosteriorEnergy`]): U, of a frozen decoder.
        whitened (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0, float32.
        steps (`Iterable`): One item per step, a progress bar for example.
        noise (`bool`): Whether to add noise.
        generator (`torch.Generator` or a list of one per image, *optional*): Draws the noise.
    """
    if noise:
        for _ in steps:
            whitened = whitened - DRIFT_STEP * energy_and_gradient(energy, whitened)[1]
            normal = randn_tensor(whitened.shape, generator=generator, device=whitened.device, dtype=whitened.dtype)
            whitened = whitened + math.sqrt(2 * DRIFT_STEP) * normal
        return whitened
    value, gradient = energy_and_gradient(energy, whitened)
    step = torch.full_like(whitened[:, :1], DRIFT_STEP)
    for _ in steps:
        proposal = whitened - step * gradient
        new_value, new_gradient = energy_and_gradient(energy, proposal)
        lower = new_value < value  # False also if U has become NaN
        value = torch.where(lower, new_value, value)
        lower = lower.view(step.shape)
        whitened, gradient = torch.where(lower, proposal, whitened), torch.where(lower, new_gradient, gradient)
        step = torch.where(lower, step, step / 2)
    return whitened


def stationary_constraint(scheduler: LangevinScheduler, num_latents: int) -> float:
    """
    Return the mean constraint of a `posterior_chain` if q is already the posterior. Then U(u) = |u|^2 / 2, the chain's end has
    variance (1 - a)^2K + 2 a (1 + (1 - a)^2 + ...) per latent, and the mean of -log q minus the entropy of q is
    d / 2 (1 - (1 - a)^2K) a / (2 - a).

    Args:
        scheduler ([`LangevinScheduler`]): The chain.
        num_latents (`int`): d, the dimension of the latent vector.
    """
    a = scheduler.config.drift_step_size
    return num_latents / 2 * (1 - (1 - a) ** (2 * len(scheduler))) * a / (2 - a)


def coupled_ends(scheduler: LangevinScheduler, whitened: torch.Tensor, noise: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return where the chain would end, from the same start and with the same noise, if q were the posterior: a chain on the energy
    |u|^2 / 2, whose gradient is u.

    Args:
        scheduler ([`LangevinScheduler`]): The chain.
        whitened (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0.
        noise (sequence of one `torch.Tensor` of that shape per step): The chain's standard normal draws.
    """
    ends = whitened
    for timestep in range(len(scheduler)):
        ends = scheduler.step(ends, timestep, ends, noise=noise[timestep], return_dict=False)[0]
    return ends


def negative_log_posterior(
    posterior: DiagonalGaussianDistribution,
    energy: PosteriorEnergy,
    reference: torch.Tensor | None = None,
    remainder: float = 0.0,
) -> Callable:
    r"""
    Return a distance for `EnergyCalibrator.calibrate(..., distance=)`: how much less likely under q the chain's ends are than its
    starts,

    .. math:: \log q(\operatorname{sg}[z_0] | x) - \log q(\operatorname{sg}[\tilde z] | x), \qquad z_0 \sim q,

    in nats per image. Its expected gradient is that of -log q(z~|x), since the score of q has mean 0 over samples of q.

    The chain's noise moves its ends far more than the posterior does, and would dominate the gradient. With `reference`, z_0 is
    therefore replaced by `coupled_ends`: where the same chain would end if q were the posterior. This shifts the mean by a known
    amount, which `remainder` adds back, so that value and gradient keep their means up to the chain's own error of order a. If q is
    the posterior, both ends are equal and the gradient has no variance, as in Roeder et al. 2017 (arXiv 1703.09194) for K = 1.

    For short chains of small steps, the mean gradient is 0 where E_q grad U = 0 and E_q u grad U = 1, which is where q has the
    highest evidence lower bound. The longer the chain, the more q covers the posterior. Unlike the squared distance between start
    and end, this distance widens q if the ends are more spread out.

    Args:
        posterior (`DiagonalGaussianDistribution`): q(z|x), with gradients.
        energy ([`PosteriorEnergy`]): The energy U with the same q, without gradients.
        reference (`torch.Tensor` of shape `(B, d, 1, 1)`, *optional*): `coupled_ends` of the chain. Defaults to
            the samples.
        remainder (`float`, *optional*, defaults to 0.0): `stationary_constraint` of that chain.
    """

    def distance(samples: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        def squared(whitened: torch.Tensor) -> torch.Tensor:
            return ((energy.unwhiten(whitened.detach()) - posterior.mean) / posterior.std).square()

        # log sigma is in both terms and cancels.
        compared = samples if reference is None else reference
        return remainder + 0.5 * (squared(targets) - squared(compared)).flatten(1).sum(1)

    return distance


@torch.no_grad()
def generated_images(
    images: torch.Tensor,
    posterior: DiagonalGaussianDistribution,
    decode: Callable,
    noise: torch.Tensor,
    prior: torch.Tensor,
) -> torch.Tensor:
    """
    Generate images with the residuals of real ones: x' = G(z') + x - G(z), with z' ~ N(0, I) and z ~ q(z|x). If q is the posterior
    and the model is right, x - G(z) is the noise of the likelihood, and x' is a draw from the model.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        posterior (`DiagonalGaussianDistribution`): q(z|x), latents (B, d, 1, 1).
        decode (`Callable`): The decoder G: latents (B, d, 1, 1) -> images.
        noise (`torch.Tensor` of shape `(B, d, 1, 1)`): The standard normal draws of z.
        prior (`torch.Tensor` of shape `(B, d, 1, 1)`): z'.

    Returns:
        `torch.Tensor` of the shape of `images`, clipped to [-1, 1], no gradient.
    """
    decoded = decode(torch.cat([posterior.mean + posterior.std * noise, prior.to(posterior.mean)])).to(images.dtype)
    own, generated = decoded.chunk(2)
    return (generated + images - own).clamp(-1, 1)


@torch.enable_grad()
def optimized_posterior(
    images: torch.Tensor,
    posterior: DiagonalGaussianDistribution,
    decode: Callable[[torch.Tensor], torch.Tensor],
    variance: float = 0.5,
    num_steps: int = 200,
    generator: torch.Generator | None = None,
) -> DiagonalGaussianDistribution:
    """
    Optimise the mean and variance of q for the evidence lower bound of each image, starting at the encoder's, by Adam with a rate
    that falls to 0. The gain of the bound is the amortisation gap (Cremer et al. 2018, arXiv 1801.03558).

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].
        posterior ([`DiagonalGaussianDistribution`]): q(z|x) of the encoder, latents (B, d, 1, 1).
        decode (`Callable`): The decoder G of a frozen module: latents (B, d, 1, 1) -> images.
        variance (`float`, *optional*, defaults to 0.5): s^2, per pixel.
        num_steps (`int`, *optional*, defaults to 200): Number of Adam steps, at least 1.
        generator (`torch.Generator`, *optional*): Draws one latent per image and step.
    """
    energy = PosteriorEnergy(decode, images, posterior, variance)
    moved, widened = (torch.zeros_like(energy.mean, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([moved, widened], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, num_steps)
    for _ in range(num_steps):
        noise = randn_tensor(moved.shape, generator=generator, device=moved.device, dtype=moved.dtype)
        # The negative bound: E_q U minus the entropy of q.
        bound = energy(moved + (widened / 2).exp() * noise).sum() - widened.sum() / 2
        moved.grad, widened.grad = torch.autograd.grad(bound, [moved, widened])
        optimizer.step()
        schedule.step()
    mean = energy.unwhiten(moved.detach())
    log_variance = 2 * energy.std.log() + widened.detach()
    return DiagonalGaussianDistribution(torch.cat([mean, log_variance], dim=1))


@dataclass
class PosteriorBounds(LikelihoodBounds):
    """
    Output of `posterior_bounds`: nats per image, shape (B,), float32.

    Args:
        importance_weighted, elbo (`torch.Tensor`): As in [`~variational.LikelihoodBounds`].
        amortisation_gap (`torch.Tensor`): How much `elbo` rises when the posterior of each image is optimised.
    """

    amortisation_gap: torch.Tensor


def posterior_bounds(
    images: torch.Tensor,
    vae: ModelMixin,
    num_samples: int = 500,
    num_steps: int = 200,
    variance: float = 0.5,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> PosteriorBounds:
    """
    Bound the likelihood of images from below, and measure the amortisation gap of the encoder.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].
        vae ([`AutoencoderEC`]): The autoencoder, frozen during the call.
        num_samples, variance, batch_size: As for [`~variational.likelihood_bounds`], whose errors are raised.
        num_steps (`int`, *optional*, defaults to 200): As for `optimized_posterior`.
        generator (`torch.Generator`, *optional*): Draws the latents. Seeded with 0 if not given, unlike in `likelihood_bounds`.

    Returns:
        [`PosteriorBounds`]
    """
    generator = torch.Generator(images.device).manual_seed(0) if generator is None else generator

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents).sample

    with frozen(vae):
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
        state = generator.get_state()
        bounds = likelihood_bounds(images, posterior, decode, num_samples, variance, generator, batch_size)
        best = optimized_posterior(images, posterior, decode, variance, num_steps, generator=generator)
        generator.set_state(state)  # the same draws for both bounds, so that noise favours neither
        best_bounds = likelihood_bounds(images, best, decode, num_samples, variance, generator, batch_size)
    return PosteriorBounds(**bounds, amortisation_gap=best_bounds.elbo - bounds.elbo)
