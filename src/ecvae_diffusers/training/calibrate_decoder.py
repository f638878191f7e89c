# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibrates the decoder of any autoencoder of diffusers: `accelerate launch training/calibrate_decoder.py --help`, or
`ecvae calibrate-decoder --help`. The encoder stays frozen, and what is saved loads with plain diffusers.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.config import (
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
class DecoderConfig(Group):
    """model and its loss"""

    calibration: Literal["none", "energy"] = option("energy", help="'none': only the squared error.")
    pretrained_model_name_or_path: str | None = option(
        help="The autoencoder: AutoencoderKL, AutoencoderTiny, VQModel or another of diffusers (folder or Hub id). An energy model "
        "that a run saved with it is kept.",
        read=place,
    )
    subfolder: str | None = option(help="Its subfolder in a pipeline: vae.")
    revision: str | None = option(help="Branch, tag or commit of the Hub id.")
    variant: str | None = option(help="Variant of its weights, such as fp16. Training and saving are in float32.")
    reconstruction_weight: float = option(
        1.0, help="Weight of the squared error: more keeps PSNR, less gives the chain more say.", at_least=0
    )
    latent_noise: float = option(
        0.0,
        help="Noise on the encodings whose decodings are calibrated: its standard deviation over that of the latents.",
        at_least=0,
    )
    latents_file: str | None = option(
        help="Calibrate decodings of these: a safetensors file with a tensor `latents` (N, C, h, w).", read=place
    )

    def check(self) -> None:
        super().check()
        if self.pretrained_model_name_or_path is None:
            refuse("pretrained_model_name_or_path", None, "given: the autoencoder whose decoder is calibrated")
        if self.reconstruction_weight == 0 and self.calibration == "none":
            refuse("reconstruction_weight", 0, "above 0 with --calibration none: nothing would be trained")
        if self.latents_file is not None and self.latent_noise > 0:
            refuse("latent_noise", self.latent_noise, "0 with --latents_file")


@dataclass(frozen=True, kw_only=True)
class DecoderOptimizerConfig(OptimizerConfig):
    """training"""

    learning_rate: float | None = with_default(OptimizerConfig, "learning_rate", 1e-4)
    energy_learning_rate: float = with_default(OptimizerConfig, "energy_learning_rate", 5e-4)
    adam_beta2: float = with_default(OptimizerConfig, "adam_beta2", 0.9)
    energy_adam_beta2: float = with_default(OptimizerConfig, "energy_adam_beta2", 0.9)


@dataclass(frozen=True, kw_only=True)
class ECDecoderConfig(TrainingConfig):
    """The configuration of `calibrate_decoder.py`."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    energy: SpectralEnergyConfig = field(default_factory=SpectralEnergyConfig)
    optimizer: DecoderOptimizerConfig = field(default_factory=DecoderOptimizerConfig)

    description: ClassVar[str] = (
        "Calibrate the decoder of any autoencoder of diffusers on images: accelerate launch training/calibrate_decoder.py "
        "--pretrained_model_name_or_path my_vae --train_data_dir my_images --output_dir my_sharper_vae --resolution 64"
    )
    channels_of_model: ClassVar[bool] = True
    max_resolution: ClassVar[int] = 1024


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECDecoderConfig:
    """Read and check a configuration, as `read_config` does."""
    return read_config(ECDecoderConfig, argv, prog)


def run(config: ECDecoderConfig) -> None:
    """Train as configured. Raises what `launch.train` raises."""
    from ecvae_diffusers.training.tasks.decoder import calibrate_decoder

    calibrate_decoder(config)


def main(argv: list[str] | None = None, prog: str = "calibrate_decoder.py") -> None:
    """Train as the command line says."""
    config = parse_args(argv, prog)
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)
