"""The command line of `train_ecvae.py`, and its checks: everything that can be refused is refused before data is read."""

import argparse
import math

from diffusers.optimization import SchedulerType


CALIBRATIONS = ("none", "energy")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train an energy-calibrated VAE on images, with Accelerate: "
        "accelerate launch training/train_ecvae.py --train_data_dir my_images --output_dir my_model --resolution 32",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id or local folder of a data set that `datasets` loads.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set, where it has several.")
    data.add_argument(
        "--train_data_dir", help="Folder of images (with sub-folders or without), instead of a data set."
    )
    data.add_argument("--image_column", help="Column with the images. The only column of images if not given.")
    data.add_argument("--cache_dir", help="Where `datasets` keeps what it downloads.")
    data.add_argument("--max_train_samples", type=int, help="Train on the first so many images only.")
    data.add_argument(
        "--resolution",
        type=int,
        default=32,
        help="Images are resized to this (shorter side) and center-cropped: a power of two from 8 to 256.",
    )
    data.add_argument(
        "--in_channels",
        type=int,
        choices=(1, 3, 4),
        help="1 gray, 3 RGB, 4 RGBA. Gray if every image is, else RGB, if not given.",
    )
    data.add_argument(
        "--skip_broken_images", action="store_true", help="Leave out images that can't be read, and say which."
    )
    data.add_argument("--random_flip", action="store_true", help="Flip images left to right at random.")
    data.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that load data; 0: the main one."
    )

    model = parser.add_argument_group("model")
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
    model.add_argument(
        "--energy_block_out_channels",
        type=int,
        nargs="+",
        help="Channels of the energy model at each resolution. Those of the autoencoder if not given.",
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

    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", choices=CALIBRATIONS, default="energy", help="'none' trains the plain VAE, for comparison."
    )
    calibration.add_argument(
        "--kl_weight",
        type=float,
        default=1.0,
        help="beta: weight of the KL divergence; errors are summed over an image.",
    )
    calibration.add_argument("--langevin_steps", type=int, default=5, help="K: steps of the chain.")
    calibration.add_argument("--langevin_drift_step", type=float, default=0.2, help="a: step on the energy gradient.")
    calibration.add_argument("--langevin_noise", type=float, default=1e-3, help="b: noise of each step.")
    calibration.add_argument(
        "--conditioning_weight", type=float, default=0.0, help="w: pull of the chain towards its start."
    )
    calibration.add_argument(
        "--calibration_tolerance",
        default="auto",
        help="epsilon: bound on the squared distance that the chain moves an image, summed over it; a number or 'auto'.",
    )
    calibration.add_argument("--dual_learning_rate", type=float, default=0.1, help="eta: rate of the dual variable.")
    calibration.add_argument("--initial_dual", type=float, default=30.0, help="lambda at the start.")
    calibration.add_argument("--max_dual", type=float, default=100.0, help="Upper bound of lambda.")
    calibration.add_argument(
        "--energy_regularization", type=float, default=0.0, help="alpha: weight of the mean squared energies."
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", required=True, help="Becomes the pipeline's folder.")
    training.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Replace the finished run in --output_dir. Only a folder that this script wrote is ever replaced.",
    )
    training.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and noise.")
    training.add_argument("--train_batch_size", type=int, default=64, help="Images a step and process.")
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Batches a step, of --train_batch_size images each."
    )
    training.add_argument("--max_grad_norm", type=float, help="Clip the gradient of each network to this norm.")
    training.add_argument(
        "--gradient_checkpointing", action="store_true", help="Compute activations again in backward: less memory."
    )
    training.add_argument("--num_epochs", type=int, help="Passes over the data, instead of --max_train_steps.")
    training.add_argument(
        "--max_train_steps", type=int, help="Number of iterations. 10000 if --num_epochs is not given."
    )
    training.add_argument("--learning_rate", type=float, default=5e-4, help="Learning rate of the autoencoder.")
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
    training.add_argument("--adam_beta1", type=float, default=0.0, help="Of both Adam optimizers.")
    training.add_argument("--adam_beta2", type=float, default=0.9, help="Of both Adam optimizers.")
    training.add_argument("--adam_epsilon", type=float, default=1e-8, help="Of both Adam optimizers.")
    training.add_argument("--adam_weight_decay", type=float, default=0.0, help="Of both optimizers (AdamW).")
    training.add_argument(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Save the moving average of the autoencoder's weights.",
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

    saving = parser.add_argument_group("saving")
    saving.add_argument("--checkpointing_steps", type=int, default=500, help="Save a checkpoint every so many steps.")
    saving.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest so many checkpoints, not all.")
    saving.add_argument(
        "--resume_from_checkpoint",
        help="'latest', or the newest checkpoint of --output_dir by name. Without a checkpoint, starts at 0.",
    )
    saving.add_argument("--log_steps", type=int, default=10, help="Write metrics.jsonl every so many steps.")
    saving.add_argument("--save_images_steps", type=int, default=500, help="Write a sample grid every so many steps.")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """
    Parse and check the command line. Exits with a message that names the argument, its value and what is allowed.
    """
    parser = build_parser()
    args = parser.parse_args(argv)

    def refuse(name: str, allowed: str) -> None:
        parser.error(f"--{name} must be {allowed}, but is {getattr(args, name)}.")

    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("one of --dataset_name and --train_data_dir must be given, and not both.")
    if args.num_epochs is not None and args.max_train_steps is not None:
        parser.error("--num_epochs and --max_train_steps can't both be given.")
    if args.num_epochs is None and args.max_train_steps is None:
        args.max_train_steps = 10_000
    if args.resolution not in (8, 16, 32, 64, 128, 256):
        refuse("resolution", "a power of two from 8 to 256")

    positive_integers = (
        "max_train_samples", "latent_channels", "layers_per_block", "energy_num_scales", "langevin_steps",
        "train_batch_size", "num_epochs", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
        "log_steps", "save_images_steps", "gradient_accumulation_steps",
    )  # fmt: skip
    for name in positive_integers:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            refuse(name, "at least 1")
    for name in ("dataloader_num_workers", "lr_warmup_steps"):
        if getattr(args, name) < 0:
            refuse(name, "at least 0")
    if not 0 <= args.seed < 2**32:
        refuse("seed", "from 0 to 4294967295")
    if args.langevin_drift_step * args.conditioning_weight > 1:
        refuse("conditioning_weight", f"at most 1 / --langevin_drift_step ({1 / args.langevin_drift_step:g})")
    for name in ("learning_rate", "energy_learning_rate", "max_dual", "adam_epsilon"):
        if not 0 < getattr(args, name) < math.inf:
            refuse(name, "a finite number above 0")
    if args.max_grad_norm is not None and not 0 < args.max_grad_norm < math.inf:
        refuse("max_grad_norm", "a finite number above 0")
    nonnegative = (
        "kl_weight", "langevin_drift_step", "langevin_noise", "conditioning_weight", "dual_learning_rate",
        "energy_regularization", "adam_weight_decay",
    )  # fmt: skip
    for name in nonnegative:
        if not 0 <= getattr(args, name) < math.inf:
            refuse(name, "a finite number of at least 0")
    for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
        if not 0 <= getattr(args, name) < 1:
            refuse(name, "at least 0 and below 1")
    if not 0 <= args.initial_dual <= args.max_dual:
        refuse("initial_dual", f"from 0 to --max_dual ({args.max_dual})")
    if args.calibration_tolerance != "auto":
        try:
            tolerance = float(args.calibration_tolerance)
        except ValueError:
            tolerance = math.nan
        if not 0 < tolerance < math.inf:
            refuse("calibration_tolerance", "'auto' or a finite number above 0")
        args.calibration_tolerance = tolerance
    levels = int(math.log2(args.resolution)) - 1
    for name in ("block_out_channels", "energy_block_out_channels"):
        channels = getattr(args, name)
        if channels is not None and (min(channels) < 1 or len(channels) > levels):
            refuse(name, f"1 to {levels} positive numbers at --resolution {args.resolution}")
    if args.block_out_channels is None:
        args.block_out_channels = [min(64 * 2**i, 256) for i in range(levels)]
    if args.energy_block_out_channels is None:
        args.energy_block_out_channels = args.block_out_channels
    if args.energy_num_scales > len(args.energy_block_out_channels):
        refuse("energy_num_scales", f"at most the number of resolutions ({len(args.energy_block_out_channels)})")
    return args
