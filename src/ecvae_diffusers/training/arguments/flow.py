"""What the command line of `train_flow.py` has of its own."""

import argparse
import math

from ecvae_diffusers.training.arguments.checks import check_integers
from ecvae_diffusers.training.arguments.common import CommandLine
from ecvae_diffusers.training.arguments.common import parse_args as parse_command_line
from ecvae_diffusers.training.run.places import place


def add_model_arguments(model) -> None:
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=place,
        help="Go on from the weights of this pipeline or FlowEC (folder or Hub id); the model arguments are its. --learning_rate "
        "is then 5e-4 if it is not given, 3e-3 of a new flow.",
    )
    model.add_argument("--num_levels", type=int, default=3, help="Scales of the flow, each of half the size.")
    model.add_argument("--steps_per_level", type=int, default=8, help="Steps of the flow at each scale.")
    model.add_argument("--hidden_channels", type=int, default=128, help="Channels of the couplings' networks.")


def add_loss_arguments(calibration) -> None:
    """None: the negative log-likelihood in nats has no weight."""


def fill_defaults(args: argparse.Namespace) -> None:
    """
    Set the learning rate: the high one at which likelihood is learned in good time, or the energy model's own where a flow that
    has learned it is calibrated. A flow that is calibrated at the high one from its first step may find patterns that the energy
    model does not see yet (docs/flows.md).
    """
    if args.learning_rate is None:
        args.learning_rate = 3e-3 if args.pretrained_model_name_or_path is None else 5e-4


def check(args: argparse.Namespace, refuse) -> None:
    check_integers(args, refuse, ("num_levels", "steps_per_level", "hidden_channels"), least=1)
    if args.num_levels > math.log2(args.resolution):
        refuse("num_levels", f"at most {int(math.log2(args.resolution))} at --resolution {args.resolution}")


SCRIPT = CommandLine(
    description="Train an energy-calibrated normalizing flow on images, with Accelerate. On likelihood first: accelerate launch "
    "training/train_flow.py --calibration none --train_data_dir my_images --output_dir plain_flow --resolution 32; then "
    "calibrated: accelerate launch training/train_flow.py --pretrained_model_name_or_path plain_flow --train_data_dir my_images "
    "--output_dir my_flow --resolution 32",
    calibrations=("none", "energy"),
    calibration_help="'none' trains on likelihood alone: what calibration is to go on from, see --pretrained_model_name_or_path.",
    add_model_arguments=add_model_arguments,
    add_loss_arguments=add_loss_arguments,
    check=check,
    # Likelihood has a noisy gradient with rare, enormous values: an Adam that averages and clips learns several times faster than
    # the one that suits a critic's opponent (docs/flows.md).
    defaults={
        "learning_rate": None,  # see fill_defaults
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": None,  # 100, of a schedule that warms up
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "max_grad_norm": 100.0,
    },
    fill_defaults=fill_defaults,
)


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    return parse_command_line(SCRIPT, argv, prog)
