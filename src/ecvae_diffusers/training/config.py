# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of training: a dataclass per group of flags, with the default, help and range of each field.

A script's configuration is a [`TrainingConfig`] with the model's own group: those of VAEs, flows and decoders are at the end. `command_line.py` reads it from flags
and YAML files; `TrainingConfig.resolved` fills in the defaults that depend on other fields, and `TrainingConfig.check` refuses
what would train something else in silence or fail after hours.
"""

import importlib.util
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NoReturn, Self, cast

from ecvae_diffusers.command import place


SCHEDULES = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
LIMITS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}


class ConfigError(ValueError):
    """A field with a value that is not allowed; the message names the flag, its value and what is allowed."""


def option(
    default: Any = None,
    help: str = "",
    *,
    read: Callable[[str], Any] | None = None,
    flag: bool = True,
    **limits: float,
) -> Any:
    """
    Declare a field of a configuration.

    Args:
        default, help: Its default, and what `--help` says.
        read (`Callable`): Reads it from text, instead of its type.
        flag (`bool`): Whether it is a flag. If not, it is set in Python, or by the arguments of a resumed run.
        limits (`float`): Its range, by the names in `LIMITS`. Numbers are finite in any case.
    """
    return field(default=default, metadata={"help": help, "limits": limits, "read": read, "flag": flag})


def with_default(group: type, name: str, default: Any) -> Any:
    """Declare a field of the group that is extended again, with another default."""
    return field(default=default, metadata=next(own.metadata for own in fields(group) if own.name == name))


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(f"--{name} must be {allowed}, but is {value}.")


@dataclass(frozen=True, kw_only=True)
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
            if not (math.isfinite(value) and all(LIMITS[kind](value, limit) for kind, limit in limits.items())):
                bounds = [f"{kind.replace('_', ' ')} {limit:g}" for kind, limit in limits.items()]
                refuse(own.name, value, ", ".join(["a finite number", *bounds]))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
    """data"""

    dataset_name: str | None = option(help="Hub id or local folder of a data set that `datasets` loads.", read=place)
    dataset_config_name: str | None = option(help="Configuration of the data set, where it has several.")
    train_data_dir: str | None = option(help="Folder of images, instead of --dataset_name.", read=place)
    image_column: str | None = option(help="Column of the images. Default: the only column of images.")
    max_train_samples: int | None = option(help="Train on the first N images only.", at_least=1)
    resolution: int = option(32, help="Resize (shorter side) and center-crop images to this power of two.", at_least=8)
    image_size: int | None = option(help="Resize images (shorter side) to this, and crop --resolution at random.")
    in_channels: Literal[1, 3, 4] | None = option(help="1 gray, 3 RGB, 4 RGBA. Default: 1 if all are gray, else 3.")
    skip_broken_images: bool = option(False, help="Skip images that can't be read, and list them.")
    streaming: bool = option(
        False,
        help="Read --dataset_name while training, for data that doesn't fit on the disk. Requires --in_channels, except for a "
        "decoder. Resuming is not bit for bit.",
    )
    random_flip: bool = option(False, help="Flip each image horizontally with probability 1/2.")
    dataloader_num_workers: int = option(0, help="Processes that load data. 0: the main process.", at_least=0)
    validation_fraction: float = option(
        0.0,
        help="Share of the images that is held out. Their energies are logged, and show whether the energy model overfits.",
        at_least=0,
        below=1,
    )
    class_conditional: bool = option(False, flag=False)
    class_column: str | None = option(flag=False)


@dataclass(frozen=True, kw_only=True)
class ClassDataConfig(DataConfig):
    """data"""

    class_conditional: bool = option(
        False, help="Learn classes: the sub-folders of --train_data_dir, or a column of --dataset_name."
    )
    class_column: str | None = option(
        help="Column of the classes, with --class_conditional. Default: the only column of class labels."
    )

    def check(self) -> None:
        super().check()
        if self.class_column is not None and not (self.class_conditional and self.dataset_name is not None):
            refuse("class_column", self.class_column, "left out without --class_conditional and --dataset_name")
        if self.class_conditional and self.streaming:
            refuse("streaming", True, "left out with --class_conditional: the classes must be known before training")


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(Group):
    """energy model"""

    energy_block_out_channels: list[int] | None = option(
        help="Channels at each resolution, from --resolution down by halves. Default: the autoencoder's, or 64 128 256 256 ..."
    )
    energy_num_scales: int = option(1, help="Image scales that the energy model sees.", at_least=1)
    energy_spectral_norm: bool = option(False, help="Normalize the energy model's weights by their spectral norm.")
    energy_regularization: float = option(0.1, help="alpha: weight of the mean squared energies.", at_least=0)
    energy_gradient_penalty: Literal["auto"] | float = option(
        "auto",
        help="gamma: weight of half the squared gradient at the data (R1). 'auto': 0.1 per 256 pixels times channels.",
        at_least=0,
    )
    adaptive_augmentation: bool = option(
        False,
        help="Augment what the energy model sees (colour, translation, holes) while it overfits, by --validation_fraction.",
    )


@dataclass(frozen=True, kw_only=True)
class SpectralEnergyConfig(EnergyConfig):
    """energy model"""

    energy_spectral_norm: bool = with_default(EnergyConfig, "energy_spectral_norm", True)
    energy_gradient_penalty: Literal["auto"] | float = with_default(EnergyConfig, "energy_gradient_penalty", 0.0)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Group):
    """calibration"""

    langevin_steps: int = option(5, help="K: steps of the chain.", at_least=1)
    langevin_drift_step: Literal["auto"] | float = option(
        "auto",
        help="a: step on the energy's gradient. 'auto': at most 1 / --langevin_steps, by --drift_tolerance.",
        at_least=0,
    )
    langevin_noise: float = option(1e-3, help="b: noise of each step.", at_least=0)
    conditioning_weight: float = option(0.0, help="w: pull of the chain towards its start.", at_least=0)
    calibration_tolerance: Literal["auto"] | float = option(
        "auto", help="epsilon: bound on the squared distance that the chain moves an image, summed over it.", above=0
    )
    drift_tolerance: float | None = option(
        help="Root-mean-square drift per pixel, for images in [-1, 1], that --calibration_tolerance auto allows in addition to the "
        "noise, and --langevin_drift_step auto does not exceed. Default: 0.1184 over the root of the number of pixels times channels.",
        at_least=0,
    )
    dual_learning_rate: float = option(0.1, help="eta: learning rate of the dual variable.", at_least=0)
    relative_dual_step: bool = option(True, help="Step on C / epsilon - 1 instead of the published C - epsilon.")
    initial_dual: float = option(30.0, help="Initial lambda.", at_least=0)
    max_dual: float = option(100.0, help="Upper bound of lambda.", above=0)

    @property
    def largest_drift_step(self) -> float:
        """a as training begins; with 'auto', also the largest a: all K steps together are then a step of 1."""
        return 1.0 / self.langevin_steps if self.langevin_drift_step == "auto" else self.langevin_drift_step

    def check(self) -> None:
        super().check()
        is_auto = self.calibration_tolerance == "auto" and self.langevin_noise == 0
        if self.drift_tolerance == 0 and (is_auto or self.langevin_drift_step == "auto"):
            allowed = "above 0 with --langevin_drift_step auto, and with --calibration_tolerance auto without --langevin_noise"
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
    gradient_accumulation_steps: int = option(1, help="Batches per step.", at_least=1)
    max_grad_norm: float | None = option(help="Clip the gradient norm of each network to this.", above=0)
    gradient_checkpointing: bool = option(False, help="Recompute activations in the backward pass, to save memory.")
    learning_rate: float | None = option(5e-4, help="Learning rate of the generator.", above=0)
    energy_learning_rate: float = option(1e-3, help="Learning rate of the energy model.", above=0)
    lr_scheduler: SCHEDULES = option(
        "constant", help="Schedule of both learning rates. To resume as if not interrupted, keep --max_train_steps."
    )
    lr_warmup_steps: int | None = option(help="Warm-up steps. Default: 100, with constant 0.", at_least=0)
    adam_beta1: float = option(0.0, help="beta1 of the generator's Adam.", at_least=0, below=1)
    adam_beta2: float = option(0.99, help="beta2 of the generator's Adam.", at_least=0, below=1)
    energy_adam_beta2: float = option(0.99, help="beta2 of the energy model's Adam.", at_least=0, below=1, flag=False)
    use_ema: bool = option(True, help="Save the exponential moving average of the weights.")
    ema_max_decay: float = option(0.999, help="Decay of the moving average, after a warm-up.", at_least=0, below=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(help="Default: Accelerate's setting.")

    def check(self) -> None:
        super().check()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            refuse("lr_warmup_steps", self.lr_warmup_steps, "0 with --lr_scheduler constant")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Group):
    """saving and logging"""

    output_dir: str | None = option(help="Folder of the run, which becomes the pipeline's folder.", read=place)
    overwrite_output_dir: bool = option(False, help="Replace the run in --output_dir, but no other folder.")
    checkpointing_steps: int = option(500, help="Save a checkpoint every N steps.", at_least=1)
    checkpoints_total_limit: int | None = option(help="Keep only the newest N checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = option(
        help="'latest': resume from the newest checkpoint in --output_dir, or start at step 0 if there is none.",
        read=place,
    )
    log_steps: int = option(10, help="Write to metrics.jsonl every N steps.", at_least=1)
    save_images_steps: int = option(
        500,
        help="Write samples, reconstructions, the chain and energies every N steps, and at 1, 10 and 100.",
        at_least=1,
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] | None = option(help="Also log to these trackers.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Group):
    """evaluation"""

    evaluation_steps: int | None = option(help="Measure samples against training images every N steps.", at_least=1)
    evaluation_features: str = option(
        "lite0", help="Features: 'lite0', 'digits', 'inception', or a vision model of `transformers`.", read=place
    )
    # Neighbour measures compare each image with its 5 nearest.
    evaluation_samples: int = option(2048, help="Number of samples and of training images.", at_least=6)
    early_stopping_patience: int | None = option(help="Stop N evaluations after the best one; save it.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Group):
    """guard against divergence"""

    divergence_guard: bool = option(True, help="At divergence, go back and lower the energy model's learning rate.")
    max_rollbacks: int = option(10, help="Rollbacks per run. The next alarm stops it, saved.", at_least=0)


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
        return {own.name: cast(type[Group], own.type) for own in fields(cls)}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Self:
        """Build a configuration from fields by name, whatever their group. Missing ones have their defaults."""
        groups: dict[str, Any] = {
            name: kind(**{own.name: values[own.name] for own in fields(kind) if own.name in values})
            for name, kind in cls.groups().items()
        }
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Return all fields by name, as `training_args.json` holds them."""
        groups = [getattr(self, own.name) for own in fields(self)]
        return {own.name: getattr(group, own.name) for group in groups for own in fields(group)}

    @property
    def patch_size(self) -> int:
        """Pixels a side that the networks see as one."""
        return getattr(self.model, "patch_size", 1)

    def resolved(self) -> Self:
        """Return the configuration with the defaults that depend on other fields filled in."""
        optimizer, energy = self.optimizer, self.energy
        if optimizer.lr_warmup_steps is None:
            warmup = 0 if optimizer.lr_scheduler == "constant" else 100
            optimizer = replace(optimizer, lr_warmup_steps=warmup)
        if energy.energy_block_out_channels is None:
            resolution = self.data.resolution // self.patch_size
            channels = getattr(self.model, "block_out_channels", None) or default_channels(resolution)
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
            raise ConfigError("one of --dataset_name and --train_data_dir must be given, and not both.")
        for own in fields(self):
            getattr(self, own.name).check()
        if data.resolution > self.max_resolution or data.resolution & (data.resolution - 1):
            refuse("resolution", data.resolution, f"a power of two from 8 to {self.max_resolution}")
        most, energy = int(math.log2(data.resolution // self.patch_size)) - 1, self.energy
        if most < 1:
            refuse("patch_size", self.patch_size, f"at most {data.resolution // 4} at --resolution {data.resolution}")
        widths = energy.energy_block_out_channels or []
        of_model = getattr(self.model, "block_out_channels", None)
        for name, channels in (("block_out_channels", of_model), ("energy_block_out_channels", widths)):
            if channels is not None and not (1 <= len(channels) <= most and min(channels) >= 1):
                refuse(name, channels, f"1 to {most} positive numbers at --resolution {data.resolution}")
        if energy.energy_num_scales > len(widths):
            refuse("energy_num_scales", energy.energy_num_scales, f"at most the number of resolutions ({len(widths)})")
        if data.image_size is not None and data.image_size < data.resolution:
            refuse("image_size", data.image_size, f"at least --resolution ({data.resolution})")
        if data.streaming and (data.dataset_name is None or (data.in_channels is None and not self.channels_of_model)):
            channels = "" if self.channels_of_model else " and --in_channels"
            raise ConfigError(f"--streaming requires --dataset_name{channels}: it can't look ahead.")
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


def default_channels(resolution: int) -> list[int]:
    """Return 64, 128, 256, 256 and so on: channels at each resolution down to 4 px."""
    return [min(64 * 2**i, 256) for i in range(max(int(math.log2(max(resolution, 1))) - 1, 1))]


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
    patch_size: Literal[1, 2, 4] = option(
        1,
        help="Pixels a side that the networks see as one, with more channels: 2 saves most of the time of large images.",
    )
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
            block_out_channels=self.block_out_channels or default_channels(resolution // self.patch_size),
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

    data: ClassDataConfig = field(default_factory=ClassDataConfig)
    model: VAEConfig = field(default_factory=VAEConfig)

    description: ClassVar[str] = (
        "Train an energy-calibrated VAE on images: "
        "accelerate launch training/train_ecvae.py --train_data_dir my_images --output_dir my_model --resolution 32"
    )

    def resolved(self) -> Self:
        return super(ECVAEConfig, replace(self, model=self.model.resolved(self.data.resolution))).resolved()

    def check(self) -> None:
        super().check()
        if self.data.class_conditional and self.model.calibration in POSTERIOR_CALIBRATIONS:
            refuse("calibration", self.model.calibration, "none or energy with --class_conditional")
        patience = self.evaluation.early_stopping_patience
        if self.model.freeze_decoder and patience is not None:
            refuse("early_stopping_patience", patience, "left out with --freeze_decoder: samples do not change")


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
    # the one that suits a critic's opponent (docs/guides/flows.md).
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
