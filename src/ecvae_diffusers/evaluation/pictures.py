# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Loads the images of an evaluation from folders and data sets, draws them at random and resizes them to one size."""

import argparse
import logging
import os

import torch

from ecvae_diffusers.checks import as_sample_size, height_and_width
from ecvae_diffusers.command import PICTURE_FOLDERS
from ecvae_diffusers.training.data.files import Pictures, find_images
from ecvae_diffusers.training.data.images import (
    CheckedPictures,
    Resolution,
    classes_of_column,
    column_of_images,
    decode_pictures,
    find_image_column,
    load_split,
    open_folder,
    with_classes_of_folders,
)


logger = logging.getLogger(__name__)


def open_source(
    argument: str,
    source: str,
    split: str,
    config_name: str | None,
    image_column: str | None,
    cache_dir: str | None,
    with_classes: bool = False,
    class_column: str | None = None,
    in_channels: int | None = None,
) -> Pictures:
    """
    Open a folder of images, or a split of a data set (Hub id or folder), with its classes if `with_classes`.

    `in_channels` is that of the model, if there is one: arrays and TIFF pages are read for other numbers than pictures have.
    `config_name` and `image_column` belong to `--dataset_name` and are ignored for `--out_of_distribution`. Raises
    `ValueError`, naming `argument`, if the source can't be opened.
    """
    # `--dataset_name` may be a folder with several splits. Listing its images would make each split all of them.
    may_be_either = argument not in ("dataset_name", *PICTURE_FOLDERS) and os.path.isdir(source)
    if argument in PICTURE_FOLDERS or (may_be_either and find_images(source, argument, in_channels)):
        pictures = open_folder(source, argument, in_channels)
        return with_classes_of_folders(pictures, source, argument) if with_classes else pictures
    if argument == "out_of_distribution":
        config_name = image_column = None
    dataset = load_split(source, config_name, cache_dir, split, argument=argument)
    try:
        column = find_image_column(dataset.features, source, image_column)
    except ValueError as error:
        raise ValueError(f"--{argument} {source!r} has no single column of images: {error}") from error
    pictures = column_of_images(dataset, column, source, in_channels)
    if with_classes:
        pictures.labels, pictures.class_names = classes_of_column(dataset, source, class_column)
    return pictures


def draw(pictures: Pictures, count: int | None, seed: int, progress: bool) -> CheckedPictures:
    """
    Draw `count` pictures, or all if it is `None`, in a random order that depends on `seed` alone. The order matters: data
    are often sorted by class, and some measures take the first images. Raises `ValueError` if a picture can't be read.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    return CheckedPictures(pictures.select(order[:count].tolist()), progress=progress)


def decode_all(
    checked: CheckedPictures, resolution: Resolution, channels: int | None = None, progress: bool = True
) -> torch.Tensor:
    """Decode pictures to uint8 images (N, C, H, W). If `channels` is `None`, C is 1 if every image is gray, else 3."""
    return decode_pictures(checked.pictures, channels or checked.channels, resolution, progress)


class EvaluatedImages:
    """
    The images that the arguments of `ecvae evaluate` name. `shape` is the (channels, resolution) of the model, or `None`
    if a folder of generated images is measured. The main process warns of pictures that are left out, and of generated
    images that are training images.

    Attributes:
        decoded (`dict`): uint8 images (N, C, H, W) by name: `real` (training images), `test`, `generated`, and
            `outside_<name>` for other data.
        checked (`dict`): The pictures of the same names, with their classes for `--features classifier`.
        training ([`Pictures`]): All training images. `real` is drawn from them.
    """

    def __init__(self, args: argparse.Namespace, shape: tuple[int, Resolution] | None, main_process: bool):
        self.checked: dict[str, CheckedPictures] = {}

        def look(name: str, argument: str, source: str, split: str, count: int | None) -> Pictures:
            of_data = (args.dataset_config_name, args.image_column, args.cache_dir)
            classes = (args.features == "classifier" and name in ("real", "test"), args.class_column)
            opened = open_source(argument, source, split, *of_data, *classes, None if shape is None else shape[0])
            self.checked[name] = draw(opened, count, 0, main_process)
            if main_process and (left_out := self.checked[name].left_out()) is not None:
                logger.warning(f"Left out of --{argument} {source!r}: {left_out}.")
            return opened

        training = "train_data_dir" if args.train_data_dir else "dataset_name"
        self.training = look("real", training, getattr(args, training), args.train_split, args.num_reference)
        if args.test_data_dir is not None:
            look("test", "test_data_dir", args.test_data_dir, args.test_split, args.num_test)
        elif args.dataset_name is not None and args.test_split != "none":
            look("test", "dataset_name", args.dataset_name, args.test_split, args.num_test)
        if "test" in self.checked and (found := self.class_names("test")) != (own := self.class_names("real")):
            raise ValueError(f"--test_split must have the classes of the training data, {own}, but has {found}.")
        if shape is not None:
            for named in args.out_of_distribution:
                name, _, source = named.partition("=")
                look(f"outside_{name}", "out_of_distribution", source, args.test_split, args.num_test)
            channels, resolution = shape
        else:
            look("generated", "generated_image_dir", args.generated_image_dir, "train", None)
            generated, known = self.checked["generated"], set(self.checked["real"].hashes)
            if (count := sum(one in known for one in generated.hashes)) and main_process:
                logger.warning(
                    f"WARNING {count} of {len(generated)} images of --generated_image_dir are training images: their "
                    "quality says nothing about a model."
                )
            if args.resolution is None and len(generated.sizes) > 1:
                raise ValueError(
                    f"--generated_image_dir must hold images of one size, but holds {generated.describe_sizes()}: resize "
                    "them by giving --resolution."
                )
            resolution = args.resolution or as_sample_size(next(iter(generated.sizes))[::-1])
            # One set with colour is enough to compare colours: as gray images, samples without colour would look perfect.
            channels = max(one.channels for one in self.checked.values())
        sets = self.checked.items()
        self.decoded = {name: decode_all(one, resolution, channels, main_process) for name, one in sets}
        if shape is not None and "test" in self.decoded:
            noise = torch.Generator().manual_seed(0)
            size = (min(len(self.decoded["test"]), 1000), channels, *height_and_width(resolution))
            self.decoded["outside_noise"] = torch.randint(256, size, generator=noise, dtype=torch.uint8)

    def class_names(self, name: str) -> list[str] | None:
        """Return the names of a set's classes, or `None` if classes were not loaded."""
        return self.checked[name].pictures.class_names

    def labels(self, name: str) -> torch.Tensor:
        """Return the class (N,) of each image of a set."""
        return torch.tensor(self.checked[name].pictures.labels)
