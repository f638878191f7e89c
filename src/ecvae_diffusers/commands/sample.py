# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sample images from a trained model, into one picture or a folder: `ecvae sample --help`."""

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ecvae_diffusers.training.run.command import ArgumentParser, fail


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=__doc__.split(":")[0] + ".")
    parser.add_argument("model", type=os.path.expanduser, help="Pipeline: folder or Hub id.")
    parser.add_argument("-n", "--num_images", type=int, default=16, help="Default: 16.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the latents. Default: 0.")
    parser.add_argument(
        "-o", "--output", type=os.path.expanduser, default="samples.png",
        help="A name that ends in .png: one picture of all images. Any other: a folder, with a file per image. Default: samples.png.",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="Replace files that exist.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images computed together. Default: 64.")
    parser.add_argument(
        "--temperature", type=float, default=1.0,
        help="Standard deviation of the latents. Below 1, images are more typical and less varied. Default: 1.",
    )  # fmt: skip
    parser.add_argument("--device", help="Such as cpu or cuda:1. Default: a GPU if there is one.")
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}.")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature must be a number of at least 0, but is {args.temperature}.")
    if (suffix := Path(args.output).suffix.lower()) in (".jpg", ".jpeg", ".webp", ".gif", ".tiff", ".bmp"):
        parser.error(f"--output must be a .png or a folder, but is a {suffix} file.")
    args.files = output_files(args.output, args.num_images)
    existing = [str(path) for path in args.files if path.exists()]
    if existing and not args.overwrite:
        parser.error(f"--output {args.output!r}: {existing[0]!r} exists. Replace it with --overwrite.")
    return args


def output_files(output: str, num_images: int) -> list[Path]:
    """Return the one picture to write, or a file per image in a folder."""
    if output.lower().endswith(".png") and not os.path.isdir(output):
        return [Path(output)]
    digits = len(str(num_images - 1))
    return [Path(output) / f"{i:0{digits}d}.png" for i in range(num_images)]


def load_pipeline(
    loader: type["DiffusionPipeline"], argument: str, source: str, device: str | None
) -> "DiffusionPipeline":
    """
    Load a pipeline of a folder or Hub id, to a device of this machine; to its accelerator, or else the CPU, if none is given.

    Raises:
        ValueError: naming the command line's `argument`, if it can't be loaded, or nothing can be computed on the device.
    """
    import torch

    from ecvae_diffusers.training.run.command import device_name, why_missing
    from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS

    try:
        device = device_name(device or str(torch.accelerator.current_accelerator() or "cpu"))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--device {error}") from error
    if (reason := why_missing(source, "model")) is not None:
        raise ValueError(f"{argument} {source!r} can't be loaded: {reason}.")
    try:
        return loader.from_pretrained(source).to(device)
    except LOADING_ERRORS as error:
        raise ValueError(f"{argument} {source!r} can't be loaded: {error}") from error


def run(args: argparse.Namespace) -> None:
    import torch
    from diffusers import DiffusionPipeline
    from tqdm import tqdm

    from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline
    from ecvae_diffusers.training.run.pictures import image_grid, save_atomically

    pipeline = load_pipeline(DiffusionPipeline, "model", args.model, args.device)
    if not isinstance(pipeline, (ECVAEPipeline, ECFlowPipeline)):
        raise ValueError(
            f"model {args.model!r} must hold an ECVAEPipeline or an ECFlowPipeline, but holds a {type(pipeline).__name__}."
        )
    # All latents are drawn at once, so that images do not depend on the batch size.
    generator = torch.Generator().manual_seed(args.seed)
    latents = pipeline(args.num_images, generator, temperature=args.temperature, output_type="latent").images
    images: list[torch.Tensor] = []
    with tqdm(total=args.num_images, desc="Images", unit="image") as progress_bar:
        for batch in latents.split(args.batch_size):
            images += 2 * pipeline(latents=batch, output_type="pt").images.cpu() - 1
            progress_bar.update(len(batch))
    if len(args.files) == 1:
        # Nearly square.
        save_atomically(image_grid(torch.stack(images), math.ceil(math.sqrt(len(images)))), args.files[0])
    else:
        for image, path in zip(images, args.files):
            save_atomically(image_grid(image[None], 1), path)
    print(f"{args.output}: {args.num_images} image(s) of {args.model}.")


def main(argv: list[str] | None = None, prog: str = "ecvae sample") -> None:
    """Sample as a command line says: that of this process, or `argv`."""
    args = parse_args(argv, prog)
    try:
        run(args)
    except (ValueError, OSError, RuntimeError) as error:
        fail(f"{prog}: error: {error}")
    except KeyboardInterrupt:
        fail(f"{prog}: interrupted.")
