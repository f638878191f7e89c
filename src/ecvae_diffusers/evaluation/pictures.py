"""The images of an evaluation: folders or splits of data sets, drawn at random and brought to one size."""

import os

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
from ecvae_diffusers.training.run.places import PICTURE_FOLDERS


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
    if argument == "out_of_distribution":
        dataset = load_split(source, None, cache_dir, split, argument=argument)
        columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if len(columns) != 1:
            raise ValueError(
                f"--out_of_distribution {source!r} must have one column of images, but has {columns}: give a folder of images."
            )
        column = columns[0]
    else:
        dataset = load_split(source, config_name, cache_dir, split, argument=argument)
        column = find_image_column(dataset.features, source, image_column)
    return column_of_images(dataset, column, source)


def draw(pictures: Pictures, count: int | None, seed: int, progress: bool) -> CheckedPictures:
    """
    All pictures, or `count` drawn at random, the same ones in the same order for a seed. The order is random in any case: data
    are often sorted by class, and some measures take the first images.

    Raises:
        ValueError: if one of them can't be read.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    return CheckedPictures(pictures.select(order[:count].tolist()), progress=progress)


def draw_images(
    pictures: Pictures, count: int | None, resolution: int, channels: int | None, seed: int, progress: bool
) -> torch.Tensor:
    """
    uint8 images (N, C, H, W) of what [`draw`] draws. `channels` of `None` are 1 where every image is gray, else 3.

    Raises:
        ValueError: if one of them can't be read.
    """
    return decode_all(draw(pictures, count, seed, progress), resolution, channels, progress)


def decode_all(
    checked: CheckedPictures, resolution: int, channels: int | None = None, progress: bool = True
) -> torch.Tensor:
    """uint8 images (N, C, H, W)."""
    images = ImageDataset(checked, resolution, channels, progress=progress)
    return images.__getitems__(list(range(len(images))))


def common_size(checked: CheckedPictures, argument: str) -> int:
    """
    The shorter side of pictures that are all of one size.

    Raises:
        ValueError: naming `argument`, if they are not.
    """
    if len(checked.sizes) > 1:
        raise ValueError(
            f"--{argument} must hold images of one size, but holds {checked.describe_sizes()}: give --resolution, to which all "
            "are resized."
        )
    return min(next(iter(checked.sizes)))
