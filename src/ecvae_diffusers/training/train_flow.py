# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains an energy-calibrated normalizing flow: `accelerate launch training/train_flow.py --help`, or `ecvae train-flow --help`.

Likelihood is learned first, with `--calibration none`; a second run from there (`--pretrained_model_name_or_path`) calibrates: see
docs/flows.md.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.config import (
    SCHEDULES,
    Group,
    OptimizerConfig,
    SpectralEnergyConfig,
    TrainingConfig,
    option,
    refuse,
    with_default,
)
from ecvae_diffusers.training.run.command import place


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Group):
    """model and its loss"""

    calibration: Literal["none", "energy"] = option("energy", help="'none': only likelihood, to calibrate later.")
    pretrained_model_name_or_path: str | None = option(
        help="Start from the weights and architecture of this pipeline or FlowEC (folder or Hub id).", read=place
    )
    num_levels: int = option(3, help="Scales of the flow, each of half the size.", at_least=1)
    steps_per_level: int = option(8, help="Steps of the flow per scale.", at_least=1)
    hidden_channels: int = option(128, help="Channels of the couplings' networks.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class FlowOptimizerConfig(OptimizerConfig):
    """training"""

    # Likelihood has a noisy gradient with rare, enormous values: an Adam that averages and clips learns several times faster than
    # the one that suits a critic's opponent (docs/flows.md).
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
        "Train an energy-calibrated normalizing flow on images. On likelihood first: accelerate launch training/train_flow.py "
        "--calibration none --train_data_dir my_images --output_dir plain_flow --resolution 32; then calibrated: accelerate launch "
        "training/train_flow.py --pretrained_model_name_or_path plain_flow --train_data_dir my_images --output_dir my_flow "
        "--resolution 32"
    )

    def resolved(self) -> Self:
        config = super().resolved()
        if config.optimizer.learning_rate is not None:
            return config
        # Calibrated at the high rate from its first step, a flow may find patterns that the energy model does not see yet.
        rate = 3e-3 if self.model.pretrained_model_name_or_path is None else 5e-4
        return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))

    def check(self) -> None:
        super().check()
        if self.model.num_levels > (most := int(math.log2(self.data.resolution))):
            refuse("num_levels", self.model.num_levels, f"at most {most} at --resolution {self.data.resolution}")


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECFlowConfig:
    """Read and check a configuration, as `read_config` does."""
    return read_config(ECFlowConfig, argv, prog)


def run(config: ECFlowConfig) -> None:
    """Train as configured. Raises what `launch.train` raises."""
    from ecvae_diffusers.training.tasks.flow import train_flow

    train_flow(config)


def main(argv: list[str] | None = None, prog: str = "train_flow.py") -> None:
    """Train as the command line says."""
    config = parse_args(argv, prog)
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)
