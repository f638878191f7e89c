"""What the command line of `train_ecvae.py` has of its own."""

import argparse

from ecvae_training.argument_checks import check_channels, check_integers, check_nonnegative
from ecvae_training.arguments import CommandLine
from ecvae_training.arguments import parse_args as parse_command_line


def add_model_arguments(model) -> None:
    model.add_argument(
        "--pretrained_model_name_or_path",
        help="Go on from the weights of this pipeline or AutoencoderEC (folder or Hub id); the model arguments are its.",
    )
    model.add_argument("--latent_channels", type=int, default=128, help="Dimension of the latent vector.")
    model.add_argument(
        "--block_out_channels",
        type=int,
        nargs="+",
        help="Channels of the autoencoder at each resolution, from --resolution down by halves. "
        "64 128 256 256 ..., down to 4 px, if not given.",
    )
    model.add_argument("--layers_per_block", type=int, default=1, help="Residual blocks at each resolution.")
    model.add_argument("--norm_type", choices=("group", "batch"), default="group", help="Normalization.")


def add_loss_arguments(calibration) -> None:
    calibration.add_argument(
        "--kl_weight",
        type=float,
        default=1.0,
        help="beta: weight of the KL divergence; errors are summed over an image.",
    )
    calibration.add_argument(
        "--kl_warmup_steps",
        type=int,
        default=0,
        help="Steps over which beta rises from 0, against posterior collapse.",
    )
    calibration.add_argument(
        "--free_bits",
        type=float,
        default=0.0,
        help="Nats that each latent dimension may carry before its KL divergence counts, against posterior collapse.",
    )


def check(args: argparse.Namespace, refuse) -> None:
    check_integers(args, refuse, ("latent_channels", "layers_per_block"), least=1)
    check_integers(args, refuse, ("kl_warmup_steps",), least=0)
    check_nonnegative(args, refuse, ("kl_weight", "free_bits"))
    check_channels(args, refuse, "block_out_channels")


SCRIPT = CommandLine(
    description="Train an energy-calibrated VAE on images, with Accelerate: "
    "accelerate launch training/train_ecvae.py --train_data_dir my_images --output_dir my_model --resolution 32",
    calibrations=("none", "energy"),
    calibration_help="'none' trains the plain VAE, for comparison.",
    add_model_arguments=add_model_arguments,
    add_loss_arguments=add_loss_arguments,
    check=check,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_command_line(SCRIPT, argv)
