"""What is refused of a command line, before anything else is done."""

import argparse
import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ecvae_diffusers.training.arguments.common import CommandLine


# What --langevin_drift_step auto spreads over the chain: its K steps are of 1 / K at most.
TOTAL_DRIFT_STEP = 1.0
# Of a script whose schedule warms up by default.
DEFAULT_WARMUP_STEPS = 100


def largest_drift_step(args: argparse.Namespace) -> float:
    """a as training begins; with --langevin_drift_step auto also the most that it becomes."""
    if args.langevin_drift_step == "auto":
        return TOTAL_DRIFT_STEP / args.langevin_steps
    return args.langevin_drift_step


def check_integers(args: argparse.Namespace, refuse: Callable, names: tuple[str, ...], least: int) -> None:
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < least:
            refuse(name, f"at least {least}")


def check_nonnegative(args: argparse.Namespace, refuse: Callable, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            refuse(name, "a finite number of at least 0")


def check_auto(args: argparse.Namespace, refuse: Callable, name: str, allowed: str, least: float) -> None:
    """'auto', or a number, which the argument becomes."""
    if getattr(args, name) == "auto":
        return
    try:
        number = float(getattr(args, name))
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        refuse(name, allowed)
    setattr(args, name, number)


def check_channels(args: argparse.Namespace, refuse: Callable, name: str) -> None:
    """Channels a resolution, down to 4 px at most; 64, 128, 256, 256 and so on if not given."""
    levels, channels = int(math.log2(args.resolution)) - 1, getattr(args, name)
    if channels is None:
        setattr(args, name, [min(64 * 2**i, 256) for i in range(levels)])
    elif min(channels) < 1 or len(channels) > levels:
        refuse(name, f"1 to {levels} positive numbers at --resolution {args.resolution}")


def check_arguments(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    script: "CommandLine",
) -> None:
    """
    Fill in the defaults that depend on other arguments. Exits, with a message that names the argument, its value and
    what is allowed, at the first that is wrong.

    Args:
        script (`CommandLine`): What the script has of its own.
    """

    def refuse(name: str, allowed: str) -> None:
        parser.error(f"--{name} must be {allowed}, but is {getattr(args, name)}.")

    if args.output_dir is None:
        parser.error("--output_dir must be given.")
    script.fill_defaults(args)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("one of --dataset_name and --train_data_dir must be given, and not both.")
    if args.num_epochs is not None and args.max_train_steps is not None:
        parser.error("--num_epochs and --max_train_steps can't both be given.")
    if args.num_epochs is None and args.max_train_steps is None:
        args.max_train_steps = 10_000
    if not 8 <= args.resolution <= script.max_resolution or args.resolution & (args.resolution - 1):
        refuse("resolution", f"a power of two from 8 to {script.max_resolution}")
    if args.image_size is not None and args.image_size < args.resolution:
        refuse("image_size", f"at least --resolution ({args.resolution})")

    positive_integers = (
        "max_train_samples", "energy_num_scales", "langevin_steps", "train_batch_size", "num_epochs", "max_train_steps",
        "checkpointing_steps", "checkpoints_total_limit", "log_steps", "save_images_steps", "gradient_accumulation_steps",
        "shuffle_buffer_size", "evaluation_steps", "early_stopping_patience", "healthy_state_steps",
    )  # fmt: skip
    check_integers(args, refuse, positive_integers, least=1)
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = 0 if args.lr_scheduler == "constant" else DEFAULT_WARMUP_STEPS
    check_integers(args, refuse, ("dataloader_num_workers", "lr_warmup_steps", "max_rollbacks"), least=0)
    if not 0 <= args.seed < 2**32:
        refuse("seed", "from 0 to 4294967295")
    if args.healthy_states < 2:
        refuse("healthy_states", "at least 2: the newest may be sick already")
    if args.lr_warmup_steps > 0 and args.lr_scheduler == "constant":
        refuse("lr_warmup_steps", "0 with --lr_scheduler constant (there is constant_with_warmup)")
    # Neighbour measures compare each image with its 5 nearest.
    if args.evaluation_samples < 6:
        refuse("evaluation_samples", "at least 6")
    needed = {f"--report_to {name}": (name, name) for name in args.report_to or []}
    if args.use_8bit_adam:
        needed["--use_8bit_adam"] = ("bitsandbytes", "bitsandbytes")
    if args.evaluation_steps is not None:
        needed["--evaluation_steps"] = ("torchmetrics", "ecvae-diffusers[metrics]")
        if args.evaluation_features == "inception":
            needed["--evaluation_features inception"] = ("torch_fidelity", "torch-fidelity")
    for argument, (module, package) in needed.items():
        if importlib.util.find_spec(module) is None:
            parser.error(f"{argument} needs a package that is not installed: pip install '{package}'.")
    hub = [name for name in ("hub_model_id", "hub_private_repo", "hub_revision") if getattr(args, name) is not None]
    if hub and not args.push_to_hub:
        parser.error(f"--{hub[0]} needs --push_to_hub.")
    if args.early_stopping_patience is not None and args.evaluation_steps is None:
        parser.error("--early_stopping_patience needs --evaluation_steps.")
    unknown_channels = args.in_channels is None and not script.channels_of_model
    if args.streaming and (args.dataset_name is None or args.num_epochs is not None or unknown_channels):
        channels = "" if script.channels_of_model else ", --in_channels"
        parser.error(
            f"--streaming needs --dataset_name{channels} and --max_train_steps: it can't look ahead. See --no-streaming."
        )
    check_auto(args, refuse, "calibration_tolerance", "'auto' or a finite number above 0", math.ulp(0.0))
    check_auto(args, refuse, "langevin_drift_step", "'auto' or a finite number of at least 0", 0.0)
    if args.calibration_tolerance == "auto" and args.langevin_noise == args.drift_tolerance == 0:
        refuse("drift_tolerance", "above 0 where --langevin_noise is 0 and --calibration_tolerance auto")
    drift_step = largest_drift_step(args)
    if drift_step * args.conditioning_weight > 1:
        refuse("conditioning_weight", f"at most 1 / --langevin_drift_step ({1 / drift_step:g})")
    if args.langevin_drift_step == "auto" and args.drift_tolerance == 0:
        refuse("drift_tolerance", "above 0 with --langevin_drift_step auto")
    for name in ("learning_rate", "energy_learning_rate", "max_dual", "adam_epsilon"):
        if not 0 < getattr(args, name) < math.inf:
            refuse(name, "a finite number above 0")
    if args.max_grad_norm is not None and not 0 < args.max_grad_norm < math.inf:
        refuse("max_grad_norm", "a finite number above 0")
    nonnegative = (
        "langevin_noise", "conditioning_weight", "dual_learning_rate", "energy_regularization", "adam_weight_decay",
        "drift_tolerance", "energy_gradient_penalty",
    )  # fmt: skip
    check_nonnegative(args, refuse, nonnegative)
    for name in ("adam_beta1", "adam_beta2", "energy_adam_beta1", "energy_adam_beta2", "ema_max_decay"):
        if not 0 <= getattr(args, name) < 1:
            refuse(name, "at least 0 and below 1")
    if not 0 <= args.initial_dual <= args.max_dual:
        refuse("initial_dual", f"from 0 to --max_dual ({args.max_dual})")
    script.check(args, refuse)
    if args.energy_block_out_channels is None:
        args.energy_block_out_channels = getattr(args, "block_out_channels", None)
    check_channels(args, refuse, "energy_block_out_channels")
    if args.energy_num_scales > len(args.energy_block_out_channels):
        refuse("energy_num_scales", f"at most the number of resolutions ({len(args.energy_block_out_channels)})")
