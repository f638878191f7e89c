# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of training: one dataclass per group of flags, with the default, help text and range of each field.

Each script's configuration is a subclass of [`TrainingConfig`] that adds the group of its model, in `tasks/*_config.py`. `command_line.py`
reads it from flags and YAML files. `TrainingConfig.resolved` fills in the defaults that depend on other fields. `TrainingConfig.check` refuses
values that would silently train something else, or fail after hours.
"""

import importlib.util
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, cast

from ecvae_diffusers.checks import as_sample_size, height_and_width
from ecvae_diffusers.command import place
from ecvae_diffusers.training.options import ConfigError, Group, option, refuse, with_default


SCHEDULES = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
    """data"""

    dataset_name: str | None = option(
        help="Data set to train on: a Hub id or a local folder that `datasets` loads.", read=place
    )
    dataset_config_name: str | None = option(help="Configuration of the data set, if it has several.")
    train_data_dir: str | None = option(help="Folder of images to train on, instead of --dataset_name.", read=place)
    image_column: str | None = option(help="Column of the images. Default: the only image column.")
    max_train_samples: int | None = option(help="Train on the first N images only.", at_least=1)
    resolution: int | list[int] = option(
        32,
        help="Size of the images: one even number, or height and width. Images are resized to cover it, and center-cropped.",
    )
    image_size: int | None = option(
        help="Resize images to this shorter side, in the proportions of --resolution, then crop --resolution at random."
    )
    in_channels: int | None = option(
        help="Channels of the images, up to 16: 1 (gray), 3 (RGB), 4 (RGBA), or another number, for .npy arrays and TIFF files of as many "
        "pages. Default: those of arrays, or 1 if all images are gray, else 3.",
        at_least=1,
        below=17,
    )
    skip_broken_images: bool = option(False, help="Skip images that can't be read, with a warning.")
    streaming: bool = option(
        False,
        help="Read --dataset_name while training, for data that does not fit on the disk. Requires --in_channels, except for a "
        "decoder. A resumed run continues in another order of images.",
    )
    random_flip: bool = option(False, help="Flip each image horizontally with probability 1/2.")
    dataloader_num_workers: int = option(
        0, help="Number of processes that load data. 0: the main process.", at_least=0
    )
    validation_fraction: float = option(
        0.0,
        help="Fraction of the images to hold out. Their logged energies show whether the energy model overfits.",
        at_least=0,
        below=1,
    )
    class_conditional: bool = option(False, flag=False)
    class_column: str | None = option(flag=False)

    def __post_init__(self) -> None:
        # As `sample_size` in a model's config: one number for squares, or else a list.
        sides = self.resolution if isinstance(self.resolution, list | tuple) else [self.resolution]
        if len(sides) not in (1, 2):
            refuse("resolution", sides, "one number, or height and width")
        object.__setattr__(self, "resolution", as_sample_size(sides))

    @property
    def decoded_size(self) -> int | list[int]:
        """Size of the images before random crops: --resolution, or enlarged to the shorter side --image_size."""
        if self.image_size is None:
            return self.resolution
        sides = height_and_width(self.resolution)
        return [round(self.image_size * side / min(sides)) for side in sides]


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(Group):
    """energy model"""

    energy_block_out_channels: list[int] | None = option(
        help="Channels at each resolution, from --resolution down by halves. Default: --block_out_channels, or 64 128 256 256 ... without it."
    )
    energy_num_scales: int = option(1, help="Number of image scales that the energy model sees.", at_least=1)
    energy_spectral_norm: bool = option(False, help="Apply spectral normalization to the energy model.")
    energy_regularization: float = option(0.1, help="Weight of the mean squared energies (alpha).", at_least=0)
    energy_gradient_penalty: Literal["auto"] | float = option(
        "auto",
        help="Weight of half the squared energy gradient at the data (R1, gamma). 'auto': 0.1 * pixels * channels / 256.",
        at_least=0,
    )
    freeze_energy_blocks: int = option(
        0,
        help="Freeze the residual blocks of this many of the energy model's coarsest resolutions. Requires --pretrained_model_name_or_path.",
        at_least=0,
    )
    adaptive_augmentation: bool = option(
        False,
        help="Augment the energy model's images (colour, translation, holes) while it overfits. Requires --validation_fraction.",
    )


@dataclass(frozen=True, kw_only=True)
class SpectralEnergyConfig(EnergyConfig):
    """energy model"""

    energy_spectral_norm: bool = with_default(EnergyConfig, "energy_spectral_norm", True)
    energy_gradient_penalty: Literal["auto"] | float = with_default(EnergyConfig, "energy_gradient_penalty", 0.0)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Group):
    """calibration"""

    langevin_steps: int = option(5, help="Number of steps of the chain (K).", at_least=1)
    langevin_drift_step: Literal["auto"] | float = option(
        "auto",
        help="Drift step: step size on the energy's gradient (a). 'auto': adapts to --drift_tolerance, up to 1 / --langevin_steps.",
        at_least=0,
    )
    langevin_noise: float = option(1e-3, help="Standard deviation of the noise of each step (b).", at_least=0)
    conditioning_weight: float = option(0.0, help="Pull of the chain towards its start (w).", at_least=0)
    calibration_tolerance: Literal["auto"] | float = option(
        "auto",
        help="Tolerance of the constraint (epsilon): bound on the squared distance that the chain moves an image, summed over pixels "
        "and channels. 'auto': the chain's noise plus --drift_tolerance.",
        above=0,
    )
    drift_tolerance: float | None = option(
        help="Root-mean-square drift per pixel, for images in [-1, 1], that the 'auto' values of --calibration_tolerance and "
        "--langevin_drift_step allow. Default: 0.1184 / sqrt(pixels * channels).",
        at_least=0,
    )
    dual_learning_rate: float = option(0.1, help="Learning rate of the dual variable lambda (eta).", at_least=0)
    relative_dual_step: bool = option(
        True, help="Step lambda on constraint / tolerance - 1, instead of the published constraint - tolerance."
    )
    initial_dual: float = option(30.0, help="Initial value of lambda.", at_least=0)
    max_dual: float = option(100.0, help="Upper bound of lambda.", above=0)

    @property
    def largest_drift_step(self) -> float:
        """The drift step at the start of training. For 'auto' it is also the largest one: K such steps add up to 1."""
        return 1.0 / self.langevin_steps if self.langevin_drift_step == "auto" else self.langevin_drift_step

    def check(self) -> None:
        super().check()
        is_auto = self.calibration_tolerance == "auto" and self.langevin_noise == 0
        if self.drift_tolerance == 0 and (is_auto or self.langevin_drift_step == "auto"):
            allowed = (
                "above 0 with --langevin_drift_step auto, or with --calibration_tolerance auto and --langevin_noise 0"
            )
            refuse("drift_tolerance", self.drift_tolerance, allowed)
        if self.initial_dual > self.max_dual:
            refuse("initial_dual", self.initial_dual, f"at most --max_dual ({self.max_dual})")
        if self.largest_drift_step * self.conditioning_weight > 1:
            most = f"at most 1 / --langevin_drift_step ({1 / self.largest_drift_step:g})"
            refuse("conditioning_weight", self.conditioning_weight, most)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Group):
    """training"""

    seed: int = option(0, help="Seed of weights, data order and noise.", at_least=0, below=2**32)
    max_train_steps: int = option(10_000, help="Number of training steps.", at_least=1)
    train_batch_size: int = option(64, help="Batch size per process.", at_least=1)
    gradient_accumulation_steps: int = option(1, help="Number of batches per training step.", at_least=1)
    max_grad_norm: float | None = option(help="Clip the gradient norm of each network to this value.", above=0)
    gradient_checkpointing: bool = option(False, help="Recompute activations in the backward pass, to save memory.")
    learning_rate: float | None = option(5e-4, help="Learning rate of the generator.", above=0)
    energy_learning_rate: float = option(1e-3, help="Learning rate of the energy model.", above=0)
    lr_scheduler: SCHEDULES = option(
        "constant",
        help="Schedule of both learning rates. Decaying schedules depend on --max_train_steps: keep it when resuming.",
    )
    lr_warmup_steps: int | None = option(
        help="Number of warm-up steps. Default: 100, or 0 with --lr_scheduler constant.", at_least=0
    )
    adam_beta1: float = option(0.0, help="beta1 of the generator's Adam.", at_least=0, below=1)
    adam_beta2: float = option(0.99, help="beta2 of the generator's Adam.", at_least=0, below=1)
    energy_adam_beta2: float = option(0.99, help="beta2 of the energy model's Adam.", at_least=0, below=1, flag=False)
    use_ema: bool = option(True, help="Save an exponential moving average of the generator's weights.")
    ema_max_decay: float = option(0.999, help="Decay of the moving average after a warm-up.", at_least=0, below=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        help="Precision of training. Default: Accelerate's setting."
    )

    def check(self) -> None:
        super().check()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            refuse("lr_warmup_steps", self.lr_warmup_steps, "0 with --lr_scheduler constant")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Group):
    """saving and logging"""

    output_dir: str | None = option(help="Folder of the run. The pipeline is saved in it.", read=place)
    overwrite_output_dir: bool = option(
        False, help="Replace the run in --output_dir. A folder without a run is never replaced."
    )
    checkpointing_steps: int = option(500, help="Save a checkpoint every N steps.", at_least=1)
    checkpoints_total_limit: int | None = option(help="Keep only the newest N checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = option(
        help="'latest': resume from the newest checkpoint in --output_dir, or start at step 0 if there is none.",
        read=place,
    )
    log_steps: int = option(10, help="Write to metrics.jsonl every N steps.", at_least=1)
    save_images_steps: int = option(
        500,
        help="Write samples, reconstructions, chains and energies every N steps, and pictures also at steps 1, 10 and 100.",
        at_least=1,
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] | None = option(help="Also log to these trackers.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Group):
    """evaluation"""

    evaluation_steps: int | None = option(help="Compare samples with training images every N steps.", at_least=1)
    evaluation_features: str = option(
        "lite0",
        help="Feature extractor: 'lite0', 'digits', 'inception', or a vision model of `transformers`.",
        read=place,
    )
    # At least 6, because precision, recall, density and coverage use the 5 nearest neighbours of each image.
    evaluation_samples: int = option(2048, help="Number of samples, and of training images, to compare.", at_least=6)
    early_stopping_patience: int | None = option(
        help="Stop after N evaluations without improvement, and save the best pipeline.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Group):
    """guard against divergence"""

    divergence_guard: bool = option(
        True, help="If training diverges, roll back to a healthy state and lower the energy model's learning rate."
    )
    max_rollbacks: int = option(
        10, help="Largest number of rollbacks. At the next divergence the run is saved and stops.", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class HubConfig(Group):
    """Hub (with the token of `hf auth login` or HF_TOKEN)"""

    push_to_hub: bool = option(False, help="Upload the pipeline after training.")
    hub_model_id: str | None = option(help="Repository to upload to: user/name. Default: the name of --output_dir.")
    hub_private_repo: bool | None = option(help="Whether to create a new repository as private.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """
    The configuration of a run, as groups of fields. The subclass of each script sets the group `model`, which has the fields
    `calibration` and `pretrained_model_name_or_path`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: Any = None
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    description: ClassVar[str] = ""
    channels_of_model: ClassVar[bool] = False  # whether a pretrained model sets the channels of the images

    @classmethod
    def groups(cls) -> dict[str, type[Group]]:
        return {own.name: cast(type[Group], own.type) for own in fields(cls)}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Self:
        """Build a configuration from a flat dictionary of fields. Missing fields get their defaults."""
        groups: dict[str, Any] = {
            name: kind(**{own.name: values[own.name] for own in fields(kind) if own.name in values})
            for name, kind in cls.groups().items()
        }
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Return all fields as a flat dictionary, as in `training_args.json`."""
        groups = [getattr(self, own.name) for own in fields(self)]
        return {own.name: getattr(group, own.name) for group in groups for own in fields(group)}

    @property
    def patch_size(self) -> int:
        """Side, in pixels, of the patches that the networks see as one pixel."""
        return getattr(self.model, "patch_size", 1)

    def resolved(self) -> Self:
        """Return the configuration with the defaults that depend on other fields filled in."""
        optimizer, energy = self.optimizer, self.energy
        if optimizer.lr_warmup_steps is None:
            warmup = 0 if optimizer.lr_scheduler == "constant" else 100
            optimizer = replace(optimizer, lr_warmup_steps=warmup)
        if energy.energy_block_out_channels is None:
            default = default_channels(self.data.resolution, self.patch_size)
            channels = getattr(self.model, "block_out_channels", None) or default
            energy = replace(energy, energy_block_out_channels=channels)
        return replace(self, optimizer=optimizer, energy=energy)

    def check(self) -> None:
        """
        Check everything that can be checked without the data and the model.

        Raises:
            ConfigError: at the first value that is not allowed.
        """
        data, hub, evaluation = self.data, self.hub, self.evaluation
        if self.run.output_dir is None:
            raise ConfigError("--output_dir must be given.")
        if (data.dataset_name is None) == (data.train_data_dir is None):
            raise ConfigError("exactly one of --dataset_name and --train_data_dir must be given.")
        for own in fields(self):
            getattr(self, own.name).check()
        sides, energy = height_and_width(data.resolution), self.energy
        if min(sides) < 4 or any(side % 2 for side in sides):
            refuse("resolution", data.resolution, "one even number of at least 4, or two (height and width)")
        most = num_halvings(data.resolution, self.patch_size, least=4) + 1
        if most < 1:
            refuse(
                "patch_size", self.patch_size, f"a divisor of --resolution {data.resolution}, at most a quarter of it"
            )
        widths = energy.energy_block_out_channels or []
        of_model = getattr(self.model, "block_out_channels", None)
        for name, channels in (("block_out_channels", of_model), ("energy_block_out_channels", widths)):
            if channels is not None and not (1 <= len(channels) <= most and min(channels) >= 1):
                refuse(name, channels, f"1 to {most} positive numbers at --resolution {data.resolution}")
        is_calibrated = self.model.calibration in ENERGY_CALIBRATIONS
        if energy.freeze_energy_blocks > 0 and not (is_calibrated and self.model.pretrained_model_name_or_path):
            raise ConfigError(
                f"--freeze_energy_blocks {energy.freeze_energy_blocks} requires --pretrained_model_name_or_path and a --calibration with an "
                "energy model."
            )
        if energy.energy_num_scales > len(widths):
            refuse("energy_num_scales", energy.energy_num_scales, f"at most the number of resolutions ({len(widths)})")
        if data.image_size is not None and data.image_size < min(sides):
            refuse("image_size", data.image_size, f"at least the shorter side of --resolution ({min(sides)})")
        if data.streaming and (data.dataset_name is None or (data.in_channels is None and not self.channels_of_model)):
            channels = "" if self.channels_of_model else " and --in_channels"
            raise ConfigError(f"--streaming requires --dataset_name{channels}: a stream can't be read in advance.")
        if energy.adaptive_augmentation and not data.validation_fraction:
            refuse("validation_fraction", data.validation_fraction, "above 0 with --adaptive_augmentation")
        if data.streaming and data.validation_fraction:
            refuse("validation_fraction", data.validation_fraction, "0 with --streaming")
        if not hub.push_to_hub and not (hub.hub_model_id is hub.hub_private_repo is None):
            raise ConfigError("--hub_model_id and --hub_private_repo require --push_to_hub.")
        if evaluation.early_stopping_patience is not None and evaluation.evaluation_steps is None:
            raise ConfigError("--early_stopping_patience requires --evaluation_steps.")
        needed: dict[str, tuple[str, str]] = {f"--report_to {name}": (name, name) for name in self.run.report_to or []}
        if evaluation.evaluation_steps is not None:
            needed["--evaluation_steps"] = ("torchmetrics", "ecvae-diffusers[metrics]")
            if evaluation.evaluation_features == "inception":
                needed["--evaluation_features inception"] = ("torch_fidelity", "torch-fidelity")
        for argument, (module, package) in needed.items():
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{argument} requires a package that is not installed: pip install '{package}'.")


def num_halvings(resolution: int | list[int], patch_size: int = 1, least: int = 1) -> int:
    """
    Return how often height and width, in patches, can be halved evenly while both stay at least `least`. -1 if a side is smaller
    from the start, or no multiple of `patch_size`.
    """
    sides = height_and_width(resolution)
    divides = [count for count in range(32) if all(side % (patch_size << count) == 0 for side in sides)]
    return max((count for count in divides if min(sides) >= least * patch_size << count), default=-1)


def default_channels(resolution: int | list[int], patch_size: int = 1) -> list[int]:
    """Return the channels at each resolution, halved evenly as often as it can be down to 4 px: 64, 128, 256, 256 and so on."""
    return [min(64 * 2**i, 256) for i in range(max(num_halvings(resolution, patch_size, least=4), 0) + 1)]


# Values of `--calibration` that use an energy model, and values that calibrate the posterior.
ENERGY_CALIBRATIONS, POSTERIOR_CALIBRATIONS = ("energy", "both"), ("posterior", "both")
