"""What the command line of `calibrate_decoder.py` has of its own."""

import argparse

from ecvae_diffusers.training.arguments.checks import check_nonnegative
from ecvae_diffusers.training.arguments.common import CommandLine
from ecvae_diffusers.training.arguments.common import parse_args as parse_command_line
from ecvae_diffusers.training.run.places import place


def add_model_arguments(model) -> None:
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=place,
        help="The autoencoder, an AutoencoderKL, AutoencoderTiny, VQModel or another of diffusers: folder or Hub id. Where a run "
        "has saved its energy model in that folder, this one goes on from it if it is for such images; its arguments are its.",
    )
    model.add_argument("--subfolder", help="Where it lies in a pipeline: vae.")
    model.add_argument("--revision", help="Branch, tag or commit of the Hub id.")
    model.add_argument("--variant", help="Of its weights, such as fp16. What is trained and saved is in float32.")


def add_loss_arguments(calibration) -> None:
    calibration.add_argument(
        "--reconstruction_weight",
        type=float,
        default=1.0,
        help="Weight of the squared error of reconstructions, summed over an image: more of it keeps PSNR, less the chain's "
        "say.",
    )
    calibration.add_argument(
        "--latent_noise",
        type=float,
        default=0.0,
        help="Calibrate decodings of encodings with noise on them, as a latent diffusion model hands over: its standard "
        "deviation over that of the latents. 0: those of the encodings themselves.",
    )
    calibration.add_argument(
        "--latents_file",
        type=place,
        help="Calibrate decodings of these latents: a safetensors file with a tensor `latents` (N, C, h, w), as a sampler of "
        "yours made them.",
    )


def check(args: argparse.Namespace, refuse) -> None:
    if args.pretrained_model_name_or_path is None:
        refuse("pretrained_model_name_or_path", "given: the autoencoder whose decoder is to be calibrated")
    check_nonnegative(args, refuse, ("reconstruction_weight", "latent_noise"))
    if args.reconstruction_weight == 0 and args.calibration == "none":
        refuse("reconstruction_weight", "above 0 with --calibration none: nothing would be trained")
    if args.latents_file is not None and args.latent_noise > 0:
        refuse("latent_noise", "0 with --latents_file")


SCRIPT = CommandLine(
    description="Calibrate the decoder of any autoencoder of diffusers on images, with Accelerate: "
    "accelerate launch training/calibrate_decoder.py --pretrained_model_name_or_path my_vae --train_data_dir my_images "
    "--output_dir my_sharper_vae --resolution 64",
    calibrations=("none", "energy"),
    calibration_help="'none' trains the decoder on with its squared error alone, for comparison.",
    add_model_arguments=add_model_arguments,
    add_loss_arguments=add_loss_arguments,
    check=check,
    channels_of_model=True,
    max_resolution=1024,
    defaults={"learning_rate": 1e-4},
)


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    return parse_command_line(SCRIPT, argv, prog)
