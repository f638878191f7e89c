# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains an energy-calibrated VAE on images: `accelerate launch training/train_ecvae.py --help`, or `ecvae train --help`."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.config import Group, TrainingConfig, default_channels, option, refuse
from ecvae_diffusers.training.run.command import place


# `--calibration` with an energy model, and with the posterior's.
ENERGY_CALIBRATIONS, POSTERIOR_CALIBRATIONS = ("energy", "both"), ("posterior", "both")
# lambda_z at --kl_weight 1: a step of 0.01 moves latents by a hundredth of what there is to move.
POSTERIOR_DUAL = 1000.0


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Group):
    """model and its loss"""

    calibration: Literal["none", "energy", "posterior", "both"] = option(
        "energy",
        help="Calibrate the decoder's samples by an energy model, the encoder's by the posterior, or both; 'none': a plain VAE.",
    )
    pretrained_model_name_or_path: str | None = option(
        help="Start from the weights and architecture of this pipeline or AutoencoderEC (folder or Hub id).",
        read=place,
    )
    freeze_decoder: bool = option(
        False,
        help="Train the encoder only: samples of --pretrained_model_name_or_path do not change, and its energy model is kept.",
    )
    latent_channels: int = option(128, help="Dimension of the latent vector.", at_least=1)
    block_out_channels: list[int] | None = option(
        help="Channels at each resolution, from --resolution down by halves. Default: 64 128 256 256 ..., down to 4 px."
    )
    layers_per_block: int = option(1, help="Residual blocks per resolution.", at_least=1)
    kl_weight: float = option(1.0, help="beta: weight of the KL divergence.", at_least=0)
    kl_warmup_steps: int = option(0, help="Steps over which beta rises from 0.", at_least=0)
    max_posterior_dual: float | None = option(
        help="lambda_z at the start, and its upper bound. Default: 1000 times --kl_weight.", above=0
    )
    posterior_decoder_weight: float | None = option(
        help="Weight of the squared error of images decoded from refined latents. Default: 0.1, or 0 with --freeze_decoder.",
        at_least=0,
    )

    def resolved(self, resolution: int) -> Self:
        """Return the group with the defaults that depend on other fields filled in."""
        beta = self.kl_weight if 0 < self.kl_weight < math.inf else 1.0
        dual, weight = self.max_posterior_dual, self.posterior_decoder_weight
        return replace(
            self,
            block_out_channels=self.block_out_channels or default_channels(resolution),
            max_posterior_dual=POSTERIOR_DUAL * beta if dual is None else dual,
            posterior_decoder_weight=weight if weight is not None else 0.0 if self.freeze_decoder else 0.1,
        )

    def check(self) -> None:
        super().check()
        if self.calibration in POSTERIOR_CALIBRATIONS and self.kl_weight == 0:
            refuse("kl_weight", 0, f"above 0 with --calibration {self.calibration}")
        if not self.freeze_decoder:
            return
        if self.pretrained_model_name_or_path is None:
            refuse("pretrained_model_name_or_path", None, "given with --freeze_decoder, also when a run is resumed")
        if self.calibration in ENERGY_CALIBRATIONS:
            refuse("calibration", self.calibration, "none or posterior with --freeze_decoder")
        if self.posterior_decoder_weight:
            refuse("posterior_decoder_weight", self.posterior_decoder_weight, "0 with --freeze_decoder")


@dataclass(frozen=True, kw_only=True)
class ECVAEConfig(TrainingConfig):
    """The configuration of `train_ecvae.py`."""

    model: VAEConfig = field(default_factory=VAEConfig)

    description: ClassVar[str] = (
        "Train an energy-calibrated VAE on images: "
        "accelerate launch training/train_ecvae.py --train_data_dir my_images --output_dir my_model --resolution 32"
    )

    def resolved(self) -> Self:
        return super(ECVAEConfig, replace(self, model=self.model.resolved(self.data.resolution))).resolved()

    def check(self) -> None:
        super().check()
        patience = self.evaluation.early_stopping_patience
        if self.model.freeze_decoder and patience is not None:
            refuse("early_stopping_patience", patience, "left out with --freeze_decoder: samples do not change")


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECVAEConfig:
    """Read and check a configuration, as `read_config` does."""
    return read_config(ECVAEConfig, argv, prog)


def run(config: ECVAEConfig) -> None:
    """Train as configured. Raises what `launch.train` raises."""
    from ecvae_diffusers.training.tasks.vae import train_vae

    train_vae(config)


def main(argv: list[str] | None = None, prog: str = "train_ecvae.py") -> None:
    """Train as the command line says."""
    config = parse_args(argv, prog)
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)
