"""
The command lines of the training scripts: what they have in common, group by group. `argument_checks.py` holds what is
refused; a script's own arguments are in a file each.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml
from diffusers.optimization import SchedulerType

from ecvae_diffusers.training.arguments.checks import check_arguments
from ecvae_diffusers.training.run.checkpoints import arguments_of_run
from ecvae_diffusers.training.run.last_line import ArgumentParser
from ecvae_diffusers.training.run.places import place


TRACKERS = ("tensorboard", "trackio", "wandb")
EVALUATION_METRICS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class CommandLine:
    """
    What a training script has of its own.

    Args:
        description (`str`): What it does, with an example.
        calibrations (`tuple[str]`): What `--calibration` can be, and in `calibration_help` what it means.
        add_model_arguments (`Callable`): Adds those of the generator to the group "model".
        add_loss_arguments (`Callable`): Adds those of its own loss to the group "calibration".
        check (`Callable`): Checks them, as `check(args, refuse)`: `refuse(name, allowed)` ends the script.
        channels_of_model (`bool`): Whether images come in the channels of a model that is there already.
        max_resolution (`int`): The largest `--resolution`, a power of two.
        defaults (`dict`): Its own defaults of arguments that all have.
        fill_defaults (`Callable`): Sets, as `fill_defaults(args)`, those of them that depend on other arguments.
    """

    description: str
    calibrations: tuple[str, ...]
    calibration_help: str
    add_model_arguments: Callable
    add_loss_arguments: Callable
    check: Callable
    channels_of_model: bool = False
    max_resolution: int = 256
    defaults: dict = field(default_factory=dict)
    fill_defaults: Callable = lambda args: None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """With the defaults, but for those that are none or depend on other arguments."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser(script: CommandLine, prog: str | None = None) -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=prog, description=script.description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--config",
        type=place,
        help="YAML file of arguments, as those in training/configs; what the command line gives goes before it.",
    )
    add_data_arguments(parser.add_argument_group("data"), script.max_resolution)
    model = parser.add_argument_group("model")
    script.add_model_arguments(model)
    add_energy_model_arguments(model)
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", choices=script.calibrations, default="energy", help=script.calibration_help
    )
    script.add_loss_arguments(calibration)
    add_calibration_arguments(calibration)
    add_training_arguments(parser.add_argument_group("training"))
    add_saving_arguments(parser.add_argument_group("saving and logging"))
    add_evaluation_arguments(parser.add_argument_group("evaluation"))
    add_guard_arguments(parser.add_argument_group("guard against divergence"))
    add_hub_arguments(parser.add_argument_group("Hub (the token is that of `hf auth login`, or HF_TOKEN)"))
    parser.set_defaults(**script.defaults)
    return parser


def add_data_arguments(data, max_resolution: int) -> None:
    data.add_argument("--dataset_name", type=place, help="Hub id or local folder of a data set that `datasets` loads.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    data.add_argument(
        "--train_data_dir", type=place, help="Folder of images (with sub-folders or without), instead of a data set."
    )
    data.add_argument("--image_column", help="Column with the images. The only column of images if not given.")
    data.add_argument("--cache_dir", type=place, help="Where `datasets` keeps what it downloads.")
    data.add_argument("--max_train_samples", type=int, help="Train on the first so many images only.")
    data.add_argument(
        "--resolution",
        type=int,
        default=32,
        help=f"Images are resized to this (shorter side) and center-cropped: a power of two from 8 to {max_resolution}.",
    )
    data.add_argument(
        "--image_size",
        type=int,
        help="Resize images (shorter side) to this instead, and train on random crops of --resolution. Measured, and looked "
        "at, are their centers.",
    )
    data.add_argument(
        "--in_channels",
        type=int,
        choices=(1, 3, 4),
        help="1 gray, 3 RGB, 4 RGBA. Gray if every image is, else RGB, if not given.",
    )
    data.add_argument(
        "--skip_broken_images",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Leave out images that can't be read, and say which.",
    )
    data.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Read --dataset_name while training instead of before: for what doesn't fit on the disk. Needs "
        "--max_train_steps and, but for a decoder's calibration, --in_channels. Resumed, its shuffle buffer is filled anew: not bit for bit.",
    )
    data.add_argument(
        "--shuffle_buffer_size", type=int, default=10_000, help="Images that --streaming draws each next one from."
    )
    data.add_argument(
        "--random_flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Flip images left to right at random.",
    )
    data.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that load data; 0: the main one."
    )


def add_energy_model_arguments(model) -> None:
    model.add_argument(
        "--energy_block_out_channels",
        type=int,
        nargs="+",
        help="Channels of the energy model at each resolution, from --resolution down by halves. Those of the autoencoder if not "
        "given, or, where that has none, 64 128 256 256 ..., down to 4 px.",
    )
    model.add_argument("--energy_num_scales", type=int, default=1, help="Image scales that the energy model sees.")
    model.add_argument(
        "--energy_act_fn",
        choices=("leaky_relu", "silu", "gelu", "relu", "mish"),
        default="leaky_relu",
        help="Activation of the energy model.",
    )
    model.add_argument(
        "--energy_spectral_norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Spectral normalization of the energy model.",
    )


def add_calibration_arguments(calibration) -> None:
    calibration.add_argument("--langevin_steps", type=int, default=5, help="K: steps of the chain.")
    calibration.add_argument(
        "--num_chains",
        type=int,
        choices=(1, 2),
        default=1,
        help="1: the energy model learns against the same chain's ends as what is calibrated; 2: against those of a second "
        "one from new samples, as published, at up to twice the cost of an iteration.",
    )
    calibration.add_argument(
        "--langevin_drift_step",
        default="auto",
        help="a: step on the energy gradient; a number, or 'auto': 1 / --langevin_steps, and less while the chain's drift "
        "exceeds --drift_tolerance.",
    )
    calibration.add_argument("--langevin_noise", type=float, default=1e-3, help="b: noise of each step.")
    calibration.add_argument(
        "--conditioning_weight", type=float, default=0.0, help="w: pull of the chain towards its start."
    )
    calibration.add_argument(
        "--calibration_tolerance",
        default="auto",
        help="epsilon: bound on the squared distance that the chain moves an image, summed over it; a number or 'auto'.",
    )
    calibration.add_argument(
        "--drift_tolerance",
        type=float,
        help="Root-mean-square drift per pixel, in the unit of images in [-1, 1], that --calibration_tolerance auto allows "
        "beyond the noise, and --langevin_drift_step auto does not exceed. If not given, 0.1184 over the root of the number of "
        "pixels times channels: a drift of the same length at every size.",
    )
    calibration.add_argument(
        "--langevin_dtype",
        choices=("fp32", "bf16", "fp16"),
        help="Precision of the energy model in the chain, whose state is always fp32. That of training if not given.",
    )
    calibration.add_argument("--dual_learning_rate", type=float, default=0.1, help="eta: rate of the dual variable.")
    calibration.add_argument(
        "--relative_dual_step",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Step on the violation C / epsilon - 1 instead of the published C - epsilon.",
    )
    calibration.add_argument("--initial_dual", type=float, default=30.0, help="lambda at the start.")
    calibration.add_argument("--max_dual", type=float, default=100.0, help="Upper bound of lambda.")
    calibration.add_argument(
        "--energy_regularization",
        type=float,
        default=0.1,
        help="alpha: weight of the mean squared energies, 0 for none.",
    )
    calibration.add_argument(
        "--energy_gradient_penalty",
        type=float,
        default=0.0,
        help="gamma: weight of half the mean squared norm of the energy's gradient at the data (R1), 0 for none.",
    )


def add_training_arguments(training) -> None:
    training.add_argument("--output_dir", type=place, help="Becomes the pipeline's folder.")
    training.add_argument(
        "--overwrite_output_dir",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Replace the finished run in --output_dir. Only a folder that this script wrote is ever replaced.",
    )
    training.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and noise.")
    training.add_argument("--train_batch_size", type=int, default=64, help="Images a step and process.")
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Batches a step, of --train_batch_size images each."
    )
    training.add_argument("--max_grad_norm", type=float, help="Clip the gradient of each network to this norm.")
    training.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Compute activations again in backward: less memory.",
    )
    training.add_argument("--num_epochs", type=int, help="Passes over the data, instead of --max_train_steps.")
    training.add_argument(
        "--max_train_steps", type=int, help="Number of iterations. 10000 if --num_epochs is not given."
    )
    training.add_argument(
        "--learning_rate", type=float, default=5e-4, help="Learning rate of what is trained beside the energy model."
    )
    training.add_argument(
        "--energy_learning_rate", type=float, default=5e-4, help="Learning rate of the energy model."
    )
    training.add_argument(
        "--lr_scheduler",
        # piecewise_constant needs rules that have no argument.
        choices=sorted(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT),
        default="constant",
        help="diffusers' schedule for both rates: constant, constant_with_warmup, linear, cosine, ... With one that "
        "depends on the number of steps, a run cut in two differs from a run in one unless --max_train_steps is equal.",
    )
    training.add_argument("--lr_warmup_steps", type=int, default=0, help="Warm-up steps of the schedule.")
    for name, what in (("adam", "what is trained beside the energy model"), ("energy_adam", "the energy model")):
        training.add_argument(f"--{name}_beta1", type=float, default=0.0, help=f"Of the Adam of {what}.")
        training.add_argument(f"--{name}_beta2", type=float, default=0.9, help=f"Of the Adam of {what}.")
    training.add_argument("--adam_epsilon", type=float, default=1e-8, help="Of both Adam optimizers.")
    training.add_argument("--adam_weight_decay", type=float, default=0.0, help="Of both optimizers (AdamW).")
    training.add_argument(
        "--use_8bit_adam",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Keep the moments of both Adams in 8 bits: less memory. Needs bitsandbytes.",
    )
    training.add_argument(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Save the moving average of the weights.",
    )
    training.add_argument(
        "--ema_max_decay",
        type=float,
        default=0.999,
        help="Decay a step of the moving average, reached after a warm-up.",
    )
    training.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="Accelerate's setting if not given."
    )


def add_saving_arguments(saving) -> None:
    saving.add_argument("--checkpointing_steps", type=int, default=500, help="Save a checkpoint every so many steps.")
    saving.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest so many checkpoints, not all.")
    saving.add_argument(
        "--resume_from_checkpoint",
        type=place,
        help="'latest', or the newest checkpoint of --output_dir by name. Without a checkpoint, starts at 0.",
    )
    saving.add_argument("--log_steps", type=int, default=10, help="Write metrics.jsonl every so many steps.")
    saving.add_argument(
        "--save_images_steps",
        type=int,
        default=500,
        help="Write samples, reconstructions, the chain and the energies' distribution every so many steps; the first pictures "
        "come at steps 1, 10 and 100.",
    )
    saving.add_argument(
        "--report_to",
        nargs="+",
        choices=TRACKERS,
        help="Send what metrics.jsonl gets to these trackers too, through Accelerate.",
    )
    saving.add_argument("--tracker_project_name", default="ecvae", help="The project's name in the tracker.")


def add_evaluation_arguments(evaluation) -> None:
    evaluation.add_argument(
        "--evaluation_steps",
        type=int,
        help="Measure samples against training images every so many steps. Needs the extra `metrics`.",
    )
    evaluation.add_argument(
        "--evaluation_features",
        type=place,
        default="lite0",
        help="Features to measure over: 'lite0', 'digits', 'inception', or a vision model of `transformers` (folder or Hub id).",
    )
    evaluation.add_argument(
        "--evaluation_samples", type=int, default=2048, help="Samples, and training images, to measure with."
    )
    evaluation.add_argument(
        "--early_stopping_patience",
        type=int,
        help="Stop after so many evaluations without a better --early_stopping_metric, and save the best.",
    )
    evaluation.add_argument(
        "--early_stopping_metric",
        choices=EVALUATION_METRICS,
        default="frechet_distance",
        help="What decides which evaluation is the best one: distances are to fall, the others to rise.",
    )


def add_guard_arguments(guard) -> None:
    guard.add_argument(
        "--divergence_guard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="At a sign of divergence go back to a healthy state, with a lower rate of the energy model.",
    )
    guard.add_argument(
        "--max_rollbacks",
        type=int,
        default=10,
        help="Times to go back in a run; the next alarm stops it, with a healthy state saved.",
    )
    guard.add_argument(
        "--healthy_state_steps", type=int, default=100, help="Keep a state to go back to every so many steps."
    )
    guard.add_argument(
        "--healthy_states",
        type=int,
        default=3,
        help="States kept, in main memory of each process, each the size of a checkpoint.",
    )


# The command line may give the one where the config file gives the other.
EITHER_OR = (("dataset_name", "train_data_dir"), ("num_epochs", "max_train_steps"))


def add_hub_arguments(hub) -> None:
    hub.add_argument("--push_to_hub", action="store_true", help="Upload the pipeline when training is done.")
    hub.add_argument("--hub_model_id", help="Repository: user/name. The output folder's name if not given.")
    hub.add_argument(
        "--hub_private_repo", action=argparse.BooleanOptionalAction, help="Whether a new repository is private."
    )
    hub.add_argument("--hub_revision", help="Branch, made if it is not there. main if not given.")


def config_arguments(parser: argparse.ArgumentParser, path: str, argv: list[str]) -> list[str]:
    """A config file's entries as command line arguments: so the same parser checks their types and choices."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path!r} can't be read: {error}")
    if not isinstance(entries, dict):
        parser.error(f"--config {path!r} must hold `argument: value` lines.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = [name for name in entries if name not in actions]
    if unknown:
        parser.error(f"--config {path!r} holds what is no argument: {', '.join(map(str, unknown))}.")
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions)))
    for pair in EITHER_OR:
        if any(getattr(given, name) is not None for name in pair):
            entries = {name: value for name, value in entries.items() if name not in pair}
    arguments = []
    for name, value in entries.items():
        # YAML reads a bare `no` as false.
        if value is False and "no" in (actions[name].choices or ()):
            value = "no"
        if value is None:
            continue
        if actions[name].nargs == 0:
            if not isinstance(value, bool):
                parser.error(f"--config {path!r}: {name} must be true or false, but is {value!r}.")
            if value:
                arguments.append(f"--{name}")
            elif f"--no-{name}" in actions[name].option_strings:
                arguments.append(f"--no-{name}")
        elif actions[name].nargs == "+":
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, (bool, list, dict)):
            parser.error(f"--config {path!r}: {name} must be one value, but is {value!r}.")
        else:
            # In one piece, so that a value may start with a dash.
            arguments.append(f"--{name}={value}")
    return arguments


def parse_args(script: CommandLine, argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """
    Parse and check a script's command line. Exits with a message that names the argument, its value and what is allowed.
    """
    parser = build_parser(script, prog)
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    args = parser.parse_args(argv)
    if args.config is not None:
        argv = [*config_arguments(parser, args.config, argv), *argv]
        args = parser.parse_args(argv)
    if args.resume_from_checkpoint is not None and args.output_dir is not None:
        # What is not given is as the run has it, whatever the defaults are by now.
        known = {action.dest for action in parser._actions}
        own = arguments_of_run(args.output_dir)
        parser.set_defaults(**{name: value for name, value in own.items() if name in known})
        args = parser.parse_args(argv)
    check_arguments(parser, args, script)
    return args
