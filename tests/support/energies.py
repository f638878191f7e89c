# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energies with known gradients, and draws, that tests of the calibration share."""

import torch
import torch.nn as nn

from ecvae_diffusers import EnergyModel, LangevinScheduler


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def tiny_energy_model(**kwargs) -> EnergyModel:
    torch.manual_seed(0)
    return EnergyModel(**{"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 8), **kwargs})


class Quadratic(nn.Module):
    """f(x) = |x - m|^2 / 2, whose gradient is x - m."""

    def __init__(self, center: torch.Tensor):
        super().__init__()
        self.center = nn.Parameter(center)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return (sample - self.center).square().flatten(1).sum(1) / 2


class Linear(nn.Module):
    """f(x) = <g, x>, whose gradient is g everywhere."""

    def __init__(self, slope: torch.Tensor):
        super().__init__()
        self.slope = nn.Parameter(slope)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return (sample * self.slope).flatten(1).sum(1)


def drift_only(num_steps: int = 5, drift_step_size: float = 0.1) -> LangevinScheduler:
    return LangevinScheduler(num_steps=num_steps, drift_step_size=drift_step_size, noise_scale=0.0)
