"""The parts of a training loop that every script of ours has."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ecvae_training.data import ImageDataset
from ecvae_training.noise import StepNoise


# Enough for a mean that is known to a few per cent.
NUM_VARIANCE_IMAGES = 2048


class Stopped(Exception):
    """The run was asked to end, and has saved a checkpoint."""


def endless_batches(
    accelerator: Accelerator, loader, first_batch: int, batches_per_epoch: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Numbered batches from `first_batch` on, epoch after epoch, each shuffled by the seed and its own number."""
    index = first_batch
    while True:
        epoch, skipped = divmod(index, batches_per_epoch)
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            yield index, batch
            index += 1


def clip_gradients(accelerator: Accelerator, network, optimizer, max_norm: float | None) -> torch.Tensor:
    """The Euclidean norm of a network's gradients, after which they are scaled down to `max_norm`, if one is given."""
    # Of this optimizer alone: Accelerate's own clipping would unscale the gradients of both.
    accelerator.unscale_gradients(optimizer)
    return torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf if max_norm is None else max_norm)


def to_model_range(images: torch.Tensor, random_flip: bool, noise: StepNoise) -> torch.Tensor:
    """uint8 -> [-1, 1], flipped left to right at random."""
    images = images.float() / 127.5 - 1.0
    if random_flip:
        flip = noise.uniform(images.shape[0], 1, 1, 1) < 0.5
        images = torch.where(flip, images.flip(-1), images)
    return images


@torch.no_grad()
def reconstruction_variance(vae, dataset: ImageDataset, batch_size: int, device: torch.device) -> float:
    """Mean squared reconstruction error a pixel, in the unit of images in [-1, 1], from the posterior mean."""
    indices = list(range(min(len(dataset), NUM_VARIANCE_IMAGES)))
    total = 0.0
    for start in range(0, len(indices), batch_size):
        images = dataset.__getitems__(indices[start : start + batch_size]).to(device).float() / 127.5 - 1.0
        total += (vae(images).sample.float() - images).square().mean((1, 2, 3)).sum().item()
    return total / len(indices)
