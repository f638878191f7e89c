"""What the command line of `train_ecvae.py` has of its own."""

import argparse
import math

from ecvae_diffusers.posterior import FORMS, posterior_chain, stationary_constraint
from ecvae_diffusers.training.arguments.checks import check_auto, check_channels, check_integers, check_nonnegative
from ecvae_diffusers.training.arguments.common import CommandLine
from ecvae_diffusers.training.arguments.common import parse_args as parse_command_line
from ecvae_diffusers.training.run.places import place


# Those of `--calibration` that calibrate the encoder's posterior.
POSTERIOR_CALIBRATIONS = ("posterior", "both")

WHY_NO_BATCH_NORM = (
    "the chain holds its networks still, and batch normalization would make them others than those that are trained"
)


def add_model_arguments(model) -> None:
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=place,
        help="Go on from the weights of this pipeline or AutoencoderEC (folder or Hub id); the model arguments are its.",
    )
    model.add_argument(
        "--freeze_decoder",
        action="store_true",
        help="Train the encoder alone: the decoder of --pretrained_model_name_or_path stays as it is, and with it every sample. Its "
        "energy model is saved beside it again. With --calibration none or posterior.",
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


def add_posterior_arguments(calibration) -> None:
    calibration.add_argument(
        "--posterior_langevin_steps",
        type=int,
        default=1,
        help="Steps of the chain on an image's posterior that the encoder learns from.",
    )
    calibration.add_argument(
        "--posterior_drift_step",
        type=float,
        default=0.01,
        help="Its step a, on latents in the unit of q(z|x)'s standard deviation; its noise is sqrt(2 a).",
    )
    calibration.add_argument(
        "--posterior_conditioning_weight",
        type=float,
        default=0.0,
        help="Its pull towards its start; the last step has none.",
    )
    calibration.add_argument(
        "--posterior_constraint",
        choices=FORMS,
        default="log_prob",
        help="What is bounded: -log q of the chain's ends, or their squared distance from its start, which shrinks q: on digits "
        "worse than no calibration (docs/posterior.md).",
    )
    calibration.add_argument(
        "--posterior_tolerance",
        default="auto",
        help="The bound; a number, or 'auto': what the chain leaves of it where q is the posterior already.",
    )
    calibration.add_argument(
        "--initial_posterior_dual",
        type=float,
        help="The posterior's dual variable at the start. Its upper bound if not given.",
    )
    calibration.add_argument(
        "--max_posterior_dual",
        type=float,
        help="Its upper bound. If not given 1000 times --kl_weight, with which the rest of the loss grows, and a twentieth of that with "
        "squared_error, whose gradient is so much larger.",
    )
    calibration.add_argument(
        "--posterior_generated_images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Whether the encoder learns from as many images that the decoder makes, too: those of data are few.",
    )
    calibration.add_argument(
        "--posterior_decoder_langevin_steps",
        type=int,
        default=5,
        help="Further steps, from the end of that chain, to where the decoder learns from. 0: it learns from that end.",
    )
    calibration.add_argument("--posterior_decoder_drift_step", type=float, default=0.1, help="Their step a.")
    calibration.add_argument(
        "--posterior_decoder_weight",
        type=float,
        help="Weight of the squared error of images decoded from where the further steps end. 0: what the decoder learns from is the "
        "encoder's samples alone. 0.1 if not given, 0 with --freeze_decoder.",
    )


# lambda_z at --kl_weight 1: a step of 0.01 moves latents by a hundredth of what there is to move.
POSTERIOR_DUAL = {"log_prob": 1000.0, "squared_error": 50.0}


def fill_defaults(args: argparse.Namespace) -> None:
    """
    The weight of what the decoder learns from its further steps, since a decoder that is held still learns nothing, and lambda_z, which is
    a fixed weight by default: C is in nats, and the rest of the loss beta times that.
    """
    if args.max_posterior_dual is None:
        beta = args.kl_weight if 0 < args.kl_weight < math.inf else 1.0  # `check` says what is wrong with another
        args.max_posterior_dual = POSTERIOR_DUAL[args.posterior_constraint] * beta
    if args.initial_posterior_dual is None:
        args.initial_posterior_dual = args.max_posterior_dual
    if args.posterior_decoder_weight is None:
        args.posterior_decoder_weight = 0.0 if args.freeze_decoder else 0.1


def check(args: argparse.Namespace, refuse) -> None:
    check_integers(args, refuse, ("latent_channels", "layers_per_block"), least=1)
    check_integers(args, refuse, ("kl_warmup_steps",), least=0)
    check_nonnegative(args, refuse, ("kl_weight", "free_bits"))
    check_channels(args, refuse, "block_out_channels")
    if args.freeze_decoder and args.pretrained_model_name_or_path is None:
        refuse("pretrained_model_name_or_path", "given with --freeze_decoder, also where a run is gone on with")
    if args.freeze_decoder and args.calibration not in ("none", "posterior"):
        refuse("calibration", "none or posterior with --freeze_decoder: an energy model calibrates the decoder")
    if args.freeze_decoder and args.posterior_decoder_weight > 0:
        refuse("posterior_decoder_weight", "0 with --freeze_decoder")
    if args.freeze_decoder and args.early_stopping_patience is not None:
        refuse(
            "early_stopping_patience",
            "left out with --freeze_decoder: what decides is measured of samples, which stay as they are",
        )
    check_integers(args, refuse, ("posterior_langevin_steps",), least=1)
    check_integers(args, refuse, ("posterior_decoder_langevin_steps",), least=0)
    check_nonnegative(args, refuse, ("posterior_conditioning_weight", "posterior_decoder_weight"))
    if not 0 < args.max_posterior_dual < math.inf:
        refuse("max_posterior_dual", "a finite number above 0")
    for name in ("posterior_drift_step", "posterior_decoder_drift_step"):
        # Of a posterior that q has right the curvature in whitened latents is 1: chains of larger steps run away.
        if not 0 < getattr(args, name) < 2:
            refuse(name, "above 0 and below 2")
    a = args.posterior_drift_step
    # The pull leads to the start at most, and pull and drift together no further beyond the minimum than they began before it.
    if args.posterior_conditioning_weight > (most := min(1 / a, 2 / a - 1)):
        refuse("posterior_conditioning_weight", f"at most {most:g} at --posterior_drift_step {a:g}")
    if not 0 <= args.initial_posterior_dual <= args.max_posterior_dual:
        refuse("initial_posterior_dual", f"from 0 to --max_posterior_dual ({args.max_posterior_dual})")
    check_auto(args, refuse, "posterior_tolerance", "'auto' or a finite number above 0", math.ulp(0.0))
    if args.posterior_tolerance == "auto":
        chain = posterior_chain(
            args.posterior_langevin_steps, args.posterior_drift_step, args.posterior_conditioning_weight
        )
        # With a strong pull the chain ends nearer to its start than q is wide.
        if stationary_constraint(chain, args.latent_channels, args.posterior_constraint) <= 0:
            refuse("posterior_tolerance", "a number with so high a --posterior_conditioning_weight")
    if args.calibration in POSTERIOR_CALIBRATIONS and args.kl_weight == 0:
        refuse("kl_weight", f"above 0 with --calibration {args.calibration}: without a prior there is no posterior")
    if args.calibration in POSTERIOR_CALIBRATIONS and args.norm_type == "batch":
        refuse("norm_type", f"group with --calibration {args.calibration}: {WHY_NO_BATCH_NORM}")


SCRIPT = CommandLine(
    description="Train an energy-calibrated VAE on images, with Accelerate: "
    "accelerate launch training/train_ecvae.py --train_data_dir my_images --output_dir my_model --resolution 32",
    calibrations=("none", "energy", *POSTERIOR_CALIBRATIONS),
    calibration_help="What is calibrated: the decoder's samples by an energy model, the encoder's by the posterior itself, or "
    "both; 'none' trains the plain VAE, for comparison.",
    add_model_arguments=add_model_arguments,
    add_loss_arguments=lambda group: (add_loss_arguments(group), add_posterior_arguments(group)),
    check=check,
    fill_defaults=fill_defaults,
)


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    return parse_command_line(SCRIPT, argv, prog)
