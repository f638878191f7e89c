"""Batches for a run: of images that were decoded before training, or of a stream.

Images have `image_size` if that is given, and each step crops `resolution` from them; those to look at are their center. Both
classes give `channels`, `num_images`, `batches_per_epoch` and the `hashes` of all images (`None` for a stream, which can't look
ahead), numbered batches on the device, images to look at and to measure with, and `data_hash`, which tells data apart.
"""

import hashlib
import logging
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ecvae_diffusers.training.data.files import local_data_files
from ecvae_diffusers.training.data.images import ImageDataset, check_batch_size, load_images
from ecvae_diffusers.training.data.streaming import StreamedImages
from ecvae_diffusers.training.data.transforms import center_crop


logger = logging.getLogger(__name__)


class DecodedFeed:
    """
    Shuffled batches of an [`ImageDataset`], sharded by Accelerate.

    Raises:
        ValueError: if there are fewer images than one batch per process.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        accelerator: Accelerator,
        batch_size: int,
        num_workers: int,
        seed: int,
        resolution: int,
    ):
        self.dataset, self.accelerator = dataset, accelerator
        self.seed, self.resolution = seed, resolution
        self.channels, self.num_images = dataset.channels, len(dataset)
        self.hashes = set(dataset.checked.hashes)
        self.data_hash = hashlib.sha256(b"".join(dataset.checked.hashes)).hexdigest()
        check_batch_size(batch_size, len(dataset) // accelerator.num_processes)
        self.batches_per_epoch = len(dataset) // (batch_size * accelerator.num_processes)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            collate_fn=torch.utils.data.default_convert,  # `__getitems__` gives whole batches
            pin_memory=accelerator.device.type == "cuda",
        )
        self.loader = accelerator.prepare(loader)

    def batches(self, first_batch: int, reseed: int) -> Iterator[torch.Tensor]:
        """
        Give uint8 batches (B, C, H, W), epoch after epoch, from number `first_batch` on.

        Args:
            first_batch (`int`): Batches that a resumed run has seen.
            reseed (`int`): Changes the order.
        """
        epoch, skipped = divmod(first_batch, self.batches_per_epoch)
        while True:
            # The sampler's seed is that of the run plus this number.
            self.loader.set_epoch(epoch + reseed * 1_000_003)
            yield from self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader
            epoch, skipped = epoch + 1, 0

    def reference(self, count: int) -> torch.Tensor:
        """Return the center of at most `count` images, uint8: drawn at random from all, always the same ones."""
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed))
        return center_crop(self.dataset.__getitems__(order[:count].tolist()), self.resolution)


class StreamFeed:
    """
    Batches of [`StreamedImages`], a share per process.

    Raises:
        ValueError: if there are fewer images than one batch per process.
    """

    num_images = batches_per_epoch = hashes = None

    def __init__(
        self, stream: StreamedImages, accelerator: Accelerator, batch_size: int, num_workers: int, resolution: int
    ):
        self.stream, self.device, self.resolution = stream, accelerator.device, resolution
        self.batch_size, self.num_workers, self.channels = batch_size, num_workers, stream.channels
        self.kept = stream.first(batch_size * accelerator.num_processes)
        check_batch_size(batch_size, len(self.kept) // accelerator.num_processes)
        # Of the first images alone: reading all would take as long as an epoch.
        self.data_hash = hashlib.sha256(self.kept.numpy()).hexdigest()

    def batches(self, first_batch: int, reseed: int) -> Iterator[torch.Tensor]:
        for batch in self.stream.batches(self.batch_size, first_batch, reseed, self.num_workers):
            yield batch.to(self.device, non_blocking=True)

    def reference(self, count: int) -> torch.Tensor:
        """Return the center of at most `count` images, uint8: the first ones of the stream."""
        if len(self.kept) < count:
            self.kept = self.stream.first(count)
        return center_crop(self.kept[:count], self.resolution)


def build_feed(data, accelerator: Accelerator, *, train_batch_size: int, seed: int) -> DecodedFeed | StreamFeed:
    """
    Open and check a run's data. Raises what `load_images` and the feeds raise.

    Args:
        data: The options of the data, such as `dataset_name`, `train_data_dir`, `resolution` and `streaming`.
        accelerator (`Accelerator`): Of the run.
        train_batch_size (`int`): Images per batch and process.
        seed (`int`): Seed of the order.
    """
    size, source = data.image_size or data.resolution, data.train_data_dir or data.dataset_name
    if data.streaming:
        stream = StreamedImages(
            data.dataset_name,
            data.dataset_config_name,
            data.image_column,
            data.max_train_samples,
            size,
            data.in_channels,
            skip_broken=data.skip_broken_images,
            seed=seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        if accelerator.is_main_process and (left_out := local_data_files(source)[1]):
            logger.warning(f"Left out of {source!r}: {'; '.join(left_out)}.")
        return StreamFeed(stream, accelerator, train_batch_size, data.dataloader_num_workers, data.resolution)
    pictures = load_images(
        data.dataset_name,
        data.dataset_config_name,
        data.train_data_dir,
        data.image_column,
        None,
        data.max_train_samples,
    )
    main_process = accelerator.is_main_process
    dataset = ImageDataset(pictures, size, data.in_channels, data.skip_broken_images, progress=main_process)
    if main_process and (left_out := dataset.checked.left_out()) is not None:
        logger.warning(f"Left out of {source!r}: {left_out}.")
    if main_process and (converted := dataset.checked.converted(dataset.channels)) is not None:
        logger.info(f"Of the images in {source!r}, {converted}: see --in_channels.")
    return DecodedFeed(dataset, accelerator, train_batch_size, data.dataloader_num_workers, seed, data.resolution)
