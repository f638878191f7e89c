"""The images of an evaluation: folders or splits of data sets, drawn at random and brought to one size."""

from pathlib import Path

import torch

from ecvae_training.data import ImageDataset, find_image_column, find_images, import_datasets, load_split


def open_source(
    argument: str, source: str, split: str, config_name: str | None, image_column: str | None, cache_dir: str | None
):
    """
    A folder of images, or a split of a data set (Hub id or folder), as one column `image` of undecoded images. `config_name`
    and `image_column` are those of `--dataset_name`: other data has its own.

    Raises:
        ValueError: naming `argument`, if it can't be loaded, or its column of images can't be told.
    """
    datasets = import_datasets()
    # A folder that is a data set holds its splits: listed, each of them would be all of it.
    is_images = argument != "dataset_name" and Path(source).is_dir()
    files = find_images(Path(source), None) if is_images else []
    if files:
        dataset = datasets.Dataset.from_dict({"image": [str(path) for path in files]})
        column = "image"
    elif argument == "out_of_distribution":
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
    dataset = dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    return dataset.cast_column("image", datasets.Image(decode=False))


def draw_images(
    dataset, count: int | None, resolution: int, channels: int | None, seed: int, progress: bool
) -> torch.Tensor:
    """
    uint8 images (N, C, H, W): all, or `count` drawn at random, the same ones in the same order for a seed. The order is random in any
    case: data are often sorted by class, and some measures take the first of these images. `channels` of `None` are 1 where every image is
    gray, else 3.

    Raises:
        ValueError: if one of them can't be read.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    chosen = dataset.select(order[:count].tolist())
    images = ImageDataset(chosen, resolution, channels, progress=progress)
    return images.__getitems__(list(range(len(images))))
