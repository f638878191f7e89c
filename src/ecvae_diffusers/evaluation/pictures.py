# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The images of an evaluation: folders or splits of data sets, drawn at random and brought to one size."""

import argparse
import logging
import os
from dataclasses import dataclass

import torch

from ecvae_diffusers.training.data.files import Pictures, find_images
from ecvae_diffusers.training.data.images import (
    CheckedPictures,
    ImageDataset,
    column_of_images,
    find_image_column,
    import_datasets,
    load_split,
    open_folder,
)
from ecvae_diffusers.training.run.command import PICTURE_FOLDERS


logger = logging.getLogger(__name__)


def open_source(
    argument: str, source: str, split: str, config_name: str | None, image_column: str | None, cache_dir: str | None
) -> Pictures:
    """
    Open a folder of images, or a split of a data set (Hub id or folder). `config_name` and `image_column` are those of
    `--dataset_name`: other data has its own.

    Raises:
        ValueError: naming `argument`, if it can't be loaded, or its column of images can't be told.
    """
    # A folder that is a data set holds its splits: listed, each of them would be all of it.
    may_be_either = argument not in ("dataset_name", *PICTURE_FOLDERS) and os.path.isdir(source)
    if argument in PICTURE_FOLDERS or (may_be_either and find_images(source, argument)):
        return open_folder(source, argument)
    datasets = import_datasets()
    if argument != "out_of_distribution":
        dataset = load_split(source, config_name, cache_dir, split, argument=argument)
        return column_of_images(dataset, find_image_column(dataset.features, source, image_column), source)
    dataset = load_split(source, None, cache_dir, split, argument=argument)
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(
            f"--out_of_distribution {source!r} must have one column of images, but has {columns}: give a folder of "
            "images."
        )
    return column_of_images(dataset, columns[0], source)


def draw(pictures: Pictures, count: int | None, seed: int, progress: bool) -> CheckedPictures:
    """
    Draw `count` pictures, or all of them, in random order; the same ones in the same order for a seed. Data are often
    sorted by class, and some measures take the first images.

    Raises:
        ValueError: if one of them can't be read.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    return CheckedPictures(pictures.select(order[:count].tolist()), progress=progress)


def draw_images(
    pictures: Pictures, count: int | None, resolution: int, channels: int | None, seed: int, progress: bool
) -> torch.Tensor:
    """
    Return what [`draw`] draws as uint8 images (N, C, H, W). `channels` of `None` are 1 if every image is gray, else 3.

    Raises:
        ValueError: if one of them can't be read.
    """
    return decode_all(draw(pictures, count, seed, progress), resolution, channels, progress)


def decode_all(
    checked: CheckedPictures, resolution: int, channels: int | None = None, progress: bool = True
) -> torch.Tensor:
    """Return pictures as uint8 images (N, C, H, W)."""
    images = ImageDataset(checked, resolution, channels, progress=progress)
    return images.__getitems__(list(range(len(images))))


def common_size(checked: CheckedPictures, argument: str) -> int:
    """Return the shorter side of pictures of one size. Raises `ValueError`, naming `argument`, if sizes differ."""
    if len(checked.sizes) > 1:
        raise ValueError(
            f"--{argument} must hold images of one size, but holds {checked.describe_sizes()}: give --resolution, to "
            "which all are resized."
        )
    return min(next(iter(checked.sizes)))


@dataclass
class EvaluatedImages:
    """
    Args:
        decoded (`dict`): uint8 images by name: `real`, `test`, `generated`, and `outside_...` of other data.
        checked (`dict`): By the same names, the pictures that the images are of.
        training ([`Pictures`]): All training images, of which `real` are drawn.
    """

    decoded: dict[str, torch.Tensor]
    checked: dict[str, CheckedPictures]
    training: Pictures

    @classmethod
    def read(cls, args: argparse.Namespace, model, main_process: bool) -> "EvaluatedImages":
        """
        Read the images that the command line of `evaluate.py` names, for an `EvaluatedModel`, or for generated images
        alone. The main process warns of generated images that are training images, and of pictures that are left out.
        """
        checked, opened = {}, {}

        def look(name: str, argument: str, source: str, split: str, count: int | None) -> None:
            opened[name] = open_source(
                argument, source, split, args.dataset_config_name, args.image_column, args.cache_dir
            )
            checked[name] = draw(opened[name], count, 0, main_process)
            if main_process and (left_out := checked[name].left_out()) is not None:
                logger.warning(f"Left out of --{argument} {source!r}: {left_out}.")

        if model is None:
            look("generated", "generated_image_dir", args.generated_image_dir, "train", None)
        training = "train_data_dir" if args.train_data_dir else "dataset_name"
        look("real", training, getattr(args, training), args.train_split, args.num_reference)
        if model is None and main_process:
            known = set(checked["real"].hashes)
            if count := sum(one in known for one in checked["generated"].hashes):
                logger.warning(
                    f"WARNING {count} of {len(checked['generated'])} images of --generated_image_dir are training "
                    "images: their quality says nothing about a model."
                )
        if args.test_data_dir is not None:
            look("test", "test_data_dir", args.test_data_dir, args.test_split, args.num_test)
        elif args.dataset_name is not None and args.test_split != "none":
            look("test", "dataset_name", args.dataset_name, args.test_split, args.num_test)
        if model is not None:
            for named in args.out_of_distribution:
                name, _, source = named.partition("=")
                look(f"outside_{name}", "out_of_distribution", source, args.test_split, args.num_test)
            resolution, channels = model.resolution, model.channels
        else:
            resolution = args.resolution or common_size(checked["generated"], "generated_image_dir")
            # One set that has colour is enough: a model without it would be found perfect among gray images.
            channels = max(one.channels for one in checked.values())
        decoded = {name: decode_all(one, resolution, channels, main_process) for name, one in checked.items()}
        if model is not None and "test" in decoded:
            shape = (min(len(decoded["test"]), 1000), channels, resolution, resolution)
            noise = torch.Generator().manual_seed(0)
            decoded["outside_noise"] = torch.randint(256, shape, generator=noise, dtype=torch.uint8)
        return cls(decoded, checked, opened["real"])
