# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of training: a dataclass per group of flags, with the default, help and range of each field.

A script's configuration is a [`TrainingConfig`] with the model's own group, see `tasks/`. `command_line.py` reads it from flags
and YAML files; `TrainingConfig.resolved` fills in the defaults that depend on other fields, and `TrainingConfig.check` refuses
what would train something else in silence or fail after hours.
"""

import importlib.util
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

from ecvae_diffusers.training.run.command import place


SCHEDULES = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]  # fmt: skip
# What --langevin_drift_step auto spreads over the chain: each of its K steps is at most 1 / K.
TOTAL_DRIFT_STEP = 1.0
# Of a schedule that warms up.
DEFAULT_WARMUP_STEPS = 100
WITHIN = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


class ConfigError(ValueError):
    """A field with a value that is not allowed; the message names the flag, its value and what is allowed."""


def option(
    default: Any = None,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    read: Callable[[str], Any] | None = None,
    flag: bool = True,
) -> Any:
    """
    Declare a field of a configuration.

    Args:
        default, help: Its default, and what `--help` says.
        at_least, above, at_most, below: Its range. Numbers are finite in any case.
        read (`Callable`): Reads it from text, instead of its type.
        flag (`bool`): Whether it is a flag. If not, it is set in Python, or by the arguments of a resumed run.
    """
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"help": help, "limits": {k: v for k, v in limits.items() if v is not None}, "read": read, "flag": flag}
    return field(default=default, metadata=metadata)


def refuse(name: str, value: Any, allowed: str) -> None:
    raise ConfigError(f"--{name} must be {allowed}, but is {value}.")


class Group:
    """Fields that belong together, the title of which is the docstring's first line."""

    def check(self) -> None:
        """
        Check each field's range.

        Raises:
            ConfigError: at the first value that is not allowed.
        """
        for own in fields(self):
            value, limits = getattr(self, own.name), own.metadata["limits"]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if (isinstance(value, float) and not math.isfinite(value)) or not all(
                WITHIN[kind](value, limit) for kind, limit in limits.items()
            ):
                finite = ["a finite number"] if isinstance(value, float) else []
                refuse(own.name, value, ", ".join([*finite, *(f"{kind} {limit:g}" for kind, limit in limits.items())]))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
    """data"""

    dataset_name: str | None = option(help="Hub id or local folder of a data set that `datasets` loads.", read=place)
    dataset_config_name: str | None = option(help="Configuration of the data set, where it has several.")
    train_data_dir: str | None = option(
        help="Folder of images, with or without sub-folders, instead of --dataset_name.", read=place
    )
    image_column: str | None = option(help="Column of the images. Default: the only column of images.")
    max_train_samples: int | None = option(help="Train on the first N images only.", at_least=1)
    resolution: int = option(
        32, help="Images are resized to this (shorter side) and center-cropped. A power of two.", at_least=8
    )
    image_size: int | None = option(
        help="Resize images (shorter side) to this instead, and train on random crops of --resolution. Measurements and "
        "pictures use the center."
    )
    in_channels: Literal[1, 3, 4] | None = option(
        help="1 gray, 3 RGB, 4 RGBA. Default: gray if every image is gray, otherwise RGB."
    )
    skip_broken_images: bool = option(False, help="Skip images that can't be read, and list them.")
    streaming: bool = option(
        False,
        help="Read --dataset_name while training instead of before, for data that doesn't fit on the disk. Requires --in_channels, "
        "except for a decoder. A resumed run refills its shuffle buffer, so it is not bit for bit.",
    )
    random_flip: bool = option(False, help="Flip each image horizontally with probability 1/2.")
    dataloader_num_workers: int = option(0, help="Processes that load data. 0: the main process.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(Group):
    """energy model"""

    energy_block_out_channels: list[int] | None = option(
        help="Channels at each resolution, from --resolution down by halves. Default: those of the autoencoder; without one, "
        "64 128 256 256 ..., down to 4 px."
    )
    energy_num_scales: int = option(1, help="Image scales that the energy model sees.", at_least=1)
    energy_spectral_norm: bool = option(False, help="Normalize the energy model's weights by their spectral norm.")
    energy_regularization: float = option(0.1, help="alpha: weight of the mean squared energies.", at_least=0)
    energy_gradient_penalty: float = option(
        0.1, help="gamma: weight of half the mean squared norm of the energy's gradient at the data (R1).", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class SpectralEnergyConfig(EnergyConfig):
    """energy model"""

    energy_spectral_norm: bool = option(True, help="Normalize the energy model's weights by their spectral norm.")
    energy_gradient_penalty: float = option(
        0.0, help="gamma: weight of half the mean squared norm of the energy's gradient at the data (R1).", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Group):
    """calibration"""

    langevin_steps: int = option(5, help="K: steps of the chain.", at_least=1)
    langevin_drift_step: Literal["auto"] | float = option(
        "auto",
        help="a: step on the energy's gradient. 'auto': 1 / --langevin_steps, and less while the chain's drift exceeds "
        "--drift_tolerance.",
        at_least=0,
    )
    langevin_noise: float = option(1e-3, help="b: noise of each step.", at_least=0)
    conditioning_weight: float = option(0.0, help="w: pull of the chain towards its start.", at_least=0)
    calibration_tolerance: Literal["auto"] | float = option(
        "auto",
        help="epsilon: bound on the squared distance that the chain moves an image, summed over the image.",
        above=0,
    )
    drift_tolerance: float | None = option(
        help="Root-mean-square drift per pixel, for images in [-1, 1], that --calibration_tolerance auto allows in addition to the "
        "noise, and that --langevin_drift_step auto does not exceed. Default: 0.1184 over the root of the number of pixels times "
        "channels, which is a drift of the same length at every size.",
        at_least=0,
    )
    dual_learning_rate: float = option(0.1, help="eta: learning rate of the dual variable.", at_least=0)
    relative_dual_step: bool = option(
        True, help="Step on the violation C / epsilon - 1 instead of the published C - epsilon."
    )
    initial_dual: float = option(30.0, help="Initial lambda.", at_least=0)
    max_dual: float = option(100.0, help="Upper bound of lambda.", above=0)

    @property
    def largest_drift_step(self) -> float:
        """a as training begins; with 'auto', also the largest a."""
        return (
            TOTAL_DRIFT_STEP / self.langevin_steps if self.langevin_drift_step == "auto" else self.langevin_drift_step
        )

    def check(self) -> None:
        super().check()
        if self.initial_dual > self.max_dual:
            refuse("initial_dual", self.initial_dual, f"at most --max_dual ({self.max_dual})")
        if self.calibration_tolerance == "auto" and self.langevin_noise == self.drift_tolerance == 0:
            allowed = "above 0 where --langevin_noise is 0 and --calibration_tolerance auto"
            refuse("drift_tolerance", self.drift_tolerance, allowed)
        if self.langevin_drift_step == "auto" and self.drift_tolerance == 0:
            refuse("drift_tolerance", self.drift_tolerance, "above 0 with --langevin_drift_step auto")
        if self.largest_drift_step * self.conditioning_weight > 1:
            most = f"at most 1 / --langevin_drift_step ({1 / self.largest_drift_step:g})"
            refuse("conditioning_weight", self.conditioning_weight, most)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Group):
    """training"""

    seed: int = option(0, help="Seed of weights, data order and noise.", at_least=0, below=2**32)
    max_train_steps: int = option(10_000, help="Number of training steps.", at_least=1)
    train_batch_size: int = option(64, help="Batch size per process.", at_least=1)
    gradient_accumulation_steps: int = option(1, help="Batches per step.", at_least=1)
    max_grad_norm: float | None = option(help="Clip the gradient norm of each network to this.", above=0)
    gradient_checkpointing: bool = option(False, help="Recompute activations in the backward pass, to save memory.")
    learning_rate: float | None = option(5e-4, help="Learning rate of the generator.", above=0)
    energy_learning_rate: float = option(1e-3, help="Learning rate of the energy model.", above=0)
    lr_scheduler: SCHEDULES = option(
        "constant",
        help="Schedule of both learning rates. With one that depends on the number of steps, a run cut in two differs from a run in "
        "one unless --max_train_steps is the same.",
    )
    lr_warmup_steps: int | None = option(
        help=f"Warm-up steps of the schedule. Default: {DEFAULT_WARMUP_STEPS}, 0 for constant.", at_least=0
    )
    adam_beta1: float = option(0.0, help="beta1 of the generator's Adam.", at_least=0, below=1)
    adam_beta2: float = option(0.99, help="beta2 of the generator's Adam.", at_least=0, below=1)
    energy_adam_beta2: float = option(0.99, help="beta2 of the energy model's Adam.", at_least=0, below=1, flag=False)
    use_ema: bool = option(True, help="Save the exponential moving average of the weights.")
    ema_max_decay: float = option(
        0.999, help="Decay per step of the moving average, reached after a warm-up.", at_least=0, below=1
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(help="Default: Accelerate's setting.")

    def check(self) -> None:
        super().check()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            allowed = "0 with --lr_scheduler constant (see constant_with_warmup)"
            refuse("lr_warmup_steps", self.lr_warmup_steps, allowed)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Group):
    """saving and logging"""

    output_dir: str | None = option(help="Folder of the run, which becomes the pipeline's folder.", read=place)
    overwrite_output_dir: bool = option(
        False, help="Replace the finished run in --output_dir. Only a folder that training wrote is ever replaced."
    )
    checkpointing_steps: int = option(500, help="Save a checkpoint every N steps.", at_least=1)
    checkpoints_total_limit: int | None = option(help="Keep only the newest N checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = option(
        help="'latest', or the name of the newest checkpoint in --output_dir. Starts at step 0 if there is none.",
        read=place,
    )
    log_steps: int = option(10, help="Write to metrics.jsonl every N steps.", at_least=1)
    save_images_steps: int = option(
        500,
        help="Write samples, reconstructions, the chain and the energies' distribution every N steps, and at steps 1, 10 and 100.",
        at_least=1,
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] | None = option(
        help="Log metrics.jsonl to these trackers as well, through Accelerate."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Group):
    """evaluation"""

    evaluation_steps: int | None = option(
        help="Measure samples against training images every N steps. Requires the extra `metrics`.", at_least=1
    )
    evaluation_features: str = option(
        "lite0",
        help="Features to measure over: 'lite0', 'digits', 'inception', or a vision model of `transformers` (folder or Hub id).",
        read=place,
    )
    # Neighbour measures compare each image with its 5 nearest.
    evaluation_samples: int = option(2048, help="Number of samples and of training images.", at_least=6)
    early_stopping_patience: int | None = option(
        help="Stop after N evaluations without a better Frechet distance, and save the best model.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Group):
    """guard against divergence"""

    divergence_guard: bool = option(
        True, help="At a sign of divergence, return to a healthy state with a lower learning rate of the energy model."
    )
    max_rollbacks: int = option(
        10, help="Rollbacks per run; the next alarm stops the run and saves a healthy state.", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class HubConfig(Group):
    """Hub (the token is that of `hf auth login`, or HF_TOKEN)"""

    push_to_hub: bool = option(False, help="Upload the pipeline after training.")
    hub_model_id: str | None = option(help="Repository: user/name. Default: the name of --output_dir.")
    hub_private_repo: bool | None = option(help="Whether a new repository is private.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """
    The configuration of a run, group by group. A script's own adds its model's group as `model`, which has the fields
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
    max_resolution: ClassVar[int] = 256
    channels_of_model: ClassVar[bool] = False  # whether images come in the channels of a model that exists already

    @classmethod
    def groups(cls) -> dict[str, type[Group]]:
        return {own.name: own.type for own in fields(cls)}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Self:
        """Build a configuration from fields by name, whatever their group. Missing ones have their defaults."""
        groups = {
            name: kind(**{own.name: values[own.name] for own in fields(kind) if own.name in values})
            for name, kind in cls.groups().items()
        }
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Return all fields by name, as `training_args.json` holds them."""
        groups = [getattr(self, own.name) for own in fields(self)]
        return {own.name: getattr(group, own.name) for group in groups for own in fields(group)}

    def resolved(self) -> Self:
        """Return the configuration with the defaults that depend on other fields filled in."""
        optimizer, energy = self.optimizer, self.energy
        if optimizer.lr_warmup_steps is None:
            warmup = 0 if optimizer.lr_scheduler == "constant" else DEFAULT_WARMUP_STEPS
            optimizer = replace(optimizer, lr_warmup_steps=warmup)
        if energy.energy_block_out_channels is None:
            channels = getattr(self.model, "block_out_channels", None) or default_channels(self.data.resolution)
            energy = replace(energy, energy_block_out_channels=channels)
        return replace(self, optimizer=optimizer, energy=energy)

    def check(self) -> None:
        """
        Check everything that can be checked without the data and the model.

        Raises:
            ConfigError: at the first value that is not allowed.
        """
        data, run, hub, evaluation = self.data, self.run, self.hub, self.evaluation
        if run.output_dir is None:
            raise ConfigError("--output_dir must be given.")
        if (data.dataset_name is None) == (data.train_data_dir is None):
            raise ConfigError("one of --dataset_name and --train_data_dir must be given, and not both.")
        for own in fields(self):
            getattr(self, own.name).check()
        if data.resolution > self.max_resolution or data.resolution & (data.resolution - 1):
            refuse("resolution", data.resolution, f"a power of two from 8 to {self.max_resolution}")
        if data.image_size is not None and data.image_size < data.resolution:
            refuse("image_size", data.image_size, f"at least --resolution ({data.resolution})")
        if (channels := getattr(self.model, "block_out_channels", None)) is not None:
            check_channels("block_out_channels", channels, data.resolution)
        check_channels("energy_block_out_channels", self.energy.energy_block_out_channels, data.resolution)
        if self.energy.energy_num_scales > (count := len(self.energy.energy_block_out_channels)):
            refuse("energy_num_scales", self.energy.energy_num_scales, f"at most the number of resolutions ({count})")
        if data.streaming and (data.dataset_name is None or (data.in_channels is None and not self.channels_of_model)):
            channels = "" if self.channels_of_model else " and --in_channels"
            raise ConfigError(
                f"--streaming requires --dataset_name{channels}: it can't look ahead. See --no-streaming."
            )
        if not hub.push_to_hub and not (hub.hub_model_id is hub.hub_private_repo is None):
            raise ConfigError("--hub_model_id and --hub_private_repo require --push_to_hub.")
        if evaluation.early_stopping_patience is not None and evaluation.evaluation_steps is None:
            raise ConfigError("--early_stopping_patience requires --evaluation_steps.")
        self.check_packages()

    def check_packages(self) -> None:
        needed = {f"--report_to {name}": (name, name) for name in self.run.report_to or []}
        if self.evaluation.evaluation_steps is not None:
            needed["--evaluation_steps"] = ("torchmetrics", "ecvae-diffusers[metrics]")
            if self.evaluation.evaluation_features == "inception":
                needed["--evaluation_features inception"] = ("torch_fidelity", "torch-fidelity")
        for argument, (module, package) in needed.items():
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{argument} requires a package that is not installed: pip install '{package}'.")


def default_channels(resolution: int) -> list[int]:
    """Return 64, 128, 256, 256 and so on: channels at each resolution down to 4 px."""
    return [min(64 * 2**i, 256) for i in range(max(int(math.log2(max(resolution, 1))) - 1, 1))]


def check_channels(name: str, channels: list[int], resolution: int) -> None:
    """Check channels at each resolution, down to 4 px at most."""
    levels = int(math.log2(resolution)) - 1
    if min(channels) < 1 or len(channels) > levels:
        refuse(name, channels, f"1 to {levels} positive numbers at --resolution {resolution}")
