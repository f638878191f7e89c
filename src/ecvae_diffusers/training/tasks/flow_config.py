# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The configuration of `train_flow.py`."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from ecvae_diffusers.command import place
from ecvae_diffusers.training.config import (
    SCHEDULES,
    OptimizerConfig,
    SpectralEnergyConfig,
    TrainingConfig,
    num_halvings,
)
from ecvae_diffusers.training.options import Group, option, refuse, with_default


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Group):
    """model and its loss"""

    calibration: Literal["none", "energy"] = option(
        "energy", help="Calibrate samples with an energy model ('energy'), or train on likelihood alone ('none')."
    )
    pretrained_model_name_or_path: str | None = option(
        help="Start from the weights and architecture of this pipeline or FlowEC (folder or Hub id).", read=place
    )
    num_levels: int | None = option(
        help="Number of scales of the flow. Each one halves the size. Default: 3, or fewer if --resolution can't be halved as often.",
        at_least=1,
    )
    steps_per_level: int = option(8, help="Number of flow steps per scale.", at_least=1)
    hidden_channels: int = option(128, help="Channels of the coupling networks.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class FlowOptimizerConfig(OptimizerConfig):
    """training"""

    # The likelihood's gradient is noisy, with rare, enormous values. Adam with momentum and clipping learns several times faster on it
    # than with the settings of a calibrated VAE (docs/guides/flows.md).
    learning_rate: float | None = option(
        help="Learning rate of the flow. Default: 3e-3 for a new flow, 5e-4 for a pretrained one.", above=0
    )
    lr_scheduler: SCHEDULES = with_default(OptimizerConfig, "lr_scheduler", "constant_with_warmup")
    adam_beta1: float = with_default(OptimizerConfig, "adam_beta1", 0.9)
    energy_learning_rate: float = with_default(OptimizerConfig, "energy_learning_rate", 5e-4)
    energy_adam_beta2: float = with_default(OptimizerConfig, "energy_adam_beta2", 0.9)
    adam_beta2: float = with_default(OptimizerConfig, "adam_beta2", 0.999)
    max_grad_norm: float | None = with_default(OptimizerConfig, "max_grad_norm", 100.0)


@dataclass(frozen=True, kw_only=True)
class ECFlowConfig(TrainingConfig):
    """The configuration of `train_flow.py`."""

    model: FlowConfig = field(default_factory=FlowConfig)
    energy: SpectralEnergyConfig = field(default_factory=SpectralEnergyConfig)
    optimizer: FlowOptimizerConfig = field(default_factory=FlowOptimizerConfig)

    description: ClassVar[str] = (
        "Train an energy-calibrated normalizing flow on images. First train on likelihood: ecvae train-flow my_images "
        "--calibration none --resolution 32 --output_dir plain_flow. Then calibrate: ecvae train-flow my_images "
        "--pretrained_model_name_or_path plain_flow --resolution 32 --output_dir my_flow"
    )

    def resolved(self) -> Self:
        config = super().resolved()
        if self.model.num_levels is None:
            num_levels = max(1, min(3, num_halvings(self.data.resolution)))
            config = replace(config, model=replace(config.model, num_levels=num_levels))
        if config.optimizer.learning_rate is not None:
            return config
        # A pretrained flow is calibrated from the first step. At the high rate it could learn patterns that the energy model does not
        # see yet.
        rate = 3e-3 if self.model.pretrained_model_name_or_path is None else 5e-4
        return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))

    def check(self) -> None:
        super().check()
        if (self.model.num_levels or 1) > (most := num_halvings(self.data.resolution)):
            refuse("num_levels", self.model.num_levels, f"at most {most} at --resolution {self.data.resolution}")
