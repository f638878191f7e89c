"""Calibration of the encoder's samples in a step of training: the equations are in `ecvae_diffusers.posterior`."""

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
from ecvae_diffusers.training.config import VAEConfig
from ecvae_diffusers.training.randomness import StepNoise


# On latents in units of q(z|x)'s standard deviation. One small step gives the encoder the gradient of its bound with little noise;
# the further, larger ones lead to the posterior, which the decoder learns from.
NUM_STEPS, DRIFT_STEP, NUM_DECODER_STEPS, DECODER_DRIFT_STEP = 1, 0.01, 5, 0.1


@dataclass
class Refined:
    """A chain on the posteriors of b images and of as many generated ones behind them: B is 2b. Latents are (B, d, 1, 1)."""

    energy: PosteriorEnergy  # U of these images
    noise: torch.Tensor  # u_0
    ends: torch.Tensor  # the chain's ends, as whitened latents: the encoder's targets
    reference: torch.Tensor  # what its ends were if q was the posterior
    generated: torch.Tensor  # the generated images, (b, C, H, W)
    latents: torch.Tensor | None  # (b, d, 1, 1): those of data after further steps, if the decoder learns from them


class PosteriorCalibration:
    """Calibrates the posterior of `vae`, the autoencoder that is not wrapped."""

    def __init__(self, config: VAEConfig, vae: AutoencoderEC, dual_learning_rate: float):
        assert config.max_posterior_dual is not None  # as `resolved` gives it
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
        # The sum of the constraint over the batches of a step.
        self.constraint: torch.Tensor | float = 0.0
        self.num_batches = 0

    def chain(self, kl_weight: float) -> tuple[LangevinScheduler, float]:
        """The chain at a step's beta, and what it leaves of the constraint. The sharper the likelihood, the smaller a is."""
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
        Run the chain on images' posteriors, without gradients to a network: before the wrapped pass, in which the latents for the
        decoder are decoded.

        Args:
            real (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
            posterior_noise (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0, the draws that the wrapped pass samples with.
            noise ([`StepNoise`]): Draws the chain's noise.
            kl_weight (`float`): beta as the loss has it at this step, above 0: half of it is the likelihood's variance.
        """
        scheduler, self.remainder = self.chain(kl_weight)
        self.calibrator.scheduler = scheduler
        self.calibrator.tolerance = self.remainder
        variance, count, latents = kl_weight / 2, len(real), None
        with frozen(self.vae), accelerator.autocast():
            posterior, generated = self.posteriors(real, noise)
            shape = posterior_noise.shape
            # For data and generated images separately: each process takes its share of either.
            start = torch.cat([posterior_noise, noise.normal(*shape)])
            draws = [torch.cat([noise.normal(*shape), noise.normal(*shape)]) for _ in range(len(scheduler))]
            energy = PosteriorEnergy(self.decode, torch.cat([real, generated]), posterior, variance)
            ends = self.calibrator.run_chain(start, noise=draws, energy_model=energy)
            if self.config.posterior_decoder_weight:
                # Further steps, on the posteriors of data alone.
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
        """Return q(z|x) of images and, behind them, of as many generated ones; and these."""
        posterior = self.vae.encode(real).latent_dist
        own, prior = (noise.normal(*posterior.mean.shape) for _ in range(2))
        generated = generated_images(real, posterior, self.decode, own, prior)
        moments = [posterior.parameters, self.vae.encode(generated).latent_dist.parameters]
        return DiagonalGaussianDistribution(torch.cat(moments)), generated

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents).sample

    def constrain(self, output: AutoencoderECOutput, refined: Refined) -> CalibrationOutput:
        """The calibration of q(z|x) with gradients, that of generated images too, by the ends of its chain."""
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
        """The dual variable, one number for all processes, on the constraint of the whole step."""
        self.calibrator.dual_step(accelerator.reduce(self.constraint / self.num_batches, reduction="mean"))
        self.constraint, self.num_batches = 0.0, 0

    def state_dict(self) -> dict:
        return self.calibrator.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.calibrator.load_state_dict(state_dict)
        self.constraint, self.num_batches = 0.0, 0
