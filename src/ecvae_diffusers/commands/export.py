# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Export a model to ONNX, to run it without torch: `ecvae export --help`.

Writes `decoder.onnx`, `encoder.onnx`, `energy.onnx`, each also with weights in float16 (`decoder_fp16.onnx`), and `model.json`.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ecvae_diffusers.atomic import is_free
from ecvae_diffusers.command import ArgumentParser, place
from ecvae_diffusers.commands import check_writable, load_pipeline, run_or_fail


if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=str(__doc__).split(":")[0] + ".")
    parser.add_argument("model", type=place, help="Pipeline: folder or Hub id.")
    parser.add_argument(
        "-o", "--output_dir", type=place, required=True, help="Folder to write to. Must be new or empty."
    )
    args = parser.parse_args(argv)
    if not is_free(args.output_dir):
        parser.error(f"--output_dir must be a new or empty folder, but {args.output_dir!r} holds something.")
    return args


def read_card(source: str) -> "ModelCardData | None":
    """
    Return the data of a model's card; `None` if it has none.

    Raises:
        ValueError: if it can't be read.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from yaml import YAMLError

    try:
        path = Path(source) / "README.md" if os.path.isdir(source) else Path(hf_hub_download(source, "README.md"))
    except EntryNotFoundError:
        return None
    try:
        return ModelCard.load(path).data if path.is_file() else None
    except (ValueError, YAMLError) as error:
        raise ValueError(f"model {source!r}: its card README.md can't be read: {error}") from error


def run(args: argparse.Namespace) -> None:
    check_writable("--output_dir", args.output_dir)

    from diffusers import DiffusionPipeline

    from ecvae_diffusers import ECVAEPipeline
    from ecvae_diffusers.onnx.export import export_onnx

    pipeline = load_pipeline(DiffusionPipeline, "model", args.model, "cpu")
    if not isinstance(pipeline, ECVAEPipeline):
        raise ValueError(f"model {args.model!r} must hold an ECVAEPipeline, but holds a {type(pipeline).__name__}.")
    card = read_card(args.model)
    export_onnx(pipeline, args.output_dir, card)
    missing = ["energy model, so no energy.onnx"] if pipeline.energy_model is None else []
    missing += ["licence in its card, so none in model.json"] if card is None or card.license is None else []
    print(f"{args.output_dir}: {args.model} as ONNX.{''.join(f' It has no {what}.' for what in missing)}")


def main(argv: list[str] | None = None, prog: str = "ecvae export") -> None:
    """Run `ecvae export` with `argv`, or with the arguments of this process."""
    run_or_fail(run, parse_args(argv, prog), prog)


if __name__ == "__main__":
    main()
