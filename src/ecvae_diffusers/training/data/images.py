"""Open, check and decode images before training, and keep them as uint8."""

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.pipelines.inputs import GRAY_MODES, check_mode, read_picture
from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.bands import has_bands, read_bands
from ecvae_diffusers.training.data.files import Pictures, content_hash, find_images, local_data_files


# Height and width, or one number for squares.
Resolution = int | Sequence[int]
# Data sets above this size are decoded at each use instead of being kept in memory.
MAX_CACHED_BYTES = 4 * 2**30
# Types of columns that can hold classes.
CLASS_DTYPES = {"string", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


# Opening


def load_images(data: DataConfig) -> Pictures:
    """Open the pictures of a folder, or of the train split of a data set, undecoded."""
    if data.train_data_dir is not None:
        pictures = open_folder(data.train_data_dir, "train_data_dir", data.in_channels)
        if data.class_conditional:
            pictures = with_classes_of_folders(pictures, data.train_data_dir)
    else:
        name = data.dataset_name or ""
        dataset = load_split(name, data.dataset_config_name, None)
        column = find_image_column(dataset.features, name, data.image_column)
        pictures = column_of_images(dataset, column, name, data.in_channels)
        if data.class_conditional:
            pictures.labels, pictures.class_names = classes_of_column(dataset, name, data.class_column)
    if data.max_train_samples is not None:
        pictures = pictures.select(list(range(min(data.max_train_samples, len(pictures)))))
    return pictures


def open_folder(folder: str, argument: str, in_channels: int | None = None) -> Pictures:
    """
    Open the images of a folder, undecoded. Raises `ValueError`, which names the flag `argument`, if it holds none, or arrays of another
    number of channels.
    """
    pictures = find_images(folder, argument, in_channels)
    if not len(pictures):
        why = f" (left out: {'; '.join(pictures.left_out)})" if pictures.left_out else ""
        raise ValueError(f"--{argument} must hold images, but {folder!r} holds none{why}.")
    if pictures.bands is not None and in_channels not in (None, pictures.bands):
        found = f"{folder!r} holds arrays of {pictures.bands}"
        raise ValueError(f"--{argument} must hold images of {in_channels} channel(s), but {found}.")
    return pictures


def with_classes_of_folders(pictures: Pictures, folder: str, argument: str = "train_data_dir") -> Pictures:
    """Use the sub-folders of a folder as classes of its pictures. Raises `ValueError` if a picture is in no sub-folder."""
    paths = [path.relative_to(folder) for path in pictures.source]
    if outside := [str(path) for path in paths if len(path.parts) == 1]:
        raise ValueError(
            f"--{argument} {folder!r} must hold images only in sub-folders, each named after its class, "
            f"but {len(outside)} image(s) are in none, such as {outside[0]!r}."
        )
    names = sorted({path.parts[0] for path in paths})
    labels = [names.index(path.parts[0]) for path in paths]
    return Pictures(pictures.source, pictures.left_out, labels, names, pictures.bands)


def classes_of_column(dataset, dataset_name: str, class_column: str | None) -> tuple[list[int], list[str]]:
    """
    Return the class of each row and the names of all classes, from `class_column` or the only column of class labels. Raises
    `ValueError` if there is no such column, if there are several, or if a row has no class.
    """
    datasets = import_datasets()
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if class_column is None and len(columns) != 1:
        raise ValueError(
            f"{dataset_name!r} has the class label columns {columns}: choose a column of classes with --class_column."
        )
    column = class_column or columns[0]
    # Columns of strings, integers and booleans can hold classes too.
    possible = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") in CLASS_DTYPES]
    if column not in possible:
        raise ValueError(f"--class_column must be one of {possible} in {dataset_name!r}, but is {class_column!r}.")
    if None in (values := dataset[column][:]) or -1 in values and column in columns:
        raise ValueError(
            f"--class_column {column!r} must hold a class in each row, but some rows of {dataset_name!r} have none."
        )
    if column in columns:
        return values, list(dataset.features[column].names)
    names = sorted(set(values))
    return [names.index(value) for value in values], [str(name) for name in names]


def column_of_images(dataset, column: str, dataset_name: str, in_channels: int | None = None) -> Pictures:
    """Open an image column of a data set, undecoded, so that broken images can be named and headers read without pixels."""
    dataset = dataset.select_columns([column])
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    dataset = dataset.cast_column("image", import_datasets().Image(decode=False))
    bands = in_channels if has_bands(None, in_channels) else None
    return Pictures(dataset, local_data_files(dataset_name)[1], bands=bands)


def import_datasets():
    """Import the package `datasets`. Raises `ImportError`, which says what to install, if it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Training requires the package `datasets`: pip install 'ecvae-diffusers[training]'."
        ) from error
    return datasets


def load_split(
    dataset_name: str,
    dataset_config_name: str | None,
    cache_dir: str | None,
    split: str = "train",
    streaming: bool = False,
    argument: str = "dataset_name",
):
    """Load a split of a data set. Raises `ValueError`, which names the flag `argument`, if that fails."""
    datasets = import_datasets()
    try:
        return datasets.load_dataset(
            dataset_name,
            dataset_config_name,
            data_files=local_data_files(dataset_name)[0],
            cache_dir=cache_dir,
            split=split,
            streaming=streaming,
        )
    except Exception as error:  # each format raises different errors
        # Some errors of `datasets` only say where they happened: their cause says why.
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"--{argument} {dataset_name!r}, split {split!r}, can't be loaded: {reason}") from error


def find_image_column(features, dataset_name: str, image_column: str | None) -> str:
    """Return `image_column`, or the only image column. Raises `ValueError` if it holds no images or the choice is not unique."""
    datasets = import_datasets()
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is not None and image_column not in columns:
        raise ValueError(f"--image_column must be one of {columns} in {dataset_name!r}, but is {image_column!r}.")
    if image_column is None and len(columns) != 1:
        raise ValueError(f"{dataset_name!r} has the image columns {columns}: choose one with --image_column.")
    return image_column or columns[0]


# Decoding


def open_image(source: dict | None) -> PIL.Image.Image:
    """Read the header of an undecoded image. Raises `ValueError`, or an error of Pillow, if it can't be read."""
    if source is None:
        raise ValueError("there is no image")
    try:
        image = PIL.Image.open(io.BytesIO(source["bytes"]) if source["bytes"] is not None else source["path"])
    except PIL.UnidentifiedImageError:
        raise ValueError("cannot identify image file") from None  # Pillow's message holds a memory address
    check_mode(image)
    return image


def to_size(image: PIL.Image.Image, resolution: Resolution) -> PIL.Image.Image:
    """Resize an image so that it just covers `resolution` (bicubic, antialiased), and crop the center."""
    least = height_and_width(resolution)[::-1]
    scale = max(needed / side for needed, side in zip(least, image.size))
    width, height = (max(needed, round(side * scale)) for needed, side in zip(least, image.size))
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - least[0]) // 2, (height - least[1]) // 2
    return image.crop((left, top, left + least[0], top + least[1]))


def to_tensor(image: PIL.Image.Image | np.ndarray, channels: int, resolution: Resolution) -> torch.Tensor:
    """Convert an opened image, or an array (H, W, C), to uint8 (C, H, W), upright, resized and cropped."""
    if isinstance(image, np.ndarray):
        bands = [
            np.asarray(to_size(PIL.Image.fromarray(band), resolution)) for band in np.moveaxis(image, -1, 0).copy()
        ]
        return torch.from_numpy(np.stack(bands))
    array = np.array(to_size(read_picture(image, channels), resolution))
    return torch.from_numpy(array).view(*height_and_width(resolution), channels).permute(2, 0, 1)


def decode_image(source: dict | None, channels: int, resolution: Resolution) -> torch.Tensor:
    """
    Decode an image to uint8 (C, H, W), upright, resized and cropped. Raises the errors of `open_image`, `read_bands` and Pillow.
    """
    if has_bands(source, channels):
        return to_tensor(read_bands(source, channels), channels, resolution)
    with open_image(source) as image:
        return to_tensor(image, channels, resolution)


def decode_pictures(pictures: Pictures, channels: int, resolution: Resolution, progress: bool = True) -> torch.Tensor:
    """Decode pictures to uint8 (N, C, H, W)."""
    images = torch.empty(len(pictures), channels, *height_and_width(resolution), dtype=torch.uint8)
    for i in tqdm(range(len(pictures)), desc="Decoding images", disable=not progress):
        images[i] = decode_image(pictures[i], channels, resolution)
    return images


def hashes_of(pictures: Pictures) -> list[bytes]:
    """Return the [`content_hash`] of each readable picture."""
    found = []
    for i in range(len(pictures)):
        try:
            if pictures.bands is not None:
                found.append(content_hash(read_bands(pictures[i], pictures.bands)))
                continue
            with open_image(pictures[i]) as image:
                found.append(content_hash(read_picture(image, 3)))
        except Exception:  # PIL raises a different class for nearly every kind of damage
            continue
    return found


def name_of(pictures: Pictures, i: int) -> str:
    return (pictures[i] or {}).get("path") or f"image {i}"


class CheckedPictures:
    """
    Pictures that were checked by opening and decoding each once, and statistics of them.

    Args:
        pictures ([`Pictures`]): The pictures to check.
        skip_broken (`bool`, *optional*, defaults to `False`): Whether to leave out unreadable pictures instead of raising an error.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        keep (`Callable`, *optional*): Called with each readable picture, decoded (an array if it has bands), in their order.

    Attributes:
        pictures ([`Pictures`]): The readable pictures.
        skipped (`str`, *optional*): A description of the unreadable ones.
        sizes (`Counter`): The number of pictures of each (width, height), upright.
        num_gray, num_transparent (`int`): The number of gray pictures, and of pictures with transparency.
        num_frames, num_animated (`int`): The number of frames and pages after the first, which are not read, and of files with such.
        hashes (`list[bytes]`): The [`content_hash`] of each readable picture.

    Raises:
        ValueError: if a picture is unreadable (with `skip_broken`: if all are). The message names the first ones and counts all.
    """

    def __init__(
        self,
        pictures: Pictures,
        skip_broken: bool = False,
        progress: bool = True,
        keep: Callable[[PIL.Image.Image | np.ndarray], None] | None = None,
    ):
        self.skipped: str | None = None
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.hashes: list[bytes] = []
        self.num_gray = self.num_transparent = self.num_frames = self.num_animated = 0
        whole, broken = [], []
        for i in tqdm(range(len(pictures)), desc="Checking images", disable=not progress):
            try:
                if pictures.bands is not None:
                    array = read_bands(pictures[i], pictures.bands)
                    if keep is not None:
                        keep(array)
                    whole.append(i)
                    self.hashes.append(content_hash(array))
                    self.sizes[array.shape[1::-1]] += 1
                    continue
                with open_image(pictures[i]) as image:
                    further = getattr(image, "n_frames", 1) - 1  # before `load`, since it seeks
                    image.load()
                    shown = read_picture(image, 3)
                    if keep is not None:
                        keep(image)
                    whole.append(i)
                    self.hashes.append(content_hash(shown))
                    self.sizes[shown.size] += 1
                    self.num_gray += image.mode in GRAY_MODES
                    self.num_transparent += image.has_transparency_data
                    self.num_frames, self.num_animated = self.num_frames + further, self.num_animated + (further > 0)
            except Exception as error:  # PIL raises a different class for nearly every kind of damage
                broken.append(f"{name_of(pictures, i)} ({error})")
        if broken:
            named = "; ".join(broken[:3])
            self.skipped = f"{len(broken)} of {len(pictures)} images can't be read, such as {named}"
            if not (skip_broken and whole):
                raise ValueError(f"{self.skipped}.")
            pictures = pictures.select(whole)
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def channels(self) -> int:
        """The number of channels: that of arrays, or 1 if every picture is gray, else 3."""
        if self.pictures.bands is not None:
            return self.pictures.bands
        return 1 if self.num_gray == len(self) else 3

    def left_out(self) -> str | None:
        """Describe what is not among the images, and why. `None` if nothing was left out."""
        parts = list(self.pictures.left_out)
        if self.num_frames:
            parts.insert(0, f"{self.num_frames} further frame(s) or page(s) of {self.num_animated} file(s)")
        if self.skipped is not None:
            parts.insert(0, self.skipped)
        return "; ".join(parts) or None

    def converted(self, channels: int) -> str | None:
        """Describe which pictures are converted to get `channels` channels. `None` if none are."""
        parts, total = [], len(self)
        if self.pictures.bands is not None:
            return None
        if channels == 1 and self.num_gray < total:
            parts.append(f"{total - self.num_gray} of {total} are in colour and become gray")
        if channels > 1 and self.num_gray > 0:
            parts.append(f"{self.num_gray} of {total} are gray and become RGB")
        if channels < 4 and self.num_transparent > 0:
            parts.append(f"{self.num_transparent} of {total} are transparent and get a white background")
        return "; ".join(parts) or None

    def describe(self, channels: int) -> str:
        """Describe sizes, conversions to `channels` channels, and what was left out."""
        left_out = self.left_out()
        parts = [self.describe_sizes(), self.converted(channels), left_out and f"left out: {left_out}"]
        return "; ".join(filter(None, parts))

    def describe_sizes(self) -> str:
        if len(self.sizes) <= 3:
            return ", ".join(f"{count} of {w}x{h}" for (w, h), count in self.sizes.most_common())
        (least_w, least_h), (most_w, most_h) = (pick(self.sizes, key=math.prod) for pick in (min, max))
        return f"{len(self.sizes)} sizes from {least_w}x{least_h} to {most_w}x{most_h}"


class BrokenImage(ValueError):
    """
    The error for an image that could be read before but can't be now. Its message is one line, even from a worker of a `DataLoader`,
    which adds a traceback.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class ImageDataset(torch.utils.data.Dataset):
    """
    Images as uint8 tensors (C, H, W). Each is opened and checked at construction, and kept in memory if all take at most 4 GiB.

    Args:
        pictures ([`Pictures`]): The pictures.
        resolution (`int` or `list[int]`): Height and width of the images, or one number for squares.
        in_channels (`int`, *optional*): Channels of the images. Default: those of arrays, or 1 if every image is gray, else 3.
        skip_broken, progress (`bool`): As in [`CheckedPictures`], whose errors are raised.

    Attributes:
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The classes of the images.
    """

    def __init__(
        self,
        pictures: Pictures,
        resolution: Resolution,
        in_channels: int | None = None,
        skip_broken: bool = False,
        progress: bool = True,
    ):
        size, in_channels = height_and_width(resolution), in_channels or pictures.bands
        num_values = len(pictures) * math.prod(size)
        # Keep three channels until all images are known to be gray, or one channel if three take too much memory.
        kept = in_channels or (3 if 3 * num_values <= MAX_CACHED_BYTES else 1)
        shape = (len(pictures), kept, *size)
        cache = torch.empty(shape, dtype=torch.uint8) if kept * num_values <= MAX_CACHED_BYTES else None
        places = iter(range(len(pictures)))

        def keep(image: PIL.Image.Image | np.ndarray) -> None:
            if cache is not None:
                cache[next(places)] = to_tensor(image, kept, resolution)

        # The check decodes each image anyway.
        self.checked = CheckedPictures(pictures, skip_broken, progress, keep)
        self.pictures, self.resolution = self.checked.pictures, resolution
        self.labels = None if self.pictures.labels is None else torch.tensor(self.pictures.labels)
        self.channels = in_channels or self.checked.channels
        if cache is not None and kept < self.channels:
            cache = None
        self.cache = None if cache is None else cache[: len(self), : self.channels].contiguous()

    def decode(self, i: int) -> torch.Tensor:
        try:
            return decode_image(self.pictures[i], self.channels, self.resolution)
        except Exception as error:  # PIL raises a different class for nearly every kind of damage
            raise BrokenImage(f"{name_of(self.pictures, i)} can no longer be read: {error}") from error

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images([i])[0]

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch as a dictionary of `images` and, if there are classes, `labels`."""
        batch = {"images": self.images(indices)}
        return batch if self.labels is None else batch | {"labels": self.labels[torch.tensor(indices)]}

    def images(self, indices: list[int]) -> torch.Tensor:
        """Return uint8 images (B, C, H, W). Indexing the cache is far faster than stacking single images."""
        if self.cache is not None:
            return self.cache[torch.tensor(indices)]
        return torch.stack([self.decode(i) for i in indices])
