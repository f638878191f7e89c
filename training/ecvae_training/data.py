"""Images for training, through `datasets`: checked and decoded once, before any training, and kept as uint8."""

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from ecvae_diffusers.pipelines.inputs import GRAY_MODES, check_mode, read_picture


# Above this, images are decoded again at each use instead of being kept.
MAX_CACHED_BYTES = 4 * 2**30
# Formats that Pillow only recognises: reading them needs a program of the user's.
STUB_FORMATS = {"BUFR", "GRIB", "HDF5", "WMF"}


def load_images(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    image_column: str | None,
    cache_dir: str | None,
    max_train_samples: int | None,
    output_dir: str | None = None,
):
    """
    The train split with one column `image` of undecoded images. Pictures that the run writes itself, into
    `output_dir`, are left out.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the folder does not exist or holds no image, the data set can't be loaded, or the column is not
            one of images.
    """
    datasets = import_datasets()
    if train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise ValueError(f"--train_data_dir must be a folder of images, but {train_data_dir!r} is no folder.")
        files = find_images(Path(train_data_dir), Path(output_dir) if output_dir is not None else None)
        if not files:
            raise ValueError(f"--train_data_dir must hold images, but {train_data_dir!r} holds none.")
        dataset = datasets.Dataset.from_dict({"image": [str(p) for p in files]})
        column = "image"
    else:
        dataset = load_split(dataset_name, dataset_config_name, cache_dir)
        column = find_image_column(dataset.features, dataset_name, image_column)
    dataset = dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    if max_train_samples is not None:
        dataset = dataset.select(range(min(max_train_samples, len(dataset))))
    # Undecoded, so that a broken image can be named, and its header read without decoding it.
    return dataset.cast_column("image", datasets.Image(decode=False))


def import_datasets():
    """The package `datasets`. Raises `ImportError`, saying what to install, without it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Training needs the package `datasets`: pip install 'ecvae-diffusers[training]'.") from error
    return datasets


def load_split(
    dataset_name: str,
    dataset_config_name: str | None,
    cache_dir: str | None,
    split: str = "train",
    streaming: bool = False,
    argument: str = "dataset_name",
):
    """A split of a data set. Raises `ValueError` if it can't be loaded, naming the command line's `argument`."""
    datasets = import_datasets()
    try:
        return datasets.load_dataset(
            dataset_name, dataset_config_name, cache_dir=cache_dir, split=split, streaming=streaming
        )
    except Exception as error:  # each format has its own ways to fail
        raise ValueError(
            f"--{argument} {dataset_name!r}, split {split!r}, can't be loaded: {str(error) or 'it is empty'}"
        ) from error


def find_image_column(features, dataset_name: str, image_column: str | None) -> str:
    """`image_column`, or the only column of images. Raises `ValueError` if it is not one of images, or not the only."""
    datasets = import_datasets()
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is not None and image_column not in columns:
        raise ValueError(f"--image_column must be one of {columns} in {dataset_name!r}, but is {image_column!r}.")
    if image_column is None and len(columns) != 1:
        raise ValueError(f"{dataset_name!r} has the image columns {columns}: choose one with --image_column.")
    return image_column or columns[0]


def find_images(folder: Path, left_out: Path | None) -> list[Path]:
    """Files that Pillow can open, in sub-folders too (links followed), but not hidden ones and none of `left_out`."""
    PIL.Image.init()
    readable = {
        extension
        for extension, name in PIL.Image.EXTENSION.items()
        if name in PIL.Image.OPEN and name not in STUB_FORMATS
    }
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name != "__MACOSX"
            and (left_out is None or (Path(parent) / name).resolve() != left_out.resolve())
        ]
        files += [
            Path(parent) / name
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in readable
        ]
    return sorted(files)


def to_size(image: PIL.Image.Image, resolution: int) -> PIL.Image.Image:
    """Resize the shorter side to `resolution` (bicubic, antialiased), and crop the center."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def open_image(source: dict | None) -> PIL.Image.Image:
    """
    Read the header of an undecoded image: what a column `Image(decode=False)` gives.

    Raises:
        ValueError: if there is no image, or its pixels have no agreed range.
        Exception: of a class of Pillow's choice, if the header can't be read.
    """
    if source is None:
        raise ValueError("there is none")
    try:
        image = PIL.Image.open(io.BytesIO(source["bytes"]) if source["bytes"] is not None else source["path"])
    except PIL.UnidentifiedImageError:
        raise ValueError("cannot identify image file") from None  # Pillow adds where the bytes lie in memory
    check_mode(image)
    return image


def decode_image(source: dict | None, channels: int, resolution: int) -> torch.Tensor:
    """An undecoded image as uint8 (C, H, W), upright, resized and cropped. Raises what `open_image` raises."""
    with open_image(source) as image:
        array = np.array(to_size(read_picture(image, channels), resolution))
    return torch.from_numpy(array).view(resolution, resolution, channels).permute(2, 0, 1)


class ImageDataset(torch.utils.data.Dataset):
    """
    Images as uint8 tensors (C, H, W), each opened and checked at construction.

    Args:
        dataset: What `load_images` gives.
        resolution (`int`): Height and width.
        in_channels (`int`, *optional*): 1, 3 or 4; if not given 1 where every image is gray, else 3.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Leave out images that can't be read; `skipped` says in words which. Otherwise they are refused.

    Raises:
        ValueError: if an image can't be read (or, with `skip_broken`, none can); the message names the first ones and
            counts all.
    """

    def __init__(
        self,
        dataset,
        resolution: int,
        in_channels: int | None = None,
        skip_broken: bool = False,
        progress: bool = True,
    ):
        self.dataset = dataset
        self.resolution = resolution
        modes, whole, broken = set(), [], []
        for i in tqdm(range(len(dataset)), desc="Checking images", disable=not progress):
            try:
                with open_image(dataset[i]["image"]) as image:
                    image.load()
                    modes.add(image.mode)
                    whole.append(i)
            except Exception as error:  # PIL raises a different class for nearly every kind of damage
                broken.append(f"{self.name(i)} ({error})")
        self.skipped = None
        if broken:
            self.skipped = (
                f"{len(broken)} of {len(dataset)} images can't be read, among them: {'; '.join(broken[:3])}."
            )
            if not (skip_broken and whole):
                raise ValueError(self.skipped)
            self.dataset = dataset = dataset.select(whole)
        self.channels = in_channels or (1 if modes <= GRAY_MODES else 3)
        self.cache = None
        shape = (len(dataset), self.channels, resolution, resolution)
        if np.prod(shape, dtype=np.int64) <= MAX_CACHED_BYTES:
            cache = torch.empty(shape, dtype=torch.uint8)
            for i in tqdm(range(len(dataset)), desc="Decoding images", disable=not progress):
                cache[i] = self.decode(i)
            self.cache = cache

    def name(self, i: int) -> str:
        return (self.dataset[i]["image"] or {}).get("path") or f"image {i}"

    def decode(self, i: int) -> torch.Tensor:
        return decode_image(self.dataset[i]["image"], self.channels, self.resolution)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.cache[i] if self.cache is not None else self.decode(i)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """A batch at once: indexing the cache is far cheaper than stacking its items."""
        if self.cache is not None:
            return self.cache[torch.tensor(indices)]
        return torch.stack([self.decode(i) for i in indices])


def collate(batch: torch.Tensor) -> torch.Tensor:
    return batch
