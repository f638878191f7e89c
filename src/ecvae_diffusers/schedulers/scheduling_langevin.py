# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Unadjusted Langevin dynamics on an energy, conditioned on the initial sample, for images or latents.

.. math::
    x_{k+1} = x_k - a \nabla f(x_k) - c_k (x_k - x_0) + b \, n_k, \qquad n_k \sim \mathcal N(0, I), \quad
    c_k = a \, w \, (K - 1 - k) / K

with the drift step a (`drift_step_size`), the noise scale b (`noise_scale`), the conditioning weight w
(`conditioning_weight`) and K steps (`num_steps`). The temperature of the energy is part of a. With b = sqrt(2 a), the chain
samples from exp(-f), at temperature 1. Short calibration chains use far less noise and mostly follow the drift.

This file imports only torch and diffusers, so that it can be on the Hub next to its config.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


# Far above any practical use, so that a downloaded config can't exhaust the memory.
MAX_STEPS = 1_000_000


@dataclass
class LangevinSchedulerOutput(BaseOutput):
    """
    Output of [`LangevinScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`): The next sample of the chain, in the shape and dtype of the current one.
    """

    prev_sample: torch.Tensor


class LangevinScheduler(SchedulerMixin, ConfigMixin):
    """
    Langevin dynamics from a sample towards low energy, optionally conditioned on that sample.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. Check the superclass documentation for the generic
    methods the library implements for all schedulers such as loading and saving.

    Parameters:
        num_steps (`int`, *optional*, defaults to `5`):
            The length K of the chain, from 1 to 1,000,000.
        drift_step_size (`float`, *optional*, defaults to `0.2`):
            The step a on the energy's gradient, at least 0, in units of the sample squared over energy.
        noise_scale (`float`, *optional*, defaults to `1e-3`):
            The standard deviation b of the noise added at each step, at least 0, in units of the sample.
        conditioning_weight (`float`, *optional*, defaults to `0.0`):
            Strength w of the pull towards the initial sample, from 0 to 1 / a; it fades to 0 at the last step.

    Raises:
        ValueError: if an argument is outside the range given above.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_steps: int = 5,
        drift_step_size: float = 0.2,
        noise_scale: float = 1e-3,
        conditioning_weight: float = 0.0,
    ):
        for name in ("drift_step_size", "noise_scale", "conditioning_weight"):
            if not 0 <= self.config[name] < float("inf"):
                raise ValueError(f"`{name}` must be a finite number of at least 0, but is {self.config[name]}.")
        if (pull := drift_step_size * conditioning_weight) > 1:
            raise ValueError(f"`drift_step_size` times `conditioning_weight` must be at most 1, but is {pull}.")
        # Pipelines multiply the initial sample of any scheduler by this factor. A Langevin chain needs none.
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_steps)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None):
        """
        Set the length of the chain.

        Args:
            num_inference_steps (`int`, *optional*):
                Number K of steps, from 1 to 1,000,000. Defaults to `config.num_steps`.
            device (`str` or `torch.device`, *optional*): The device of `timesteps`.

        Raises:
            ValueError: if `num_inference_steps` is outside that range.
        """
        num_steps = self.config.num_steps if num_inference_steps is None else num_inference_steps
        if num_steps not in range(1, MAX_STEPS + 1):
            allowed = f"an integer from 1 to {MAX_STEPS}"
            raise ValueError(f"`num_steps` or `num_inference_steps` must be {allowed}, but is {num_steps!r}.")
        self.num_inference_steps = int(num_steps)
        self.timesteps = torch.arange(self.num_inference_steps, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample` unchanged: the energy model takes the chain's samples unscaled."""
        return sample

    def conditioning_coefficient(self, timestep: int) -> float:
        """Return the pull c_k = a w (K - 1 - k) / K of step k towards the initial sample."""
        remaining = (self.num_inference_steps - 1 - timestep) / self.num_inference_steps
        return self.config.drift_step_size * self.config.conditioning_weight * remaining

    def noise_variance(self) -> float:
        """
        Return the variance per entry that the noise alone adds to the end of the chain. It is K b^2 without conditioning; a pull c_k
        multiplies the variance so far by (1 - c_k)^2. Times the number of entries, it is the noise floor of the squared distance
        between the start and the end of a chain.
        """
        variance = 0.0
        for timestep in range(self.num_inference_steps):
            variance *= (1.0 - self.conditioning_coefficient(timestep)) ** 2
            variance += self.config.noise_scale**2
        return variance

    def step(
        self,
        energy_gradient: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        initial_sample: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        drift_scale: float | torch.Tensor = 1.0,
        return_dict: bool = True,
    ) -> LangevinSchedulerOutput | tuple[torch.Tensor]:
        """
        Take one step of the chain.

        Args:
            energy_gradient (`torch.Tensor`): The gradient of the raw energy f at `sample`, in its shape.
            timestep (`int`): The step k, from 0 to K - 1.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): The current sample x_k.
            initial_sample (`torch.Tensor`, *optional*):
                The start x_0 of the chain. Required if `conditioning_weight` is above 0.
            generator (`torch.Generator` or a list of one per sample, *optional*): Makes the noise deterministic.
            noise (`torch.Tensor`, *optional*): The standard normal draws n_k. Drawn from `generator` if not given.
            drift_scale (`float` or 0-dimensional `torch.Tensor`, *optional*, defaults to 1.0):
                Factor on the drift step, for callers that adapt it.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`LangevinSchedulerOutput`] instead of a plain tuple.

        Returns:
            [`LangevinSchedulerOutput`] or a tuple with the next sample.

        Raises:
            ValueError: if `timestep` is outside the chain, or `initial_sample` is required but missing.
        """
        timestep = int(timestep)
        if not 0 <= timestep < self.num_inference_steps:
            raise ValueError(f"`timestep` must be from 0 to {self.num_inference_steps - 1}, but is {timestep}.")
        prev_sample = sample - self.config.drift_step_size * drift_scale * energy_gradient.to(sample.dtype)
        if self.config.conditioning_weight > 0:
            if initial_sample is None:
                raise ValueError("`initial_sample` is required if `conditioning_weight` is above 0.")
            prev_sample = prev_sample - self.conditioning_coefficient(timestep) * (sample - initial_sample)
        if self.config.noise_scale > 0:
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample = prev_sample + self.config.noise_scale * noise.to(sample.dtype)

        if not return_dict:
            return (prev_sample,)
        return LangevinSchedulerOutput(prev_sample=prev_sample)

    def __len__(self) -> int:
        return self.num_inference_steps
