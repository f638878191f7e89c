# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure when an image is anomalous for a model: `ecvae calibrate-threshold --help`.

Writes `anomaly_threshold` into the model's `model_index.json`: `ECVAEPipeline.anomaly(...).is_anomalous` uses it.
"""

import argparse
import os
from pathlib import Path

from ecvae_diffusers.command import ArgumentParser, place
from ecvae_diffusers.commands import check_writable, load_pipeline, number, run_or_fail


INDEX = "model_index.json"


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=str(__doc__).split(":")[0] + ".")
    parser.add_argument("model", type=place, help="Folder of a pipeline. The threshold is stored in it.")
    parser.add_argument(
        "--data",
        type=place,
        required=True,
        help="Normal images that the model was not trained on: a folder of images, or a data set (folder or Hub id, split `test`).",
    )
    parser.add_argument(
        "--false_alarm_rate",
        type=number(float, 1e-6, 0.5),
        default=0.01,
        help="Share of normal images that may be called anomalous. Default: 0.01.",
    )
    parser.add_argument("--device", help="Such as cpu or cuda:1. Default: a GPU if there is one.")
    args = parser.parse_args(argv)
    if not os.path.isfile(os.path.join(args.model, INDEX)):
        parser.error(f"model must be a folder with {INDEX}, but {args.model!r} is not.")
    return args


def run(args: argparse.Namespace) -> None:
    index = Path(args.model) / INDEX
    check_writable("model", str(index))

    import json

    from diffusers import DiffusionPipeline

    from ecvae_diffusers import ECVAEPipeline
    from ecvae_diffusers.atomic import write_json
    from ecvae_diffusers.evaluation.anomaly import measure_normal
    from ecvae_diffusers.evaluation.pictures import decode_all, draw, open_source

    pipeline = load_pipeline(DiffusionPipeline, "model", args.model, args.device)
    if not isinstance(pipeline, ECVAEPipeline):
        raise ValueError(f"model {args.model!r} must hold an ECVAEPipeline, but holds a {type(pipeline).__name__}.")
    config = pipeline.vae.config
    if not config.get("reconstruction_variance"):
        raise ValueError(f"model {args.model!r} must have a `reconstruction_variance`, which training measures.")
    pictures = open_source("data", args.data, "test", None, None, None, in_channels=config.in_channels)
    images = decode_all(draw(pictures, None, 0, True), config.sample_size, config.in_channels)
    try:
        measured = measure_normal(pipeline, images, args.false_alarm_rate)
    except ValueError as error:
        raise ValueError(f"--data {args.data!r}: {error}") from error
    if index.with_name("pipeline.py").exists():
        pipeline.save_code(args.model)  # code of earlier versions does not know the threshold
    written = json.loads(index.read_text(encoding="utf-8")) | {"anomaly_threshold": measured}
    write_json(index, written, sort_keys=True)
    low, high = measured["interval"]
    print(
        f"{args.model}: images above {measured['threshold']:.2f} bits are anomalous. Of new normal images, {low:.2%} to {high:.2%} are "
        f"(95% interval, from {measured['count']} images)."
    )


def main(argv: list[str] | None = None, prog: str = "ecvae calibrate-threshold") -> None:
    """Run `ecvae calibrate-threshold` with `argv`, or with the arguments of this process."""
    run_or_fail(run, parse_args(argv, prog), prog)


if __name__ == "__main__":
    main()
