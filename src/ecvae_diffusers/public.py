# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The public names, registered with diffusers. `ecvae_diffusers` imports this module when one of them is first used."""

from diffusers import ModelMixin, SchedulerMixin

from .calibration import CalibrationOutput, EnergyCalibrator, EnergyLossOutput
from .hub.registration import register
from .models import AutoencoderEC, AutoencoderECOutput, EnergyModel, EnergyModelOutput, FlowEC, FlowECOutput
from .pipelines import (
    AnomalyOutput,
    DirectionOutput,
    ECFlowPipeline,
    ECVAEAutoBlocks,
    ECVAEBlocks,
    ECVAEPipeline,
    ECVAERestorationBlocks,
    ECVAERestorationOutput,
    ECVAERestorationPipeline,
)
from .schedulers import LangevinScheduler, LangevinSchedulerOutput


register(
    components=(AutoencoderEC, EnergyModel, FlowEC, LangevinScheduler),
    pipelines=(ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline),
)
