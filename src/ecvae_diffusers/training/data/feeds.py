"""Where a run's batches come from: images that were decoded before training, or a stream.

Images are of `--image_size` where that is given, of which a step crops what it trains on; those to look at are their center.
Both give `channels`, `num_images`, `batches_per_epoch` and the `hashes` of all images (`None` for a stream, which can't look
ahead), numbered batches on the device, images to look at and to measure with, and `data_hash`, which other data do not have.
"""

import hashlib
import logging
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ecvae_diffusers.training.data.files import local_data_files
from ecvae_diffusers.training.data.images import ImageDataset, collate, load_images
from ecvae_diffusers.training.data.ranges import center_crop
from ecvae_diffusers.training.data.streaming import StreamedImages


logger = logging.getLogger(__name__)


class DecodedFeed:
    """
    Shuffled batches of an [`ImageDataset`], sharded by Accelerate.

    Raises:
        ValueError: if there are fewer images than one batch a process.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        accelerator: Accelerator,
        batch_size: int,
        num_workers: int,
        seed: int,
        resolution: int | None = None,
    ):
        self.dataset = dataset
        self.resolution = resolution or dataset.resolution
        self.accelerator = accelerator
        self.seed = seed
        self.channels = dataset.channels
        self.num_images = len(dataset)
        self.hashes = set(dataset.checked.hashes)
        self.data_hash = hashlib.sha256(b"".join(dataset.checked.hashes)).hexdigest()
        self.batches_per_epoch = len(dataset) // (batch_size * accelerator.num_processes)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"--train_batch_size must be at most the number of images a process "
                f"({len(dataset) // accelerator.num_processes}), but is {batch_size}."
            )
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.loader = accelerator.prepare(loader)

    def batches(self, first_batch: int, reseed: int) -> Iterator[torch.Tensor]:
        """
        uint8 batches (B, C, H, W), epoch after epoch, from number `first_batch` on.

        Args:
            first_batch (`int`): Batches that a run which goes on has had before.
            reseed (`int`): Another number gives another order.
        """
        epoch, skipped = divmod(first_batch, self.batches_per_epoch)
        while True:
            # The sampler's seed is that of the run plus this number.
            self.loader.set_epoch(epoch + reseed * 1_000_003)
            yield from self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader
            epoch, skipped = epoch + 1, 0

    def reference(self, count: int) -> torch.Tensor:
        """At most `count` images of the data, uint8: the same ones each time, drawn at random from all; their center."""
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed))
        return center_crop(self.dataset.__getitems__(order[:count].tolist()), self.resolution)


class StreamFeed:
    """
    Batches of [`StreamedImages`], a share a process.

    Raises:
        ValueError: if there are fewer images than one batch a process.
    """

    num_images = batches_per_epoch = hashes = None

    def __init__(
        self,
        stream: StreamedImages,
        accelerator: Accelerator,
        batch_size: int,
        num_workers: int,
        resolution: int | None = None,
    ):
        self.stream = stream
        self.resolution = resolution or stream.resolution
        self.device = accelerator.device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.channels = stream.channels
        self.kept = stream.first(batch_size * accelerator.num_processes)
        if len(self.kept) < batch_size * accelerator.num_processes:
            raise ValueError(
                f"--train_batch_size must be at most the number of images a process "
                f"({len(self.kept) // accelerator.num_processes}), but is {batch_size}."
            )
        # Of the first images alone: reading all would take as long as an epoch.
        self.data_hash = hashlib.sha256(self.kept.numpy()).hexdigest()

    def batches(self, first_batch: int, reseed: int) -> Iterator[torch.Tensor]:
        for batch in self.stream.batches(self.batch_size, first_batch, reseed, self.num_workers):
            yield batch.to(self.device, non_blocking=True)

    def reference(self, count: int) -> torch.Tensor:
        """At most `count` images, the first of the stream, uint8; their center."""
        if len(self.kept) < count:
            self.kept = self.stream.first(count)
        return center_crop(self.kept[:count], self.resolution)


def build_feed(args, accelerator: Accelerator) -> DecodedFeed | StreamFeed:
    """The data that the command line names, opened and checked. Raises what `load_images` and the feeds raise."""
    size = args.image_size or args.resolution
    if args.streaming:
        stream = StreamedImages(
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            args.cache_dir,
            args.max_train_samples,
            size,
            args.in_channels,
            skip_broken=args.skip_broken_images,
            shuffle_buffer_size=args.shuffle_buffer_size,
            seed=args.seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        if accelerator.is_main_process and (left_out := local_data_files(args.dataset_name)[1]):
            logger.warning(f"Left out of {args.dataset_name!r}: {'; '.join(left_out)}.")
        return StreamFeed(stream, accelerator, args.train_batch_size, args.dataloader_num_workers, args.resolution)
    images = load_images(
        args.dataset_name,
        args.dataset_config_name,
        args.train_data_dir,
        args.image_column,
        args.cache_dir,
        args.max_train_samples,
    )
    main_process = accelerator.is_main_process
    dataset = ImageDataset(images, size, args.in_channels, args.skip_broken_images, progress=main_process)
    source = args.train_data_dir or args.dataset_name
    if main_process and (left_out := dataset.checked.left_out()) is not None:
        logger.warning(f"Left out of {source!r}: {left_out}.")
    if main_process and (converted := dataset.checked.converted(dataset.channels)) is not None:
        logger.info(f"Of the images in {source!r}, {converted}: see --in_channels.")
    return DecodedFeed(
        dataset, accelerator, args.train_batch_size, args.dataloader_num_workers, args.seed, args.resolution
    )
