"""Images of a data set that is read while training, because it does not fit on the disk."""

import hashlib
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch

from ecvae_diffusers.training.data.images import (
    check_batch_size,
    decode_image,
    find_image_column,
    import_datasets,
    load_split,
)


logger = logging.getLogger(__name__)

# Undecoded images that each next one is drawn from, in memory in each process and worker.
SHUFFLE_BUFFER_SIZE = 10_000
# A large crawl can hold thousands of broken images: the rest are only counted.
MAX_NAMED = 20


class StreamedImages:
    """
    Images of a data set that is read while training (`datasets` with `streaming=True`), and is never on the disk as a whole.

    Each process reads its own share. If the number of files is a multiple of the number of processes, these are whole files;
    otherwise each process reads the whole stream, and decodes every `num_processes`-th image.

    The order comes from a buffer of 10,000 undecoded images, and from shuffling the files. With a single file, a folder of images
    or `max_train_samples`, the buffer alone mixes the images: store them in a random order, not sorted by class. `datasets` waits
    for 5 seconds whenever a pass over Parquet files ends.

    Args:
        dataset_name (`str`): Hub id or local folder.
        dataset_config_name (`str`, *optional*): Configuration of the data set, if it has several.
        image_column (`str`, *optional*): Column with the images. The only column of images if not given.
        max_train_samples (`int`, *optional*):
            Use only the first so many images of the stream. It is then read in the order of its files, by one worker.
        resolution (`int`): Height and width.
        channels (`int`): 1, 3 or 4. A stream can't look ahead whether every image is gray.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Skip unreadable images, count them in `num_skipped`, and warn of the first ones by name, instead of refusing them. A
            failing connection is never taken for a broken image.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
        process_index, num_processes (`int`, *optional*, default to 0 and 1): Which share of the images is this process's.

    Attributes:
        num_skipped (`int`): How often `batches` skipped an image of this process's share, again in every epoch.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the data set can't be loaded or streamed, holds no readable image, or the column does not hold images.
    """

    def __init__(
        self,
        dataset_name: str,
        dataset_config_name: str | None,
        image_column: str | None,
        max_train_samples: int | None,
        resolution: int,
        channels: int,
        skip_broken: bool = False,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        datasets = import_datasets()
        from datasets.distributed import split_dataset_by_node

        self.dataset_name, self.resolution, self.channels = dataset_name, resolution, channels
        self.skip_broken, self.seed = skip_broken, seed
        self.num_skipped, self.named = 0, set()
        dataset = load_split(dataset_name, dataset_config_name, None, streaming=True)
        try:
            # Formats without a schema show their columns only in their first rows.
            dataset = dataset._resolve_features()
        except Exception as error:  # each format has its own ways to fail
            raise ValueError(
                f"--dataset_name {dataset_name!r} can't be streamed: {str(error) or 'it is empty'}"
            ) from error
        self.column = find_image_column(dataset.features, dataset_name, image_column)
        # Undecoded, so that a broken image can be named.
        dataset = dataset.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        if max_train_samples is not None:
            dataset = dataset.take(max_train_samples)
        # Python rows instead of Arrow tables: a shuffle buffer of tables fails above 2 GiB ("offset overflow").
        self.dataset = dataset.map()
        if max_train_samples is None:
            self.share = split_dataset_by_node(self.dataset, rank=process_index, world_size=num_processes)
            self.part, self.num_files = (0, 1), self.share.num_shards
        else:
            # Split by files, `take` would take the first images of each file instead of the first of all.
            self.share, self.part, self.num_files = self.dataset, (process_index, num_processes), 1
        try:
            num_images = len(self.first(1))
        except Exception as error:
            raise ValueError(f"--dataset_name {dataset_name!r} can't be streamed: {error}") from error
        if num_images == 0:
            raise ValueError(f"--dataset_name {dataset_name!r} holds no image that can be read.")

    def first(self, count: int) -> torch.Tensor:
        """
        Read the first `count` images of the stream in the order of its files, the same in every process.

        Returns:
            `torch.Tensor` of shape `(N, C, H, W)`, uint8: fewer than `count` if the stream has fewer.

        Raises:
            ValueError: if one is unreadable, without `skip_broken`.
        """
        chunks, missing = [self.no_images()], count
        # In small chunks: what is decoded beyond `count` is thrown away.
        for images, broken in ImageChunks(self.dataset, self.column, self.resolution, self.channels, min(count, 64)):
            self.skip(broken)
            chunks.append(images[:missing])
            missing -= len(chunks[-1])
            if missing == 0:
                break
        return torch.cat(chunks)

    def batches(
        self, batch_size: int, first_batch: int = 0, reseed: int = 0, num_workers: int = 0
    ) -> Iterator[torch.Tensor]:
        """
        Give uint8 batches (batch_size, C, H, W) of this process's share without end, each epoch in another order. No image is
        dropped: the rest of an epoch starts the first batch of the next.

        A resumed run is not the uninterrupted one bit for bit: it starts an epoch in a new order, instead of reading again all that
        it has seen (hours for millions of images). If it is interrupted more often than once per epoch, it sees some images more
        often than others.

        Args:
            batch_size (`int`): Images per batch.
            first_batch (`int`, *optional*, defaults to 0): Batches that a resumed run has seen. Changes the order.
            reseed (`int`, *optional*, defaults to 0): Changes the order.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that read and decode; 0: this one. Each needs files that no other reads, so there are at most as many as
                the share has files. The order depends on their number.

        Raises:
            ValueError: from the first batch on, if the share has fewer images than a batch, or, without `skip_broken`, one is
                unreadable.
        """
        if num_workers > self.num_files:
            logger.warning(
                f"--dataloader_num_workers {num_workers} becomes {self.num_files}: each worker needs its own files, and with "
                "--max_train_samples all of them."
            )
            num_workers = self.num_files
        waiting = self.no_images()
        for epoch in itertools.count():
            num_images = 0
            for images, broken in self.epoch([self.seed, reseed, first_batch, epoch], batch_size, num_workers):
                self.num_skipped += len(broken)
                self.skip(broken)
                num_images += len(images)
                waiting = torch.cat([waiting, images])
                if len(waiting) >= batch_size:
                    yield waiting[:batch_size]
                    waiting = waiting[batch_size:]
            check_batch_size(batch_size, num_images)

    def epoch(self, seed: list[int], chunk_size: int, num_workers: int) -> torch.utils.data.DataLoader:
        """Return this process's share of one shuffled epoch, in the chunks of [`ImageChunks`]."""
        rows = self.share.shuffle(generator=np.random.default_rng(seed), buffer_size=SHUFFLE_BUFFER_SIZE)
        return torch.utils.data.DataLoader(
            ImageChunks(rows, self.column, self.resolution, self.channels, chunk_size, self.part),
            batch_size=None,
            num_workers=num_workers,
            # Or it would draw a number from the global generator.
            generator=torch.Generator(),
        )

    def skip(self, broken: list[str]) -> None:
        """Warn of broken images, of each once. Raise `ValueError` if there are some, without `skip_broken`."""
        if broken and not self.skip_broken:
            raise ValueError(f"{self.dataset_name!r} holds images that can't be read, among them: {broken[0]}.")
        for image in broken:
            if image not in self.named and len(self.named) < MAX_NAMED:
                self.named.add(image)
                last = " Further ones are not named." if len(self.named) == MAX_NAMED else ""
                logger.warning(f"Left out of {self.dataset_name!r}: {image}.{last}")

    def no_images(self) -> torch.Tensor:
        return torch.empty(0, self.channels, self.resolution, self.resolution, dtype=torch.uint8)


class ImageChunks(torch.utils.data.IterableDataset):
    """
    Pairs of decoded images, uint8 (N, C, H, W), and the names of broken ones: together `chunk_size`, fewer in the last pair.

    Args:
        rows: Undecoded images, of `datasets`, which itself splits its files among the workers of a `DataLoader`.
        column (`str`): Where they are.
        resolution (`int`), channels (`int`): What to decode them to.
        chunk_size (`int`): Rows per pair.
        part (`tuple`, *optional*): `(i, n)` decodes only every n-th row, from number i on.
    """

    def __init__(
        self, rows, column: str, resolution: int, channels: int, chunk_size: int, part: tuple[int, int] = (0, 1)
    ):
        self.rows, self.column, self.resolution, self.channels = rows, column, resolution, channels
        self.chunk_size, self.part = chunk_size, part

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        rows = itertools.islice(self.rows, self.part[0], None, self.part[1])
        while chunk := list(itertools.islice(rows, self.chunk_size)):
            images, broken = [], []
            for row in chunk:
                # Outside of `try`: a failing connection says nothing about the image.
                source = fetch(row[self.column])
                try:
                    images.append(decode_image(source, self.channels, self.resolution))
                except Exception as error:  # PIL raises a different class for nearly every kind of damage
                    broken.append(f"{describe(source)} ({error})")
            shape = (len(images), self.channels, self.resolution, self.resolution)
            yield torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8), broken


def fetch(source: dict | None) -> dict | None:
    """
    Read an image that lies on another machine or in an archive, where Pillow can't open it. One that does not exist stays as it is:
    Pillow says so. A failing connection raises whatever its file system raises.
    """
    if source is None or source["bytes"] is not None or "://" not in (source["path"] or ""):
        return source
    from datasets.utils.file_utils import xopen

    try:
        with xopen(source["path"], "rb") as file:
            return {"bytes": file.read(), "path": source["path"]}
    except FileNotFoundError:
        return source


def describe(source: dict | None) -> str:
    """Say where to find an image. In a shuffled stream it has no number."""
    if source is None:
        return "a row without an image"
    return source["path"] or f"an image without a path, SHA-256 {hashlib.sha256(source['bytes'] or b'').hexdigest()}"
