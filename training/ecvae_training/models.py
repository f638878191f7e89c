"""The two networks of a run, new or from a saved pipeline, and the moving average."""

import argparse

import torch
from diffusers import DiffusionPipeline
from torch.optim.swa_utils import AveragedModel

from ecvae_diffusers import AutoencoderEC, EnergyModel


def build_models(args: argparse.Namespace, in_channels: int) -> tuple[AutoencoderEC, EnergyModel | None]:
    """
    The autoencoder and, where it is calibrated, the energy model.

    Raises:
        ValueError: if the pretrained model can't be loaded or is not one for images of this size.
    """
    vae = energy_model = None
    if args.pretrained_model_name_or_path is not None:
        vae, energy_model = load_pretrained(args.pretrained_model_name_or_path)
        expected, found = (in_channels, args.resolution), (vae.config.in_channels, vae.config.sample_size)
        if found != expected:
            raise ValueError(
                f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is for images of {found[0]} "
                f"channel(s) and {found[1]} px, but the data has {expected[0]} and --resolution is {expected[1]}."
            )
    if vae is None:
        vae = AutoencoderEC(
            sample_size=args.resolution,
            in_channels=in_channels,
            latent_channels=args.latent_channels,
            block_out_channels=tuple(args.block_out_channels),
            layers_per_block=args.layers_per_block,
            norm_type=args.norm_type,
        )
    if args.calibration == "none":
        return vae, None
    if energy_model is None:
        energy_model = EnergyModel(
            sample_size=args.resolution,
            in_channels=in_channels,
            block_out_channels=tuple(args.energy_block_out_channels),
            num_scales=args.energy_num_scales,
            act_fn=args.energy_act_fn,
            spectral_norm=args.energy_spectral_norm,
        )
    return vae, energy_model


def load_pretrained(name_or_path: str) -> tuple[AutoencoderEC, EnergyModel | None]:
    """The networks of a saved pipeline, or of a saved `AutoencoderEC` (which has no energy model)."""
    try:
        config = DiffusionPipeline.load_config(name_or_path)
    except OSError:
        config = None
    try:
        if config is None:
            return AutoencoderEC.from_pretrained(name_or_path, low_cpu_mem_usage=False), None
        pipeline = DiffusionPipeline.from_pretrained(name_or_path, low_cpu_mem_usage=False)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path!r} can't be loaded: {error}") from error
    if not isinstance(getattr(pipeline, "vae", None), AutoencoderEC):
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path!r} holds no AutoencoderEC.")
    return pipeline.vae.train(), pipeline.energy_model.train() if pipeline.energy_model is not None else None


def moving_average(vae: AutoencoderEC, decay: float) -> AveragedModel:
    """
    The exponential moving average of the autoencoder. Its buffers are copied at each update, which
    `diffusers.training_utils.EMAModel` does not do: batch normalization's statistics would be lost.

    The decay warms up as (1 + n) / (10 + n), so that the first weights are forgotten in time.
    """

    def update(averaged: torch.Tensor, current: torch.Tensor, num_averaged: torch.Tensor) -> torch.Tensor:
        n = int(num_averaged)
        return torch.lerp(averaged, current, 1.0 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(vae, avg_fn=update)
    average.requires_grad_(False)
    return average
