"""The two networks of a run, new or from a saved pipeline, what calibrates them, and the moving average."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel

from ecvae_diffusers import EnergyCalibrator, EnergyModel, LangevinScheduler
from ecvae_diffusers.training.config import CalibrationConfig, EnergyConfig, TrainingConfig
from ecvae_diffusers.training.train_ecvae import ENERGY_CALIBRATIONS


Networks = tuple[torch.nn.Module | None, EnergyModel | None]
# Of a folder without networks, of another class, of configs of other kinds, and of weights of other sizes or damaged ones.
LOADING_ERRORS = (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError)


def build_energy_model(config: EnergyConfig, resolution: int, in_channels: int) -> EnergyModel:
    """Return a new energy model."""
    return EnergyModel(
        sample_size=resolution,
        in_channels=in_channels,
        block_out_channels=tuple(config.energy_block_out_channels),
        num_scales=config.energy_num_scales,
        spectral_norm=config.energy_spectral_norm,
    )


def build_models(
    config: TrainingConfig,
    in_channels: int,
    build: Callable[[], torch.nn.Module],
    pretrained: Networks = (None, None),
) -> Networks:
    """
    The generator and, where it is calibrated, the energy model: those of `pretrained`, new ones for the rest.

    Raises:
        ValueError: if the pretrained generator is for images of another number of channels than `in_channels`.
    """
    generator, energy_model = pretrained
    if generator is not None and generator.config.in_channels != in_channels:
        raise ValueError(
            f"--pretrained_model_name_or_path {config.model.pretrained_model_name_or_path!r} is for images of "
            f"{generator.config.in_channels} channel(s), but the data has {in_channels}: see --in_channels."
        )
    generator = build() if generator is None else generator
    if config.model.calibration not in ENERGY_CALIBRATIONS:
        return generator, None
    if energy_model is None:
        energy_model = build_energy_model(config.energy, config.data.resolution, in_channels)
    return generator, energy_model


def build_calibrator(
    config: CalibrationConfig, energy: EnergyConfig, energy_model: torch.nn.Module
) -> EnergyCalibrator:
    """Return the chain, its constraint and the dual variable."""
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


def load_pretrained(config: TrainingConfig, component: str, model_class: type) -> Networks:
    """
    The networks of the saved pipeline that `--pretrained_model_name_or_path` names, or of a saved model alone (which has no
    energy model), ready to train; `None` each where it names none.

    Args:
        config ([`TrainingConfig`]): The run's.
        component (`str`): The generator's name in the pipeline.
        model_class (`type`): Its class.

    Raises:
        ValueError: if it can't be loaded, holds no such model, one for another resolution, or weights that are not finite.
    """
    name_or_path, name = config.model.pretrained_model_name_or_path, model_class.__name__
    if name_or_path is None:
        return None, None
    refused = f"--pretrained_model_name_or_path {name_or_path!r}"
    if (Path(name_or_path) / "pipeline" / "model_index.json").is_file():
        raise ValueError(
            f"{refused} is a checkpoint: give the pipeline in it, {str(Path(name_or_path) / 'pipeline')!r}."
        )
    energy_model = None
    try:
        if is_pipeline(name_or_path):
            pipeline = DiffusionPipeline.from_pretrained(name_or_path, low_cpu_mem_usage=False)
            model, energy_model = getattr(pipeline, component, None), getattr(pipeline, "energy_model", None)
        else:
            class_name = model_class.load_config(name_or_path).get("_class_name")
            if class_name != name:
                raise ValueError(f"it is a {class_name}, not a pipeline and not {name}.")
            model = model_class.from_pretrained(name_or_path, low_cpu_mem_usage=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error
    if not isinstance(model, model_class):
        raise ValueError(f"{refused} holds no {name}.")
    if model.config.sample_size != config.data.resolution:
        raise ValueError(
            f"{refused} is for images of {model.config.sample_size} px, but --resolution is {config.data.resolution}."
        )
    # `from_pretrained` gives networks in evaluation mode.
    return model.train(), energy_model.train() if energy_model is not None else None


def is_pipeline(name_or_path: str | Path) -> bool:
    """Whether a pipeline can be read there."""
    try:
        return bool(DiffusionPipeline.load_config(name_or_path))
    except OSError:
        return False


def load_companions(name_or_path: str | Path, model_class: type) -> dict:
    """
    What a saved pipeline has beside its autoencoder: an energy model and a chain, or nothing, as an autoencoder alone has. They
    still fit a decoder that has not changed.

    Raises:
        ValueError: if there is neither a pipeline nor an autoencoder, or it can't be loaded.
    """
    try:
        if not is_pipeline(name_or_path):
            model_class.load_config(name_or_path)
            return {}
        components = DiffusionPipeline.from_pretrained(name_or_path, low_cpu_mem_usage=False).components
    except LOADING_ERRORS as error:
        raise ValueError(f"the energy model of {str(name_or_path)!r} can't be loaded: {error}") from error
    return {name: components.get(name) for name in ("energy_model", "scheduler")}


def moving_average(generator: torch.nn.Module, decay: float) -> AveragedModel:
    """
    The exponential moving average of what is trained. Its buffers are copied at each update, which
    `diffusers.training_utils.EMAModel` does not do: batch normalization's statistics would be lost.

    The decay warms up as (1 + n) / (10 + n), so that the first weights are forgotten in time.
    """

    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor) -> None:
        # All on the device: reading `num_averaged` would wait for it at every step.
        weight = 1.0 - ((1 + num_averaged) / (10 + num_averaged)).clamp(max=decay)
        difference = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(averaged, difference)

    average = AveragedModel(generator, multi_avg_fn=update)
    average.requires_grad_(False)
    return average
