# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure a model, or a folder of generated images, against data: `ecvae evaluate --help`.

Writes `evaluation.json` (every figure with its protocol), `samples.png` and `neighbours.png` (the samples nearest to
training images, each next to those images). The figures do not depend on the number of processes. An interrupted
evaluation resumes when it is started again with the same arguments.
"""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

from ecvae_diffusers.atomic import remove, write_json
from ecvae_diffusers.checks import as_sample_size
from ecvae_diffusers.command import ArgumentParser, check_places, named_place, place, printable
from ecvae_diffusers.commands import number, run_or_fail
from ecvae_diffusers.evaluation.schema import EVALUATION_FILE
from ecvae_diffusers.training.command_line import HelpFormatter


PARTS_FOLDER, SAMPLES, NEIGHBOURS = ".parts", "samples.png", "neighbours.png"
HOW_TO_READ = "Compare each value with the columns `floor` and `good`. Distances over other features can't be compared with these."


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    description = __doc__.split(":")[0] + "."
    parser = ArgumentParser(prog, description=description, formatter_class=HelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pretrained_model_name_or_path", type=place, help="Pipeline to measure: a folder or a Hub id.")
    what.add_argument("--generated_image_dir", type=place, help="Folder of generated images to measure, of any model.")
    parser.add_argument("--revision", help="Branch, tag or commit of a pipeline on the Hub.")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset_name", type=place, help="Data set to measure against: a Hub id or a folder.")
    data.add_argument("--train_data_dir", type=place, help="Folder of training images, instead of --dataset_name.")
    parser.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    parser.add_argument("--data_name", help="Name of the data in reports, instead of its Hub id or folder.")
    parser.add_argument("--image_column", help="Column of the images, if the data set has several.")
    parser.add_argument(
        "--class_column", help="Column of the classes, for --features classifier. Default: the only column of classes."
    )
    parser.add_argument("--cache_dir", type=place, help="Cache folder of the package `datasets`.")
    parser.add_argument("--train_split", default="train", help="Split that samples are measured against.")
    parser.add_argument("--test_split", default="test", help="Split of held-out images, or 'none' if there is none.")
    parser.add_argument("--test_data_dir", type=place, help="Folder of held-out images, instead of --test_split.")
    parser.add_argument(
        "--out_of_distribution", type=named_place, nargs="+", default=[], metavar="NAME=SOURCE",
        help="Other data, which the energy should tell from the training data: a folder of images, or a data set, of which "
        "--test_split is used.",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=place, required=True, help="Folder to write to. Must not hold an evaluation."
    )
    count = number(int, 1)
    parser.add_argument(
        "--resolution",
        type=count,
        nargs="+",
        metavar="PX",
        help="Size of images, one number or height and width, if not that of the model or of the files.",
    )
    parser.add_argument("--num_samples", type=count, default=10_000, help="Generated images per seed.")
    parser.add_argument("--num_reference", type=count, default=10_000, help="Training images, drawn at random.")
    parser.add_argument("--num_test", type=count, default=10_000, help="Test images, drawn at random.")
    parser.add_argument(
        "--num_likelihood_images",
        type=number(int, 0),
        default=128,
        help="Number of test images for the likelihood bounds. 0: none.",
    )
    parser.add_argument("--importance_samples", type=count, default=500, help="Latents per image, for the bound.")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="Seeds of the latents.")
    parser.add_argument(
        "--features", type=place, default="lite0",
        help="'lite0', 'digits', 'inception', a vision model of transformers such as 'facebook/dinov2-base', or "
        "'classifier', which is first trained on the data's classes (sub-folders, or --class_column).",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=count, default=50, help="Images per batch.")
    args = parser.parse_args(argv)
    if args.resolution is not None:
        if len(args.resolution) > 2:
            parser.error(f"--resolution must be one number, or height and width, but is {args.resolution}.")
        args.resolution = as_sample_size(args.resolution)
    if len(set(args.seeds)) != len(args.seeds):
        parser.error(f"--seeds must be different numbers, but are {args.seeds}.")
    names = [source.partition("=")[0] for source in args.out_of_distribution]
    if not all("=" in source for source in args.out_of_distribution) or len({*names, "", "noise"}) != len(names) + 2:
        parser.error(
            "--out_of_distribution must be NAME=SOURCE with different names, none of them 'noise', but is "
            f"{' '.join(args.out_of_distribution)!r}."
        )
    folder = Path(args.output_dir)
    there = [name for name in (EVALUATION_FILE, SAMPLES, NEIGHBOURS) if (folder / name).exists()]
    # Pictures next to the folder of parts come from an evaluation that was interrupted while writing.
    if EVALUATION_FILE in there or there and not (folder / PARTS_FOLDER).is_dir():
        parser.error(f"--output_dir {args.output_dir!r} already holds {there[0]}: give another folder.")
    return args


def run(args: argparse.Namespace) -> None:
    check_places(args)

    import torch
    from accelerate import Accelerator

    from ecvae_diffusers.evaluation.pictures import EvaluatedImages
    from ecvae_diffusers.evaluation.summary import summarize
    from ecvae_diffusers.evaluation.work import EvaluatedModel, Work
    from ecvae_diffusers.hub.card import evaluation_table
    from ecvae_diffusers.training.run.folder import locked_by_main
    from ecvae_diffusers.training.run.pictures import save_atomically

    # Without `cpu`, each of several processes on a machine without an accelerator would take itself for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    main_process, output_dir = accelerator.is_main_process, Path(args.output_dir)
    with locked_by_main(accelerator, output_dir):
        model = None
        if args.pretrained_model_name_or_path is not None:
            model = EvaluatedModel(args.pretrained_model_name_or_path, args.revision, accelerator.device)
            if args.resolution not in (None, model.resolution):
                raise ValueError(
                    f"--resolution must be that of the model, {model.resolution}, but is {args.resolution}."
                )
        images = EvaluatedImages(args, None if model is None else (model.channels, model.resolution), main_process)
        identity = {name: value for name, value in vars(args).items() if name not in ("output_dir", "cache_dir")}
        identity["weights"] = model.fingerprint if model is not None else None
        # The images at a path may have changed since an interruption.
        for name, decoded in images.decoded.items():
            identity[f"images of {name}"] = hashlib.sha256(decoded.numpy().data).hexdigest()
        work = Work(args, accelerator, model, images, output_dir / PARTS_FOLDER, identity)
        work.do()
        # The main process alone does the rest. As one of a group, torchmetrics would wait for the others.
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not main_process:
            return
        evaluation, pictures = summarize(args, work)
        for name, picture in pictures.items():
            save_atomically(picture, output_dir / name)
        write_json(output_dir / EVALUATION_FILE, evaluation.to_json())
        remove(work.folder)
        print(evaluation_table(evaluation))
        print(HOW_TO_READ)
        print(f"{output_dir / SAMPLES}: samples.")
        print(f"{output_dir / NEIGHBOURS}: the samples nearest to training images, each next to those images.")
        print(f"{output_dir / EVALUATION_FILE}: every figure with its protocol.")


def main(
    argv: list[str] | None = None, prog: str = "ecvae evaluate", prepare: Callable[[], None] = lambda: None
) -> None:
    """Run `ecvae evaluate` with `argv`, or this process's arguments. `prepare` is called after parsing them."""
    printable()
    args = parse_args(argv, prog)
    prepare()
    run_or_fail(run, args, prog, ": start it again with the same arguments to resume")


if __name__ == "__main__":
    main()
