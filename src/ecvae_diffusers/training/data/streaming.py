"""Images of a data set that is read while training, for what doesn't fit on the disk."""

import hashlib
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch

from ecvae_diffusers.training.data.images import collate, decode_image, find_image_column, import_datasets, load_split


logger = logging.getLogger(__name__)

# A large crawl can hold thousands of broken images: the rest are counted only.
MAX_NAMED = 20


class StreamedImages:
    """
    Images of a data set that is read while training (`datasets` with `streaming=True`): never on the disk as a whole.

    Each process reads its own share. Where the number of files is a multiple of the number of processes, these are
    whole files; otherwise each process reads the whole stream, and decodes every `num_processes`-th image of it.

    The order comes from a buffer of `shuffle_buffer_size` undecoded images, in memory in each process and worker, and
    from shuffling the order of the files. Where there is only one file, or one folder of images, or with
    `max_train_samples`, the buffer alone mixes the images: make it large if they lie sorted by class. `datasets` waits
    5 seconds whenever a pass over Parquet files ends.

    Args:
        dataset_name (`str`): Hub id or local folder.
        dataset_config_name (`str`, *optional*): Configuration of the data set, where it has several.
        image_column (`str`, *optional*): Column with the images. The only column of images if not given.
        cache_dir (`str`, *optional*): Where `datasets` keeps the little that it downloads.
        max_train_samples (`int`, *optional*):
            Use the first so many images of the stream only. It is then read in the order of its files, by one worker.
        resolution (`int`): Height and width.
        channels (`int`): 1, 3 or 4. A stream can't look ahead whether every image is gray.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Pass over images that can't be read, count them in `num_skipped`, and name the first ones, each once, in
            warnings. Otherwise they are refused. A failing connection is never taken for a broken image.
        shuffle_buffer_size (`int`, *optional*, defaults to 10000): Images that each next one is drawn from.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
        process_index (`int`, *optional*, defaults to 0): Which process this is.
        num_processes (`int`, *optional*, defaults to 1): How many processes train together.

    Attributes:
        channels (`int`): As given.
        num_skipped (`int`): How often `batches` passed over a broken image, anew in every epoch, of this process's share.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the data set can't be loaded or streamed, holds no image that can be read, or the column is not
            one of images.
    """

    def __init__(
        self,
        dataset_name: str,
        dataset_config_name: str | None,
        image_column: str | None,
        cache_dir: str | None,
        max_train_samples: int | None,
        resolution: int,
        channels: int,
        skip_broken: bool = False,
        shuffle_buffer_size: int = 10_000,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        datasets = import_datasets()
        from datasets.distributed import split_dataset_by_node

        self.dataset_name = dataset_name
        self.resolution = resolution
        self.channels = channels
        self.skip_broken = skip_broken
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.num_skipped = 0
        self.named: set[str] = set()

        dataset = load_split(dataset_name, dataset_config_name, cache_dir, streaming=True)
        try:
            # Formats without a schema show their columns in their first rows only.
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
            self.part = (0, 1)
            self.num_files = self.share.num_shards
        else:
            # Split by files, `take` would take the first images of each file instead of the first of all.
            self.share = self.dataset
            self.part = (process_index, num_processes)
            self.num_files = 1
        try:
            num_images = len(self.first(1))
        except Exception as error:
            raise ValueError(f"--dataset_name {dataset_name!r} can't be streamed: {error}") from error
        if num_images == 0:
            raise ValueError(f"--dataset_name {dataset_name!r} holds no image that can be read.")

    def first(self, count: int) -> torch.Tensor:
        """
        The first `count` images of the stream, fewer if it has fewer: uint8 (N, C, H, W), in the order of its files,
        the same in every process.

        Raises:
            ValueError: if one can't be read, without `skip_broken`.
        """
        chunks, missing = [self.no_images()], count
        # In small chunks: what is decoded beyond `count` is thrown away.
        for images, broken in ImageChunks(self.dataset, self.column, self.resolution, self.channels, min(count, 64)):
            self.pass_over(broken)
            chunks.append(images[:missing])
            missing -= len(chunks[-1])
            if missing == 0:
                break
        return torch.cat(chunks)

    def batches(
        self, batch_size: int, first_batch: int = 0, reseed: int = 0, num_workers: int = 0
    ) -> Iterator[torch.Tensor]:
        """
        uint8 batches (batch_size, C, H, W) of this process's share without end, each epoch in another order. No image
        is dropped: what is left at the end of an epoch starts the first batch of the next.

        A run that goes on does not go on bit for bit: instead of reading, in vain, all that it has had before (hours
        for millions of images), it starts an epoch in a new order. Over a run that is cut more often than an epoch
        lasts, some images are then seen more often than others.

        Args:
            batch_size (`int`): Images a batch.
            first_batch (`int`, *optional*, defaults to 0):
                Batches that a run which goes on has had before. Another number gives another order.
            reseed (`int`, *optional*, defaults to 0): Another number gives another order.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that read and decode; 0: this one. Each needs files of its own, so there are at most as many
                as the share has files. The order depends on their number.

        Raises:
            ValueError: from the first batch on, if the share has fewer images than a batch, or, without `skip_broken`,
                one can't be read.
        """
        if num_workers > self.num_files:
            logger.warning(
                f"--dataloader_num_workers {num_workers} becomes {self.num_files}: a worker needs files of its own, "
                "and with --max_train_samples all of them."
            )
            num_workers = self.num_files
        waiting = self.no_images()
        for epoch in itertools.count():
            num_images = 0
            for images, broken in self.epoch([self.seed, reseed, first_batch, epoch], batch_size, num_workers):
                self.num_skipped += len(broken)
                self.pass_over(broken)
                num_images += len(images)
                waiting = torch.cat([waiting, images])
                if len(waiting) >= batch_size:
                    yield waiting[:batch_size]
                    waiting = waiting[batch_size:]
            if num_images < batch_size:
                raise ValueError(
                    f"--train_batch_size must be at most the number of images a process ({num_images}), "
                    f"but is {batch_size}."
                )

    def epoch(self, seed: list[int], chunk_size: int, num_workers: int) -> torch.utils.data.DataLoader:
        """This process's share of one shuffled epoch, in the chunks of [`ImageChunks`]."""
        rows = self.share.shuffle(generator=np.random.default_rng(seed), buffer_size=self.shuffle_buffer_size)
        return torch.utils.data.DataLoader(
            ImageChunks(rows, self.column, self.resolution, self.channels, chunk_size, self.part),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=collate,
            # Or it would draw a number from the global generator.
            generator=torch.Generator(),
        )

    def pass_over(self, broken: list[str]) -> None:
        """Raises `ValueError` if there are broken images without `skip_broken`; else names them, each once."""
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
    Pairs of decoded images, uint8 (N, C, H, W), and the names of broken ones: together `chunk_size` of them, fewer in
    the last pair.

    Args:
        rows: Undecoded images, of `datasets`, which splits its files among the workers of a `DataLoader` itself.
        column (`str`): Where they are.
        resolution (`int`): Height and width.
        channels (`int`): 1, 3 or 4.
        chunk_size (`int`): Rows a pair.
        part (`tuple`, *optional*): `(i, n)` leaves all but every n-th row, from number i on, out undecoded.
    """

    def __init__(
        self, rows, column: str, resolution: int, channels: int, chunk_size: int, part: tuple[int, int] = (0, 1)
    ):
        self.rows = rows
        self.column = column
        self.resolution = resolution
        self.channels = channels
        self.chunk_size = chunk_size
        self.part = part

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[str]]]:
        rows = itertools.islice(self.rows, self.part[0], None, self.part[1])
        while chunk := list(itertools.islice(rows, self.chunk_size)):
            images, broken = [], []
            for row in chunk:
                # Not among what is caught: a failing connection says nothing of the image.
                source = fetch(row[self.column])
                try:
                    images.append(decode_image(source, self.channels, self.resolution))
                except Exception as error:  # PIL raises a different class for nearly every kind of damage
                    broken.append(f"{describe(source)} ({error})")
            shape = (len(images), self.channels, self.resolution, self.resolution)
            yield torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8), broken


def fetch(source: dict | None) -> dict | None:
    """
    Read an image that lies on another machine or in an archive, where Pillow can't open it. One that does not exist is
    left as it is, for Pillow to say so; a failing connection raises whatever its file system raises.
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
    """What to find an image by. In a shuffled stream it has no number."""
    if source is None:
        return "a row without an image"
    return source["path"] or f"an image without a path, SHA-256 {hashlib.sha256(source['bytes'] or b'').hexdigest()}"
