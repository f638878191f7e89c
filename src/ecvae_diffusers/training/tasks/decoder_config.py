# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The configuration of `calibrate_decoder.py`."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from ecvae_diffusers.command import place
from ecvae_diffusers.training.config import OptimizerConfig, SpectralEnergyConfig, TrainingConfig
from ecvae_diffusers.training.options import ConfigError, Group, option, refuse, with_default


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Group):
    """model and its loss"""

    calibration: Literal["none", "energy"] = option(
        "energy", help="Calibrate with an energy model ('energy'), or train on the squared error alone ('none')."
    )
    pretrained_model_name_or_path: str | None = option(
        help="Autoencoder to calibrate: AutoencoderKL, AutoencoderTiny, VQModel or another one of diffusers (folder or Hub id). If a run "
        "saved an energy model with it, its training continues.",
        read=place,
    )
    subfolder: str | None = option(help="Subfolder of the autoencoder, such as vae in a pipeline.")
    revision: str | None = option(help="Branch, tag or commit of the Hub id.")
    variant: str | None = option(help="Variant of the weights, such as fp16. Training and saving use float32.")
    reconstruction_weight: float = option(
        1.0,
        help="Weight of the squared error. A larger weight keeps PSNR, a smaller one strengthens calibration.",
        at_least=0,
    )
    latent_noise: float = option(
        0.0,
        help="Noise added to the encodings whose decodings are calibrated, in standard deviations of the latents.",
        at_least=0,
    )
    latents_file: str | None = option(
        help="Calibrate decodings of the latents in this safetensors file: a tensor `latents` (N, C, h, w).",
        read=place,
    )
    decoder_config: str | None = option(
        help="Train a new decoder for the same latents: the config.json of an autoencoder of diffusers, such as a small AutoencoderTiny.",
        read=place,
    )
    distillation_weight: float = option(
        1.0, help="With --decoder_config: weight of the squared error to decodings of the old decoder.", at_least=0
    )

    def check(self) -> None:
        super().check()
        if self.pretrained_model_name_or_path is None:
            raise ConfigError("--pretrained_model_name_or_path must be given: the autoencoder to calibrate.")
        if self.reconstruction_weight == 0 and self.calibration == "none":
            refuse("reconstruction_weight", 0, "above 0 with --calibration none")
        if self.latents_file is not None and self.latent_noise > 0:
            refuse("latent_noise", self.latent_noise, "0 with --latents_file")
        if self.decoder_config is None and self.distillation_weight != 1:
            raise ConfigError(f"--distillation_weight {self.distillation_weight} requires --decoder_config.")


@dataclass(frozen=True, kw_only=True)
class DecoderOptimizerConfig(OptimizerConfig):
    """training"""

    learning_rate: float | None = option(
        help="Learning rate of the decoder. Default: 1e-4, or 1e-3 for a new decoder (--decoder_config).", above=0
    )
    energy_learning_rate: float = with_default(OptimizerConfig, "energy_learning_rate", 5e-4)
    adam_beta2: float = with_default(OptimizerConfig, "adam_beta2", 0.9)
    energy_adam_beta2: float = with_default(OptimizerConfig, "energy_adam_beta2", 0.9)


@dataclass(frozen=True, kw_only=True)
class ECDecoderConfig(TrainingConfig):
    """The configuration of `calibrate_decoder.py`."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    energy: SpectralEnergyConfig = field(default_factory=SpectralEnergyConfig)
    optimizer: DecoderOptimizerConfig = field(default_factory=DecoderOptimizerConfig)

    description: ClassVar[str] = "Calibrate the decoder of an autoencoder of diffusers on images."
    channels_of_model: ClassVar[bool] = True

    def resolved(self) -> Self:
        config = super().resolved()
        if config.optimizer.learning_rate is not None:
            return config
        rate = 1e-4 if self.model.decoder_config is None else 1e-3
        return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))
