"""Batches of training images, from images that are checked before training or from a stream.

A batch is a pair: images, and their classes or `None`. With `image_size`, images have that shorter side: each training step crops `resolution`
at random, and reference images are their centers. Both feeds have

- `batches`, which yields numbered batches on the device, and `reference`, which returns fixed images for pictures and evaluations;
- `channels`, `class_names` (`None` without classes), and `data_hash`, which differs for other data;
- `num_images`, `batches_per_epoch` and `hashes` of the images, all `None` for a stream, which can't be read in advance.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.images import (
    ImageDataset,
    Resolution,
    decode_image,
    find_image_column,
    import_datasets,
    load_images,
    load_split,
    local_data_files,
)
from ecvae_diffusers.training.data.transforms import center_crop


logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor | None]
# Number of undecoded images from which a stream draws the next one. Each process and worker keeps them in memory.
SHUFFLE_BUFFER_SIZE = 10_000
# Number of broken images of a stream that are named in warnings: a large crawl can hold thousands.
MAX_NAMED = 20


def check_batch_size(batch_size: int, num_images: int) -> None:
    """Raise `ValueError` if a process has fewer images than a batch."""
    if num_images < batch_size:
        raise ValueError(
            f"--train_batch_size must be at most the number of images per process ({num_images}), but is {batch_size}."
        )


class DecodedFeed:
    """Shuffled batches of an [`ImageDataset`], sharded by Accelerate. Raises `ValueError` if the data is not usable."""

    def __init__(self, data: DataConfig, accelerator: Accelerator, batch_size: int, seed: int):
        self.accelerator, self.seed, self.resolution, self.batch_size = accelerator, seed, data.resolution, batch_size
        main_process, size = accelerator.is_main_process, data.decoded_size
        self.dataset = ImageDataset(load_images(data), size, data.in_channels, data.skip_broken_images, main_process)
        checked, source = self.dataset.checked, data.train_data_dir or data.dataset_name
        if main_process and (left_out := checked.left_out()) is not None:
            logger.warning(f"Left out of {source!r}: {left_out}.")
        if main_process and (converted := checked.converted(self.dataset.channels)) is not None:
            logger.info(f"Of the images in {source!r}, {converted}: see --in_channels.")
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        num_held_out = math.ceil(data.validation_fraction * len(order))
        self.held_out, self.training = order[:num_held_out], sorted(order[num_held_out:])
        self.channels, self.num_images = self.dataset.channels, len(self.training)
        self.hashes = {checked.hashes[i] for i in self.training}
        self.labels, self.class_names = self.dataset.labels, self.dataset.pictures.class_names
        told_apart = list(checked.hashes)
        if self.labels is not None:
            told_apart += [repr(self.class_names).encode(), self.labels.numpy().tobytes()]
        self.data_hash = hashlib.sha256(b"".join(told_apart)).hexdigest()
        check_batch_size(batch_size, self.num_images // accelerator.num_processes)
        self.batches_per_epoch = self.num_images // (batch_size * accelerator.num_processes)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.dataset, self.training) if self.held_out else self.dataset,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=data.dataloader_num_workers,
            collate_fn=torch.utils.data.default_convert,  # `__getitems__` gives whole batches
            pin_memory=accelerator.device.type == "cuda",
        )
        self.loader = accelerator.prepare(loader)

    def batches(self, first_batch: int, reseed: int) -> Iterator[Batch]:
        """Yield uint8 batches (B, C, H, W) without end, from number `first_batch` on. `reseed` changes their order."""
        epoch, skipped = divmod(first_batch, self.batches_per_epoch)
        while True:
            # The sampler adds this number to the seed of the run.
            self.loader.set_epoch(epoch + reseed * 1_000_003)
            for batch in self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader:
                yield batch["images"], batch.get("labels")
            epoch, skipped = epoch + 1, 0

    def chosen(self, count: int) -> torch.Tensor:
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed))[:count]
        return torch.tensor(self.training)[order]

    def held_out_batch(self, number: int) -> Batch:
        """Return a batch of held-out images, uint8, center-cropped, on the device. Batches and processes take turns."""
        count, accelerator = self.batch_size, self.accelerator
        start = (number * accelerator.num_processes + accelerator.process_index) * count
        chosen = [self.held_out[i % len(self.held_out)] for i in range(start, start + count)]
        images = center_crop(self.dataset.images(chosen), self.resolution).to(accelerator.device)
        return images, None if self.labels is None else self.labels[chosen].to(accelerator.device)

    def reference(self, count: int) -> torch.Tensor:
        """Return at most `count` training images, uint8, center-cropped: a random choice, always the same."""
        return center_crop(self.dataset.images(self.chosen(count).tolist()), self.resolution)

    def reference_labels(self, count: int) -> torch.Tensor | None:
        """Return the classes of the images of `reference`, or `None` without classes."""
        return None if self.labels is None else self.labels[self.chosen(count)]


class StreamFeed:
    """
    Batches of a data set that is read during training (`datasets` with `streaming=True`) and need not fit on the disk.

    Each process reads its own share: whole files if their number is a multiple of the number of processes, or else every
    `num_processes`-th image. Files are shuffled, and so are images within a buffer of 10,000: images in a single file or a folder should
    therefore be stored in random order. Errors of the connection are raised, never taken for a broken image. Raises `ValueError` if the
    data is not usable.
    """

    num_images = batches_per_epoch = hashes = labels = class_names = None
    held_out: tuple[int, ...] = ()

    def __init__(self, data: DataConfig, accelerator: Accelerator, batch_size: int, seed: int):
        datasets = import_datasets()
        from datasets.distributed import split_dataset_by_node

        self.data, self.device, self.batch_size, self.seed = data, accelerator.device, batch_size, seed
        self.name, self.channels = data.dataset_name or "", data.in_channels or 3
        self.size = data.decoded_size
        self.named: set[str] = set()
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        dataset = load_split(self.name, data.dataset_config_name, None, streaming=True)
        try:
            # The columns of formats without a schema are known only from the first rows.
            dataset = dataset._resolve_features()
        except Exception as error:  # each format raises different errors
            raise ValueError(f"--dataset_name {self.name!r} can't be streamed: {error or 'it is empty'}.") from error
        self.column = find_image_column(dataset.features, self.name, data.image_column)
        # Undecoded, so that a broken image can be named.
        dataset = dataset.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        if data.max_train_samples is not None:
            dataset = dataset.take(data.max_train_samples)
        # Python rows instead of Arrow tables: a shuffle buffer of tables fails above 2 GiB ("offset overflow").
        self.dataset = dataset.map()
        if data.max_train_samples is None:
            self.share = split_dataset_by_node(self.dataset, rank=rank, world_size=num_processes)
            self.part, self.num_files = (0, 1), self.share.num_shards
        else:
            # After a split by files, `take` would return the first images of each file, not of the data set.
            self.share, self.part, self.num_files = self.dataset, (rank, num_processes), 1
        try:
            self.kept = self.first(batch_size * num_processes)
        except Exception as error:
            raise ValueError(f"--dataset_name {self.name!r} can't be streamed: {error}") from error
        check_batch_size(batch_size, len(self.kept) // num_processes)
        # Only from the first images: reading all would take as long as an epoch.
        self.data_hash = hashlib.sha256(self.kept.numpy().tobytes()).hexdigest()
        if accelerator.is_main_process and (left_out := local_data_files(self.name)[1]):
            logger.warning(f"Left out of {self.name!r}: {'; '.join(left_out)}.")

    def first(self, count: int) -> torch.Tensor:
        """Return at most `count` images from the start of the stream, in the order of its files: the same in every process."""
        chunks, missing = [self.no_images()], count
        # Small chunks, because images decoded beyond `count` are discarded.
        for images, broken in ImageChunks(self.dataset, self.column, self.size, self.channels, min(count, 64)):
            self.skip(broken)
            chunks.append(images[:missing])
            missing -= len(chunks[-1])
            if missing == 0:
                break
        return torch.cat(chunks)

    def reference(self, count: int) -> torch.Tensor:
        """Return at most `count` images from the start of the stream, uint8, center-cropped."""
        if len(self.kept) < count:
            self.kept = self.first(count)
        return center_crop(self.kept[:count], self.data.resolution)

    def reference_labels(self, count: int) -> None:
        """Return `None`: a stream has no classes."""

    def batches(self, first_batch: int, reseed: int) -> Iterator[Batch]:
        """
        Yield uint8 batches (B, C, H, W) of this process's share without end. Images left over at the end of an epoch begin the first
        batch of the next one.

        A resumed run starts an epoch in a new order, which depends on `first_batch`. To read all earlier images again would take hours
        for millions of images. `reseed` changes the order too.
        """
        num_workers = min(self.data.dataloader_num_workers, self.num_files)
        if num_workers < self.data.dataloader_num_workers:
            logger.warning(
                f"--dataloader_num_workers {self.data.dataloader_num_workers} becomes {num_workers}: each worker reads different files "
                "(with --max_train_samples, one worker reads all)."
            )
        waiting = self.no_images()
        for epoch in itertools.count():
            order = np.random.default_rng([self.seed, reseed, first_batch, epoch])
            rows = self.share.shuffle(generator=order, buffer_size=SHUFFLE_BUFFER_SIZE)
            chunks = ImageChunks(rows, self.column, self.size, self.channels, self.batch_size, self.part)
            num_images = 0
            # Without a generator, the loader would draw a number from the global one.
            for images, broken in torch.utils.data.DataLoader(
                chunks, batch_size=None, num_workers=num_workers, generator=torch.Generator()
            ):
                self.skip(broken)
                num_images += len(images)
                waiting = torch.cat([waiting, images])
                if len(waiting) >= self.batch_size:
                    yield waiting[: self.batch_size].to(self.device, non_blocking=True), None
                    waiting = waiting[self.batch_size :]
            check_batch_size(self.batch_size, num_images)

    def skip(self, broken: list[str]) -> None:
        """Warn once about each broken image. Without `--skip_broken_images`, raise `ValueError` instead."""
        if broken and not self.data.skip_broken_images:
            raise ValueError(f"{self.name!r} holds images that can't be read, such as {broken[0]}.")
        for image in broken:
            if image not in self.named and len(self.named) < MAX_NAMED:
                self.named.add(image)
                last = " Further broken images are not named." if len(self.named) == MAX_NAMED else ""
                logger.warning(f"Left out of {self.name!r}: {image}.{last}")

    def no_images(self) -> torch.Tensor:
        return torch.empty(0, self.channels, *height_and_width(self.size), dtype=torch.uint8)


class ImageChunks(torch.utils.data.IterableDataset):
    """
    Chunks of a stream: pairs of decoded images, uint8 (N, C, H, W), and the names of broken ones.

    Args:
        rows: Undecoded rows of `datasets`, which splits its files among the workers of a `DataLoader`.
        column (`str`): The column of the images.
        resolution (`int` or `list[int]`), channels (`int`): Size and channels of the decoded images.
        chunk_size (`int`): Rows per chunk.
        part (`tuple`, *optional*, defaults to `(0, 1)`): With (i, n), only every n-th row is decoded, starting with row i.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        resolution: Resolution,
        channels: int,
        chunk_size: int,
        part: tuple[int, int] = (0, 1),
    ):
        self.rows, self.column, self.resolution, self.channels = rows, column, resolution, channels
        self.chunk_size, self.part = chunk_size, part

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        rows = itertools.islice(self.rows, self.part[0], None, self.part[1])
        while chunk := list(itertools.islice(rows, self.chunk_size)):
            images, broken = [], []
            for row in chunk:
                # Outside of `try`, because a failing connection does not mean a broken image.
                source = fetch(row[self.column])
                try:
                    images.append(decode_image(source, self.channels, self.resolution))
                except Exception as error:  # PIL raises a different class for nearly every kind of damage
                    broken.append(f"{describe(source)} ({error})")
            shape = (len(images), self.channels, *height_and_width(self.resolution))
            yield torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8), broken


def fetch(source: dict | None) -> dict | None:
    """Read the bytes of an image at a URL (on another machine or in an archive). Other and missing images are not changed."""
    if source is None or source["bytes"] is not None or "://" not in (source["path"] or ""):
        return source
    from datasets.utils.file_utils import xopen

    try:
        with xopen(source["path"], "rb") as file:
            return {"bytes": file.read(), "path": source["path"]}
    except FileNotFoundError:
        return source


def describe(source: dict | None) -> str:
    """Describe where an image is. In a shuffled stream, images have no number."""
    if source is None:
        return "a row without an image"
    return source["path"] or f"an image without a path, SHA-256 {hashlib.sha256(source['bytes'] or b'').hexdigest()}"


def build_feed(
    data: DataConfig, accelerator: Accelerator, *, train_batch_size: int, seed: int
) -> DecodedFeed | StreamFeed:
    """Open and check a run's data, with `train_batch_size` images per batch and process, in an order given by `seed`."""
    return (StreamFeed if data.streaming else DecodedFeed)(data, accelerator, train_batch_size, seed)
