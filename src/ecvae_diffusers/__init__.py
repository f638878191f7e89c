# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energy-calibrated VAEs for diffusers: one-step image generation, trained with an energy model that samples without it."""

from diffusers import ModelMixin, SchedulerMixin

from .calibration import CalibrationOutput, EnergyCalibrator, EnergyLossOutput
from .hub.registration import register
from .models import AutoencoderEC, AutoencoderECOutput, EnergyModel, EnergyModelOutput, FlowEC, FlowECOutput
from .pipelines import ECFlowPipeline, ECVAEPipeline, ECVAERestorationOutput, ECVAERestorationPipeline
from .schedulers import LangevinScheduler, LangevinSchedulerOutput


__version__ = "0.1.0"

__all__ = [
    "AutoencoderEC",
    "AutoencoderECOutput",
    "CalibrationOutput",
    "ECFlowPipeline",
    "ECVAEPipeline",
    "ECVAERestorationOutput",
    "ECVAERestorationPipeline",
    "EnergyCalibrator",
    "EnergyLossOutput",
    "EnergyModel",
    "EnergyModelOutput",
    "FlowEC",
    "FlowECOutput",
    "LangevinScheduler",
    "LangevinSchedulerOutput",
]

register(
    components=(AutoencoderEC, EnergyModel, FlowEC, LangevinScheduler),
    pipelines=(ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline),
)
