"""Calibration of the encoder's samples during training. The equations are in `ecvae_diffusers.posterior`."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.calibration import CalibrationOutput
from ecvae_diffusers.energy import frozen
from ecvae_diffusers.models.autoencoder_ec import AutoencoderECOutput
from ecvae_diffusers.posterior import (
    PosteriorEnergy,
    coupled_ends,
    generated_images,
    negative_log_posterior,
    posterior_chain,
    stationary_constraint,
)
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.tasks.vae_config import VAEConfig


# Chains on latents in units of the standard deviation of q(z|x). For the encoder, one small step gives the gradient of its bound with
# little noise. For the decoder, further and larger steps lead to the posterior.
NUM_STEPS, DRIFT_STEP, NUM_DECODER_STEPS, DECODER_DRIFT_STEP = 1, 0.01, 5, 0.1


@dataclass
class Refined:
    """
    A chain on the posteriors of b data images, followed by b generated images. Whitened latents have the shape (2b, d, 1, 1).
    """

    energy: PosteriorEnergy  # U of the images
    noise: torch.Tensor  # u_0, the start of the chain
    ends: torch.Tensor  # ends of the chain, which are the encoder's targets
    reference: torch.Tensor  # ends that the chain would have if q was the posterior
    generated: torch.Tensor  # the generated images, (b, C, H, W)
    latents: (
        torch.Tensor | None
    )  # (b, d, 1, 1): latents of the data after further steps, if the decoder learns from them


class PosteriorCalibration:
    """
    Calibration of the encoder's samples.

    Args:
        config ([`VAEConfig`]): The resolved configuration of the model.
        vae ([`AutoencoderEC`]): The autoencoder, without Accelerate's wrapper.
        dual_learning_rate (`float`): Learning rate of the posterior's dual variable.
    """

    def __init__(self, config: VAEConfig, vae: AutoencoderEC, dual_learning_rate: float):
        assert config.max_posterior_dual is not None  # set by `resolved`
        self.config, self.vae = config, vae
        scheduler, self.remainder = self.chain(config.kl_weight)
        self.calibrator = EnergyCalibrator(
            None,
            scheduler,
            tolerance=self.remainder,
            initial_dual=config.max_posterior_dual,
            dual_learning_rate=dual_learning_rate,
            max_dual=config.max_posterior_dual,
        )
        # Sum of the constraint over the batches of a step.
        self.constraint: torch.Tensor | float = 0.0
        self.num_batches = 0

    def chain(self, kl_weight: float) -> tuple[LangevinScheduler, float]:
        """
        Return the chain for a KL weight, and the constraint that it leaves if q is the posterior. A sharper likelihood needs a smaller
        drift step.
        """
        scheduler = posterior_chain(NUM_STEPS, DRIFT_STEP * (kl_weight / self.config.kl_weight))
        return scheduler, stationary_constraint(scheduler, self.vae.config.latent_channels)

    def refine(
        self,
        real: torch.Tensor,
        posterior_noise: torch.Tensor,
        noise: StepNoise,
        kl_weight: float,
        accelerator: Accelerator,
    ) -> Refined:
        """
        Run the chain on the posteriors of images, without gradients to the networks. Called before the forward pass of the wrapped
        autoencoder, which decodes the latents for the decoder.

        Args:
            real (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
            posterior_noise (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0, the noise with which the forward pass samples q(z|x).
            noise ([`StepNoise`]): The source of the chain's noise.
            kl_weight (`float`): beta > 0 at this step. Half of it is the variance of the likelihood.
            accelerator ([`Accelerator`]): Gives the precision of the chain.
        """
        scheduler, self.remainder = self.chain(kl_weight)
        self.calibrator.scheduler = scheduler
        self.calibrator.tolerance = self.remainder
        variance, count, latents = kl_weight / 2, len(real), None
        with frozen(self.vae), accelerator.autocast():
            posterior, generated = self.posteriors(real, noise)
            shape = posterior_noise.shape
            # Separate draws for data and generated images, because each process takes its share of both.
            start = torch.cat([posterior_noise, noise.normal(*shape)])
            draws = [torch.cat([noise.normal(*shape), noise.normal(*shape)]) for _ in range(len(scheduler))]
            energy = PosteriorEnergy(self.decode, torch.cat([real, generated]), posterior, variance)
            ends = self.calibrator.run_chain(start, noise=draws, energy_model=energy)
            if self.config.posterior_decoder_weight:
                # Further steps, only on the posteriors of data.
                of_data = DiagonalGaussianDistribution(posterior.parameters[:count])
                energy_of_data = PosteriorEnergy(self.decode, real, of_data, variance)
                chain = posterior_chain(NUM_DECODER_STEPS, DECODER_DRIFT_STEP * (kl_weight / self.config.kl_weight))
                further = [noise.normal(*shape) for _ in range(len(chain))]
                calibrator = EnergyCalibrator(None, chain)
                refined = calibrator.run_chain(ends[:count], noise=further, energy_model=energy_of_data)
                latents = energy_of_data.unwhiten(refined)
        return Refined(energy, start, ends, coupled_ends(scheduler, start, draws), generated, latents)

    @torch.no_grad()
    def posteriors(self, real: torch.Tensor, noise: StepNoise) -> tuple[DiagonalGaussianDistribution, torch.Tensor]:
        """Return q(z|x) of images, followed by that of as many generated images, and the generated images."""
        posterior = self.vae.encode(real).latent_dist
        own, prior = (noise.normal(*posterior.mean.shape) for _ in range(2))
        generated = generated_images(real, posterior, self.decode, own, prior)
        moments = [posterior.parameters, self.vae.encode(generated).latent_dist.parameters]
        return DiagonalGaussianDistribution(torch.cat(moments)), generated

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents).sample

    def constrain(self, output: AutoencoderECOutput, refined: Refined) -> CalibrationOutput:
        """Return the constraint on q(z|x), with gradients, from the ends of the chain."""
        energy = refined.energy
        both = [one.parameters for one in (output.latent_dist, output.extra_latent_dist) if one is not None]
        posterior = DiagonalGaussianDistribution(torch.cat(both))
        samples = energy.whiten(posterior.mean.float() + posterior.std.float() * refined.noise)
        distance = negative_log_posterior(posterior, energy, refined.reference, self.remainder)
        calibration = self.calibrator.constrain(samples, refined.ends, distance=distance)
        self.constraint = calibration.constraint + self.constraint
        self.num_batches += 1
        return calibration

    def end_step(self, accelerator: Accelerator) -> None:
        """Step the dual variable, which is the same in all processes, on the mean constraint of the whole step."""
        self.calibrator.dual_step(accelerator.reduce(self.constraint / self.num_batches, reduction="mean"))
        self.constraint, self.num_batches = 0.0, 0

    def state_dict(self) -> dict:
        return self.calibrator.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.calibrator.load_state_dict(state_dict)
        self.constraint, self.num_batches = 0.0, 0
