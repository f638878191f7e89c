"""Calibration of the encoder's samples in a step of training: the equations are in `ecvae_diffusers.posterior`."""

import torch
from accelerate import Accelerator

from ecvae_diffusers import AutoencoderEC, EnergyCalibrator
from ecvae_diffusers.calibration import CalibrationOutput
from ecvae_diffusers.energy import frozen
from ecvae_diffusers.posterior import PosteriorEnergy, negative_log_posterior, posterior_chain, stationary_constraint
from ecvae_training.noise import ChainNoise, StepNoise


class PosteriorCalibration:
    """
    Args:
        args: The command line.
        vae ([`AutoencoderEC`]): Whose posterior it is; not wrapped.
    """

    def __init__(self, args, vae: AutoencoderEC):
        self.args, self.vae = args, vae
        scheduler = posterior_chain(
            args.posterior_langevin_steps, args.posterior_drift_step, args.posterior_conditioning_weight
        )
        tolerance = args.posterior_tolerance
        if tolerance == "auto":
            tolerance = stationary_constraint(scheduler, vae.config.latent_channels, args.posterior_constraint)
        self.calibrator = EnergyCalibrator(
            None,
            scheduler,
            tolerance=tolerance,
            initial_dual=args.initial_posterior_dual,
            dual_learning_rate=args.dual_learning_rate,
            max_dual=args.max_posterior_dual,
        )
        # The mean of the constraint over the batches of a step.
        self.constraint: torch.Tensor | None = None
        self.num_batches = 0

    def refine(
        self, real: torch.Tensor, posterior_noise: torch.Tensor, noise: StepNoise, accelerator: Accelerator
    ) -> tuple[PosteriorEnergy, torch.Tensor]:
        """
        Run the chain on images' posteriors, without gradients to a network: before the wrapped pass, which the ends may be
        decoded in.

        Args:
            real (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
            posterior_noise (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0, the draws that the wrapped pass samples with.
            noise ([`StepNoise`]): Draws the chain's noise.

        Returns:
            U, and the chain's ends as whitened latents.
        """
        with frozen(self.vae), accelerator.autocast():
            with torch.no_grad():
                posterior = self.vae.encode(real).latent_dist
            energy = PosteriorEnergy(
                lambda latents: self.vae.decode(latents).sample, real, posterior, self.args.kl_weight / 2
            )
            ends = self.calibrator.run_chain(
                posterior_noise, noise=ChainNoise(noise, posterior_noise), energy_model=energy
            )
        return energy, ends

    def constrain(
        self, posterior, posterior_noise: torch.Tensor, energy: PosteriorEnergy, ends: torch.Tensor
    ) -> CalibrationOutput:
        """The calibration of q(z|x) with gradients, by the ends of its chain."""
        samples = energy.whiten(posterior.mean.float() + posterior.std.float() * posterior_noise)
        distance = negative_log_posterior(posterior, energy) if self.args.posterior_constraint == "log_prob" else None
        calibration = self.calibrator.constrain(samples, ends, distance=distance)
        self.constraint = calibration.constraint + (0.0 if self.constraint is None else self.constraint)
        self.num_batches += 1
        return calibration

    def end_step(self, accelerator: Accelerator) -> None:
        """The dual variable, one number for all processes, on the constraint of the whole step."""
        self.calibrator.dual_step(accelerator.reduce(self.constraint / self.num_batches, reduction="mean"))
        self.constraint, self.num_batches = None, 0

    def state_dict(self) -> dict:
        return self.calibrator.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.calibrator.load_state_dict(state_dict)
        self.constraint, self.num_batches = None, 0
