"""Build or load the networks of a run, the calibrator, the moving average and the optimizers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel

from ecvae_diffusers import AutoencoderEC, EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.checks import size_as_text
from ecvae_diffusers.training.config import ENERGY_CALIBRATIONS, CalibrationConfig, EnergyConfig, TrainingConfig
from ecvae_diffusers.training.tasks.resizing import resize


# A generator (or `None`), and the `energy_model` and `scheduler` of its saved pipeline, if any.
Pretrained = tuple[Any, dict[str, Any]]
# Errors of loading a model: missing files, another class, a wrong config, weights of other shapes, damaged weights.
LOADING_ERRORS = (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError)
# Group normalization of channels_last is fast from this many channels per group, below and from LARGE_MAP pixels (measured).
FAST_FROM, FAST_FROM_IF_LARGE, LARGE_MAP = 16, 8, 1024


def build_energy_model(
    config: EnergyConfig,
    resolution: int | list[int],
    in_channels: int,
    num_class_embeds: int | None = None,
    patch_size: int = 1,
) -> EnergyModel:
    """Return a new energy model. Raises `ValueError` if blocks of a pretrained one should be frozen."""
    if config.freeze_energy_blocks > 0:
        raise ValueError(
            f"--freeze_energy_blocks {config.freeze_energy_blocks} requires an energy model in --pretrained_model_name_or_path, which "
            "holds none that fits."
        )
    return EnergyModel(
        sample_size=resolution,
        in_channels=in_channels,
        block_out_channels=tuple(config.energy_block_out_channels or ()),
        num_scales=config.energy_num_scales,
        spectral_norm=config.energy_spectral_norm,
        num_class_embeds=num_class_embeds,
        patch_size=patch_size,
    )


def to_contiguous(norm: torch.nn.GroupNorm, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Convert the input (B, C, H, W) of a group normalization if it has few channels per group. Input of another shape stays."""
    sample = args[0]
    fast_from = FAST_FROM_IF_LARGE if sample.shape[2:].numel() >= LARGE_MAP else FAST_FROM
    is_slow = sample.ndim == 4 and norm.num_channels < fast_from * norm.num_groups
    return (sample.contiguous() if is_slow else sample,)


def to_channels_last(norm: torch.nn.GroupNorm, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last) if output.ndim == 4 else output


def use_contiguous_norms(network: torch.nn.Module) -> None:
    """
    Make group normalizations of a channels_last network run on contiguous memory where they have few channels per group. There, torch's
    kernels for bfloat16 in channels_last on a CPU take up to four times as long as both conversions and the kernel for contiguous memory.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(to_contiguous)
            module.register_forward_hook(to_channels_last)


def build_models(
    config: TrainingConfig, feed, build: Callable[[], torch.nn.Module], pretrained: Pretrained
) -> tuple[Any, EnergyModel | None]:
    """
    Return the generator and, if it is calibrated with one, the energy model. Networks that `pretrained` does not hold are new, and
    those of another resolution are resized.

    Args:
        config ([`TrainingConfig`]): The configuration of the run.
        feed: The data, which gives channels and classes.
        build (`Callable`): Returns a new generator.
        pretrained (`tuple`): From `load_pretrained`.

    Raises:
        ValueError: if the pretrained generator has other channels than the data.
    """
    generator, companions = pretrained
    in_channels = feed.channels
    if generator is not None and generator.config.in_channels != in_channels:
        raise ValueError(
            f"--pretrained_model_name_or_path {config.model.pretrained_model_name_or_path!r} is for images with "
            f"{generator.config.in_channels} channel(s), but the data has {in_channels}: see --in_channels."
        )
    if generator is not None and generator.config.sample_size != config.data.resolution:
        generator = resize(generator, config.data.resolution)
        if (energy_model := companions.get("energy_model")) is not None:
            companions = companions | {"energy_model": resize(energy_model, config.data.resolution)}
    generator = build() if generator is None else generator
    if config.model.calibration not in ENERGY_CALIBRATIONS:
        return generator, None
    if (energy_model := companions.get("energy_model")) is None:
        num_classes = None if feed.class_names is None else len(feed.class_names)
        about = (config.data.resolution, in_channels, num_classes, config.patch_size)
        energy_model = build_energy_model(config.energy, *about)
    return generator, energy_model


def build_calibrator(
    config: CalibrationConfig, energy: EnergyConfig, energy_model: torch.nn.Module
) -> EnergyCalibrator:
    """Return the calibrator, which holds the chain and the dual variable."""
    scheduler = LangevinScheduler(
        num_steps=config.langevin_steps,
        drift_step_size=config.largest_drift_step,
        noise_scale=config.langevin_noise,
        conditioning_weight=config.conditioning_weight,
    )
    return EnergyCalibrator(
        energy_model,
        scheduler,
        tolerance=config.calibration_tolerance,
        drift_tolerance=config.drift_tolerance,
        initial_dual=config.initial_dual,
        dual_learning_rate=config.dual_learning_rate,
        max_dual=config.max_dual,
        relative_dual_step=config.relative_dual_step,
        energy_regularization=energy.energy_regularization,
        gradient_penalty=energy.energy_gradient_penalty,
    )


def load_pretrained(config: TrainingConfig, component: str, model_class: Any) -> Pretrained:
    """
    Load the networks of `--pretrained_model_name_or_path`, in training mode. It is a saved pipeline, whose `component` is a
    `model_class`, or a saved `model_class` alone.

    Raises:
        ValueError: if it can't be loaded, or holds no such model, or one for another resolution that can't be resized.
    """
    name_or_path = config.model.pretrained_model_name_or_path
    companions: dict[str, Any] = {}
    if name_or_path is None:
        return None, companions
    refused = f"--pretrained_model_name_or_path {name_or_path!r}"
    if (pipeline := Path(name_or_path, "pipeline")).is_dir():
        raise ValueError(f"{refused} is a checkpoint: give the path of its pipeline, {str(pipeline)!r}.")
    try:
        if is_pipeline(name_or_path):
            components = DiffusionPipeline.from_pretrained(name_or_path, low_cpu_mem_usage=False).components
            companions = {name: components.get(name) for name in ("energy_model", "scheduler")}
            model = components.get(component)
        else:
            class_name = model_class.load_config(name_or_path).get("_class_name")
            if class_name != model_class.__name__:
                raise ValueError(f"it is a {class_name}, not a pipeline and not {model_class.__name__}")
            model = model_class.from_pretrained(name_or_path, low_cpu_mem_usage=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error
    if not isinstance(model, model_class):
        raise ValueError(f"{refused} holds no {model_class.__name__}.")
    is_resized = isinstance(model, AutoencoderEC) and not getattr(config.model, "freeze_decoder", False)
    if model.config.sample_size != config.data.resolution and not is_resized:
        found = f"images of {size_as_text(model.config.sample_size)}"
        raise ValueError(f"{refused} is for {found}, but --resolution is {config.data.resolution}.")
    # `from_pretrained` returns networks in evaluation mode.
    for network in (model, companions.get("energy_model")):
        if network is not None:
            network.train()
    return model, companions


def is_pipeline(name_or_path: str) -> bool:
    """Return whether a folder or Hub id holds a pipeline."""
    try:
        return bool(DiffusionPipeline.load_config(name_or_path))
    except OSError:
        return False


def moving_average(generator: torch.nn.Module, decay: float) -> AveragedModel:
    """
    Return an exponential moving average of a generator's weights.

    Unlike `diffusers.training_utils.EMAModel`, it also copies the buffers at each update, such as the statistics of batch normalization.
    The decay warms up as (1 + n) / (10 + n) after n updates, so that the initial weights are forgotten.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, num_averaged: Any) -> None:
        # All on the device: reading `num_averaged` would synchronize it at every step.
        weight = 1.0 - ((1 + num_averaged) / (10 + num_averaged)).clamp(max=decay)
        difference = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(averaged, difference)

    average = AveragedModel(generator, multi_avg_fn=update)
    average.requires_grad_(False)
    return average


@dataclass
class Trained:
    """A network with its optimizer and learning rate schedule, all wrapped by Accelerate."""

    accelerator: Accelerator
    max_grad_norm: float | None
    network: torch.nn.Module
    optimizer: AcceleratedOptimizer
    lr_scheduler: AcceleratedScheduler

    def step(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Backpropagate a loss and, at the last batch of a step, update the network. Returns the `gradient_norm` before clipping, and
        an empty dictionary at other batches.
        """
        norms = {}
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            # Only for this optimizer: Accelerate's `clip_grad_norm_` would unscale the gradients of both.
            self.accelerator.unscale_gradients(self.optimizer)
            limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
            norms["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return norms

    def scale_learning_rate(self, factor: float) -> None:
        """Set the learning rate to `factor` times the given one, now and for the rest of the schedule."""
        schedule, groups = self.lr_scheduler.scheduler, self.optimizer.param_groups
        schedule.base_lrs = [group["initial_lr"] * factor for group in groups]
        for group, base, rule in zip(groups, schedule.base_lrs, schedule.lr_lambdas):
            group["lr"] = base * rule(schedule.last_epoch)
