# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write a web page that runs a model in the browser: `ecvae page --help`.

The folder holds `index.html`, the model as ONNX files and `README.md`, which makes it a static Space.
"""

import argparse
from typing import TYPE_CHECKING

from ecvae_diffusers.atomic import is_free
from ecvae_diffusers.command import ArgumentParser, place
from ecvae_diffusers.commands import check_writable, load_pipeline, run_or_fail
from ecvae_diffusers.commands.export import read_card


if TYPE_CHECKING:
    import numpy as np


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=str(__doc__).split(":")[0] + ".")
    parser.add_argument("model", type=place, help="Pipeline: folder or Hub id.")
    parser.add_argument(
        "-o", "--output_dir", type=place, required=True, help="Folder to write to. Must be new or empty."
    )
    parser.add_argument(
        "--data",
        type=place,
        help="Training images: a folder of images, or a data set (folder or Hub id, split `train`). The page's directions and energies "
        "are those of up to 2000 of them. If not given, they are those of samples.",
    )
    parser.add_argument(
        "--vendor",
        action="store_true",
        help="Put onnxruntime-web into the folder, downloaded by npm. If not given, the page loads it from a CDN.",
    )
    args = parser.parse_args(argv)
    if not is_free(args.output_dir):
        parser.error(f"--output_dir must be a new or empty folder, but {args.output_dir!r} holds something.")
    return args


def read_images(source: str, channels: int, resolution: int) -> "np.ndarray":
    """Return images of a folder or data set, (N, H, W, C), uint8, drawn at random. Raises `ValueError` if it holds no two images."""
    from ecvae_diffusers.evaluation.pictures import decode_all, draw, open_source
    from ecvae_diffusers.page.page import MAX_IMAGES

    pictures = open_source("data", source, "train", None, None, None)
    images = decode_all(draw(pictures, MAX_IMAGES, 0, True), resolution, channels)
    if len(images) < 2:
        raise ValueError(f"--data must hold at least 2 images, but {source!r} holds {len(images)}.")
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def run(args: argparse.Namespace) -> None:
    check_writable("--output_dir", args.output_dir)

    from diffusers import DiffusionPipeline

    from ecvae_diffusers import ECVAEPipeline
    from ecvae_diffusers.page.page import write_page

    pipeline = load_pipeline(DiffusionPipeline, "model", args.model, "cpu")
    if not isinstance(pipeline, ECVAEPipeline):
        raise ValueError(f"model {args.model!r} must hold an ECVAEPipeline, but holds a {type(pipeline).__name__}.")
    config = pipeline.vae.config
    images = read_images(args.data, config.in_channels, config.sample_size) if args.data is not None else None
    write_page(pipeline, args.output_dir, images, args.vendor, read_card(args.model))
    print(f"{args.output_dir}: {args.model} as a web page. See it with: python -m http.server -d {args.output_dir}")


def main(argv: list[str] | None = None, prog: str = "ecvae page") -> None:
    """Run `ecvae page` with `argv`, or with the arguments of this process."""
    run_or_fail(run, parse_args(argv, prog), prog)


if __name__ == "__main__":
    main()
