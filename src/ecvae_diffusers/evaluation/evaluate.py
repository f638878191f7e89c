# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure a model, or a folder of generated images, against data: `accelerate launch training/evaluate.py --help`.

Writes `evaluation.json` (every figure with its protocol), `samples.png` and `neighbours.png` (samples, each next to
the training images that are nearest to it). Any number of processes gives the same figures. An interrupted evaluation
resumes when it is started again with the same arguments.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator

from ecvae_diffusers.atomic import write_json
from ecvae_diffusers.evaluation.parts import Parts
from ecvae_diffusers.evaluation.pictures import EvaluatedImages
from ecvae_diffusers.evaluation.schema import EVALUATION_FILE, Evaluation
from ecvae_diffusers.evaluation.summary import summarize
from ecvae_diffusers.evaluation.work import EvaluatedModel, Work
from ecvae_diffusers.hub.card import evaluation_table
from ecvae_diffusers.training.run.command import ArgumentParser, check_places, fail, named_place, place, printable
from ecvae_diffusers.training.run.folder import locked_by_main
from ecvae_diffusers.training.run.pictures import save_atomically


PARTS_FOLDER = ".parts"
PICTURES = {
    "samples.png": "samples",
    "neighbours.png": "samples, each next to the training images nearest to it: an equal one is memorised",
}


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """Return an argument's type: finite numbers of at least `least`."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a finite number of at least {least}, but is {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


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
        help="Other data that the energy should tell from the model's: folder of images or data set (its "
        "--test_split).",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=place, required=True, help="Where to write. Must not hold an evaluation.")
    count = at_least(1)
    parser.add_argument(
        "--resolution", type=count, help="That of the model, or of the generated images, if not given."
    )
    parser.add_argument("--num_samples", type=count, default=10_000, help="Generated images per seed.")
    parser.add_argument("--num_reference", type=count, default=10_000, help="Training images, drawn at random.")
    parser.add_argument("--num_test", type=count, default=10_000, help="Test images, drawn at random.")
    parser.add_argument(
        "--num_likelihood_images", type=at_least(0), default=128, help="Of the test images. 0 leaves the bound out."
    )
    parser.add_argument("--importance_samples", type=count, default=500, help="Latents per image of the bound.")
    parser.add_argument(
        "--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="Of the latents; a row of samples each."
    )
    parser.add_argument(
        "--features", type=place, default="lite0",
        help="'lite0', 'digits', 'inception' or a vision model of transformers such as 'facebook/dinov2-base'.",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=count, default=50, help="Images at a time.")
    return parser


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if len(set(args.seeds)) != len(args.seeds):
        parser.error(f"--seeds must be different numbers, but are {args.seeds}.")
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
    # Explicit: of several processes without an accelerator, each would otherwise take itself for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with locked_by_main(accelerator, args.output_dir):
        evaluate(args, accelerator)


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Measure, while no other evaluation has the folder."""
    main_process, output_dir = accelerator.is_main_process, Path(args.output_dir)
    model = None
    if args.pretrained_model_name_or_path is not None:
        model = EvaluatedModel(args.pretrained_model_name_or_path, args.revision, accelerator.device)
        if args.resolution not in (None, model.resolution):
            raise ValueError(f"--resolution must be the model's ({model.resolution}), but is {args.resolution}.")
    images = EvaluatedImages.read(args, model, main_process)
    identity = {name: value for name, value in vars(args).items() if name not in ("output_dir", "cache_dir")}
    identity["weights"] = model.fingerprint if model is not None else None
    # Other images may lie under the same path by now.
    for name, decoded in images.decoded.items():
        identity[f"images of {name}"] = hashlib.sha256(decoded.numpy()).hexdigest()
    parts = Parts(output_dir / PARTS_FOLDER, accelerator, identity)
    work = Work(args, accelerator, model, images, parts)
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
        write_json(output_dir / EVALUATION_FILE, evaluation.to_json())
        parts.remove()
        print(evaluation_table(evaluation.to_json()))
        print(how_to_read(evaluation, output_dir, pictures))


def how_to_read(evaluation: Evaluation, folder: Path, pictures: Iterable[str]) -> str:
    """
    Return the lines that follow the table of an evaluation: which direction is good, how far the best can be, where
    the pictures are.

    Args:
        evaluation ([`Evaluation`]): What was measured.
        folder (`Path`): The folder that it was written to.
        pictures (`Iterable[str]`): Names of the pictures in it.
    """
    good = [
        "distances low, those of the floor are what unseen images get instead of samples"
        if evaluation.floor is not None
        else "distances low; give test images, whose own distances say how low they can be",
        "precision, recall, density and coverage near 1",
    ]
    if evaluation.reconstruction is not None:
        good.append("of reconstructions PSNR and SSIM high, mean squared error low")
    if evaluation.likelihood is not None:
        is_exact = "bits_per_dimension" in evaluation.likelihood.measures
        bounds = "ELBO and importance-weighted bound high, amortisation gap low"
        good.append("bits per dimension low" if is_exact else bounds)
    if evaluation.out_of_distribution is not None:
        good.append("AUROC near 1, at 0.5 the score tells nothing apart")
    lines = [f"Good: {'; '.join(good)}."]
    ours = evaluation.generation.measures["frechet_distance"].mean
    floor = evaluation.floor.measures["frechet_distance"] if evaluation.floor is not None else None
    if ours is not None and floor is not None:
        times = f", {ours / floor:.3g} times the floor" if floor > 0 else ""
        lines.append(f"The Frechet distance is {ours:.3g}, and {floor:.3g} for unseen images{times}.")
    lines += [f"{folder / name}: {PICTURES[name]}." for name in pictures]
    return "\n".join([*lines, f"{folder / EVALUATION_FILE}: every figure with its protocol."])


def main(argv: list[str] | None = None, prog: str = "evaluate.py") -> None:
    """Evaluate as a command line says: that of this process, or `argv`."""
    printable()
    args = parse_args(argv, prog)
    try:
        check_places(args)
        run(args)
    except (ValueError, ImportError, OSError) as error:
        fail(f"{prog}: error: {error}")
    except KeyboardInterrupt:
        fail(f"{prog}: interrupted: start it again with the same arguments to resume.")


if __name__ == "__main__":
    main()
