# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sample images from a trained model into one picture or a folder: `ecvae sample --help`."""

import argparse
import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecvae_diffusers.command import ArgumentParser
from ecvae_diffusers.commands import LARGEST_SEED, check_writable, load_pipeline, number, read_label, run_or_fail


if TYPE_CHECKING:
    import numpy as np


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=str(__doc__).split(":")[0] + ".")
    parser.add_argument(
        "model",
        type=os.path.expanduser,
        help="Pipeline: a folder or a Hub id. With --backend onnx, a folder of `ecvae export`.",
    )
    parser.add_argument("-n", "--num_images", type=number(int, 1), default=16, help="Number of images. Default: 16.")
    parser.add_argument(
        "--seed", type=number(int, 0, LARGEST_SEED), default=0, help="Seed of the latents. Default: 0."
    )
    parser.add_argument(
        "-o", "--output", type=os.path.expanduser, default="samples.png",
        help="A PNG file for one picture of all images, magnified if they are small, or a folder for one file per image. Default: samples.png.",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="Replace existing files.")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="Images per pass. Default: 64.")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=1.0,
        help="Standard deviation of the latents. Below 1, images are more typical and less varied. Default: 1.",
    )  # fmt: skip
    parser.add_argument(
        "--oversample", type=number(int, 1), default=1,
        help="Draw this many images for each one, and keep the one of lowest energy. Default: 1.",
    )  # fmt: skip
    parser.add_argument(
        "--class_labels", nargs="+", metavar="CLASS",
        help="Names or numbers of classes, which the images take in turn. Default: drawn by their frequencies in "
        "the training data.",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("torch", "onnx"), default="torch",
        help="onnx runs without torch. The same seed gives different images with each backend. Default: torch.",
    )  # fmt: skip
    parser.add_argument(
        "--device", help="Device for --backend torch, such as cpu or cuda:1. Default: a GPU if there is one."
    )
    args = parser.parse_args(argv)
    if args.backend == "onnx" and args.device is not None:
        parser.error(
            f"--device must not be given with --backend onnx, which samples on the CPU, but is {args.device!r}."
        )
    if (suffix := Path(args.output).suffix.lower()) in (".jpg", ".jpeg", ".webp", ".gif", ".tiff", ".bmp"):
        parser.error(f"--output must be a .png or a folder, but is a {suffix} file.")
    if args.output.lower().endswith(".png") and not os.path.isdir(args.output):
        args.files = [Path(args.output)]
    else:
        digits = len(str(args.num_images - 1))
        args.files = [Path(args.output) / f"{i:0{digits}d}.png" for i in range(args.num_images)]
    existing = [str(path) for path in args.files if path.exists()]
    if existing and not args.overwrite:
        parser.error(f"--output {args.output!r}: {existing[0]!r} exists. Replace it with --overwrite.")
    return args


def sample(args: argparse.Namespace) -> "np.ndarray":
    """Return images (N, H, W, C), uint8, of a pipeline."""
    import torch
    from diffusers import DiffusionPipeline
    from tqdm import tqdm

    from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline
    from ecvae_diffusers.training.data.transforms import to_uint8

    pipeline = load_pipeline(DiffusionPipeline, "model", args.model, args.device)
    if not isinstance(pipeline, (ECVAEPipeline, ECFlowPipeline)):
        raise ValueError(
            f"model {args.model!r} must hold an ECVAEPipeline or an ECFlowPipeline, but holds a {type(pipeline).__name__}."
        )
    if args.oversample > 1 and not (isinstance(pipeline, ECVAEPipeline) and pipeline.energy_model is not None):
        raise ValueError(
            f"--oversample must be 1 without an ECVAEPipeline with an energy model, but is {args.oversample}."
        )
    # All latents are drawn at once, so that images do not depend on the batch size.
    generator = torch.Generator().manual_seed(args.seed)
    num_draws = args.num_images * args.oversample
    latents = pipeline(num_draws, generator, temperature=args.temperature, output_type="latent").images
    labels: torch.Tensor | None = None
    if isinstance(pipeline, ECVAEPipeline):
        given = args.class_labels or [None]
        asked_for = [
            read_label(label, pipeline.vae.config)
            for label in itertools.islice(itertools.cycle(given), args.num_images)
        ]
        if (labels := pipeline.draw_labels(asked_for, generator)) is not None:
            labels = labels.repeat_interleave(args.oversample)
    elif args.class_labels is not None:
        raise ValueError(f"--class_labels must be left out for an ECFlowPipeline, but is {args.class_labels}.")
    images: list[torch.Tensor] = []
    num_images = max(1, args.batch_size // args.oversample)  # per pass
    with tqdm(total=args.num_images, desc="Images", unit="image") as progress_bar:
        for i in range(0, num_draws, num_images * args.oversample):
            part = slice(i, i + num_images * args.oversample)
            own: dict[str, Any] = {} if labels is None else {"class_labels": labels[part]}
            batch = latents[part]
            drawn = 2 * pipeline(latents=batch, output_type="pt", **own).images - 1
            if args.oversample > 1:
                with torch.no_grad():
                    drawn = pipeline.keep_lowest(drawn, args.oversample, *own.values())
            images += drawn.cpu()
            progress_bar.update(len(drawn))
    return to_uint8(torch.stack(images)).permute(0, 2, 3, 1).numpy()


def sample_onnx(args: argparse.Namespace) -> "np.ndarray":
    """Return images (N, H, W, C), uint8, of a folder of `ecvae export`, without torch."""
    import numpy as np
    from tqdm import tqdm

    from ecvae_diffusers.onnx import OnnxECVAEPipeline

    try:
        pipeline = OnnxECVAEPipeline(args.model)
    except ValueError as error:
        raise ValueError(f"model {args.model!r} can't be loaded: {error}") from error
    generator, images = np.random.default_rng(args.seed), []
    given = [read_label(label, pipeline.config) for label in args.class_labels or [None]]
    # All at once, so that images do not depend on the batch size.
    asked_for = list(itertools.islice(itertools.cycle(given), args.num_images))
    labels = pipeline.draw_labels(asked_for, args.num_images, generator)
    with tqdm(total=args.num_images, desc="Images", unit="image") as progress_bar:
        for start in range(0, args.num_images, args.batch_size):
            batch_size = min(args.batch_size, args.num_images - start)
            own = None if labels is None else labels[start : start + batch_size]
            images.append(pipeline.sample(batch_size, generator, args.temperature, own, args.oversample))
            progress_bar.update(batch_size)
    return np.concatenate(images)


def run(args: argparse.Namespace) -> None:
    check_writable("--output", args.output)

    from ecvae_diffusers.grid import display_scale, lay_out, save_atomically

    images = sample_onnx(args) if args.backend == "onnx" else sample(args)
    if len(args.files) == 1:
        nearly_square = math.ceil(math.sqrt(len(images)))
        save_atomically(lay_out(images, nearly_square, display_scale(*images.shape[1:3])), args.files[0])
    else:
        for image, path in zip(images, args.files):
            save_atomically(lay_out(image[None], 1), path)
    print(f"{args.output}: {args.num_images} image(s) of {args.model}.")


def main(argv: list[str] | None = None, prog: str = "ecvae sample") -> None:
    """Run `ecvae sample` with `argv`, or with the arguments of this process."""
    run_or_fail(run, parse_args(argv, prog), prog)


if __name__ == "__main__":
    main()
