# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure a model, or a folder of generated images, against data: `accelerate launch training/evaluate.py --help`.

Writes `evaluation.json` (every figure beside its protocol), `samples.png` and `neighbours.png` (samples, each beside the
training images that are nearest to it). Any number of processes gives the same figures. One that was cut off goes on
where it was when it is started again with the same arguments.
"""

import argparse
import hashlib
import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from ecvae_diffusers.atomic import write_json
from ecvae_diffusers.evaluation.parts import Parts
from ecvae_diffusers.evaluation.pictures import common_size, decode_all, draw, open_source
from ecvae_diffusers.evaluation.reading import how_to_read
from ecvae_diffusers.evaluation.summary import summarize
from ecvae_diffusers.evaluation.work import EvaluatedModel, Work
from ecvae_diffusers.hub.card import evaluation_table
from ecvae_diffusers.training.data.files import Pictures
from ecvae_diffusers.training.run.folder import locked_by_main
from ecvae_diffusers.training.run.last_line import ArgumentParser, fail
from ecvae_diffusers.training.run.pictures import save_atomically
from ecvae_diffusers.training.run.places import check_places, named_place, place


logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
PARTS_FOLDER = ".parts"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog=prog, description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pretrained_model_name_or_path", type=place, help="Pipeline: folder or Hub id.")
    what.add_argument("--generated_image_dir", type=place, help="Or a folder of images that any model has made.")
    parser.add_argument("--revision", help="Branch or commit of a Hub id.")
    parser.add_argument("--dataset_name", type=place, help="The data: Hub id, or a folder.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument(
        "--data_name", help="What to call the data in reports. Its Hub id, or its folder's name, if not given."
    )
    parser.add_argument("--image_column", help="If the data set has several columns of images.")
    parser.add_argument("--cache_dir", type=place)
    parser.add_argument("--train_split", default="train", help="What samples are measured against.")
    parser.add_argument("--test_split", default="test", help="What the model has not seen. 'none' if there is none.")
    parser.add_argument("--train_data_dir", type=place, help="Folder of images instead of --dataset_name.")
    parser.add_argument("--test_data_dir", type=place, help="Folder of images instead of --test_split.")
    parser.add_argument(
        "--out_of_distribution", type=named_place, nargs="+", default=[], metavar="NAME=SOURCE",
        help="Other data that the energy should tell from the model's: folder of images or data set (its --test_split).",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=place, required=True, help="Where to write. Must not hold an evaluation.")
    parser.add_argument("--resolution", type=int, help="That of the model, or of the generated images, if not given.")
    parser.add_argument("--num_samples", type=int, default=10_000, help="Generated images, for each seed.")
    parser.add_argument("--num_reference", type=int, default=10_000, help="Training images, drawn at random.")
    parser.add_argument("--num_test", type=int, default=10_000, help="Test images, drawn at random.")
    parser.add_argument(
        "--num_likelihood_images", type=int, default=128, help="Of the test images. 0 leaves the bound out."
    )
    parser.add_argument("--importance_samples", type=int, default=500, help="Latents an image of the bound.")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of the latents; a row of samples each."
    )
    parser.add_argument(
        "--features", type=place, default="lite0",
        help="'lite0', 'digits', 'inception' or a vision model of transformers such as 'facebook/dinov2-base'.",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=50, help="Images at a time.")
    return parser


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    for name in ("num_samples", "num_reference", "num_test", "importance_samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}.")
    if args.resolution is not None and args.resolution < 1:
        parser.error(f"--resolution must be at least 1, but is {args.resolution}.")
    if args.num_likelihood_images < 0:
        parser.error(f"--num_likelihood_images must be at least 0, but is {args.num_likelihood_images}.")
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds must be different numbers of at least 0, but are {args.seeds}.")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("the data must be given by either --dataset_name or --train_data_dir.")
    names = [source.partition("=")[0] for source in args.out_of_distribution]
    if any("=" not in source or not name for source, name in zip(args.out_of_distribution, names)):
        parser.error(f"--out_of_distribution must be NAME=SOURCE, but is {' '.join(args.out_of_distribution)!r}.")
    if len({*names, "noise"}) != len(names) + 1:
        parser.error(f"--out_of_distribution must have different names, none of them 'noise', but has {names}.")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir must be a folder, but {args.output_dir!r} is a file.")
    if (output_dir / EVALUATION_FILE).exists():
        parser.error(f"--output_dir {args.output_dir!r} holds an {EVALUATION_FILE}: give another folder.")
    return args


def run(args: argparse.Namespace) -> None:
    # Said outright: of several processes without an accelerator, each would otherwise take itself for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with locked_by_main(accelerator, args.output_dir):
        evaluate(args, accelerator)


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Measure, where no other evaluation has the folder."""
    main_process, output_dir = accelerator.is_main_process, Path(args.output_dir)
    model = None
    if args.pretrained_model_name_or_path is not None:
        model = EvaluatedModel(args.pretrained_model_name_or_path, args.revision, accelerator.device)
    if model is not None and args.resolution not in (None, model.resolution):
        raise ValueError(f"--resolution must be the model's ({model.resolution}), but is {args.resolution}.")
    data = ("train_data_dir", args.train_data_dir) if args.train_data_dir else ("dataset_name", args.dataset_name)
    checked = {}

    def look(name: str, argument: str, source: str, split: str, count: int | None) -> Pictures:
        opened = open_source(argument, source, split, args.dataset_config_name, args.image_column, args.cache_dir)
        checked[name] = draw(opened, count, 0, main_process)
        if main_process and (left_out := checked[name].left_out()) is not None:
            logger.warning(f"Left out of --{argument} {source!r}: {left_out}.")
        return opened

    if model is None:
        look("generated", "generated_image_dir", args.generated_image_dir, "train", None)
    training = look("real", *data, args.train_split, args.num_reference)
    if model is None and main_process:
        known = set(checked["real"].hashes)
        if count := sum(one in known for one in checked["generated"].hashes):
            logger.warning(
                f"WARNING {count} of {len(checked['generated'])} images of --generated_image_dir are training images: their quality "
                "says nothing of a model."
            )
    if args.test_data_dir is not None:
        look("test", "test_data_dir", args.test_data_dir, args.test_split, args.num_test)
    elif args.dataset_name is not None and args.test_split != "none":
        look("test", "dataset_name", args.dataset_name, args.test_split, args.num_test)
    if model is not None:
        for source in args.out_of_distribution:
            name, _, where = source.partition("=")
            look(f"outside_{name}", "out_of_distribution", where, args.test_split, args.num_test)
        resolution, channels = model.resolution, model.channels
    else:
        resolution = args.resolution or common_size(checked["generated"], "generated_image_dir")
        # One kind of images that has colour is enough: a model without it would be found perfect among gray images.
        channels = max(one.channels for one in checked.values())
    images = {name: decode_all(one, resolution, channels, main_process) for name, one in checked.items()}
    if model is not None and "test" in images:
        shape = (min(len(images["test"]), 1000), channels, resolution, resolution)
        noise = torch.Generator().manual_seed(0)
        images["outside_noise"] = torch.randint(256, shape, generator=noise, dtype=torch.uint8)

    identity = {name: value for name, value in vars(args).items() if name not in ("output_dir", "cache_dir")}
    identity |= {"weights": model.fingerprint if model is not None else None}
    # Others may lie under the same path by now.
    identity |= {f"images of {name}": hashlib.sha256(some.numpy()).hexdigest() for name, some in images.items()}
    parts = Parts(output_dir / PARTS_FOLDER, accelerator, identity)
    work = Work(args, accelerator, model, images, parts, checked, training)
    work.do()
    # What is left is the main process's: torchmetrics would wait for the others.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if main_process:
        evaluation, pictures = summarize(args, work)
        for name, picture in pictures.items():
            save_atomically(picture, output_dir / name)
        write_json(output_dir / EVALUATION_FILE, evaluation)
        parts.remove()
        print(evaluation_table(evaluation))
        print(how_to_read(evaluation, output_dir, pictures))


def main(argv: list[str] | None = None, prog: str = "evaluate.py") -> None:
    """Evaluate as a command line says: that of this process, or `argv`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # The locale may have no letters for a name.
    args = parse_args(argv, prog)
    try:
        check_places(args)
        run(args)
    except (ValueError, ImportError, OSError) as error:
        fail(f"{prog}: error: {error}")
    except KeyboardInterrupt:
        fail(f"{prog}: interrupted: started again with the same arguments it goes on.")


if __name__ == "__main__":
    main()
