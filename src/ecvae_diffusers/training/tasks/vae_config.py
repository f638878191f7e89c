# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The configuration of `train_ecvae.py`."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from ecvae_diffusers.command import place
from ecvae_diffusers.training.config import (
    ENERGY_CALIBRATIONS,
    POSTERIOR_CALIBRATIONS,
    DataConfig,
    TrainingConfig,
    default_channels,
)
from ecvae_diffusers.training.options import ConfigError, Group, option, refuse


# Default of --max_posterior_dual at --kl_weight 1. It is large because the chain's one step moves latents only a hundredth of the way.
POSTERIOR_DUAL = 1000.0


@dataclass(frozen=True, kw_only=True)
class ClassDataConfig(DataConfig):
    """data"""

    class_conditional: bool = option(
        False,
        help="Train a class-conditional model. Classes are the sub-folders of --train_data_dir or a column of --dataset_name.",
    )
    class_column: str | None = option(
        help="Column of the classes for --class_conditional. Default: the only column of class labels."
    )

    def check(self) -> None:
        super().check()
        if self.class_column is not None and not (self.class_conditional and self.dataset_name is not None):
            refuse("class_column", self.class_column, "given only with --class_conditional and --dataset_name")
        if self.class_conditional and self.streaming:
            raise ConfigError(
                "--streaming can't be used with --class_conditional: the classes must be known before training."
            )


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Group):
    """model and its loss"""

    calibration: Literal["none", "energy", "posterior", "both"] = option(
        "energy",
        help="Calibrate the decoder's samples with an energy model ('energy'), the encoder's samples with the posterior ('posterior'), "
        "both, or neither ('none', a plain VAE).",
    )
    pretrained_model_name_or_path: str | None = option(
        help="Start from the weights and architecture of this pipeline or AutoencoderEC (folder or Hub id). For another --resolution, blocks "
        "are added or dropped at the fine end.",
        read=place,
    )
    freeze_decoder: bool = option(
        False,
        help="Train only the encoder. Samples of --pretrained_model_name_or_path do not change, and its energy model is kept.",
    )
    latent_channels: int = option(128, help="Dimension of the latent vector.", at_least=1)
    block_out_channels: list[int] | None = option(
        help="Channels at each resolution, from --resolution down by halves. Default: 64 128 256 256 ..., as often as both sides halve evenly, "
        "down to 4 px."
    )
    layers_per_block: int = option(1, help="Residual blocks per resolution.", at_least=1)
    patch_size: Literal[1, 2, 4] = option(
        1,
        help="Side, in pixels, of the patches that the networks see as one pixel with more channels. 2 saves most of the training time "
        "on large images.",
    )
    kl_weight: float = option(1.0, help="Weight of the KL divergence (beta).", at_least=0)
    kl_warmup_steps: int = option(0, help="Number of steps over which the KL weight rises from 0.", at_least=0)
    max_posterior_dual: float | None = option(
        help="Initial value and upper bound of the posterior's dual variable. Default: 1000 times --kl_weight.",
        above=0,
    )
    posterior_decoder_weight: float | None = option(
        help="Weight of the squared error of images decoded from latents that a chain on the posterior refined. Default: 0.1, or 0 with "
        "--freeze_decoder.",
        at_least=0,
    )

    def resolved(self, resolution: int | list[int]) -> Self:
        """Return the group with the defaults that depend on other fields filled in."""
        beta = self.kl_weight if 0 < self.kl_weight < math.inf else 1.0
        dual, weight = self.max_posterior_dual, self.posterior_decoder_weight
        return replace(
            self,
            block_out_channels=self.block_out_channels or default_channels(resolution, self.patch_size),
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
            raise ConfigError("--freeze_decoder requires --pretrained_model_name_or_path, also when a run is resumed.")
        if self.calibration in ENERGY_CALIBRATIONS:
            refuse("calibration", self.calibration, "none or posterior with --freeze_decoder")
        if self.posterior_decoder_weight:
            refuse("posterior_decoder_weight", self.posterior_decoder_weight, "0 with --freeze_decoder")


@dataclass(frozen=True, kw_only=True)
class ECVAEConfig(TrainingConfig):
    """The configuration of `train_ecvae.py`."""

    data: ClassDataConfig = field(default_factory=ClassDataConfig)
    model: VAEConfig = field(default_factory=VAEConfig)

    description: ClassVar[str] = "Train an energy-calibrated VAE on images."

    def resolved(self) -> Self:
        return super(ECVAEConfig, replace(self, model=self.model.resolved(self.data.resolution))).resolved()

    def check(self) -> None:
        super().check()
        if self.data.class_conditional and self.model.calibration in POSTERIOR_CALIBRATIONS:
            refuse("calibration", self.model.calibration, "none or energy with --class_conditional")
        patience = self.evaluation.early_stopping_patience
        if self.model.freeze_decoder and patience is not None:
            raise ConfigError(
                f"--early_stopping_patience {patience} can't be used with --freeze_decoder: samples do not change."
            )
