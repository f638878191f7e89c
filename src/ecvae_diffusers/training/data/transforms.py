"""Transforms of batches of images and labels: range, crop, flip, hidden classes."""

from collections.abc import Sequence

import torch

from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.training.randomness import StepNoise


def to_range(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert [-1, 1] to the nearest uint8, clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def center_crop(images: torch.Tensor, size: int | Sequence[int]) -> torch.Tensor:
    """Crop images (..., H, W) to their center. `size` is its height and width, or one number for a square."""
    height, width = height_and_width(size)
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def crop_at_random(images: torch.Tensor, size: int | Sequence[int], noise: StepNoise) -> torch.Tensor:
    """Crop each image at a random place. `size` is the height and width, or one number for a square."""
    height, width = height_and_width(size)
    free = torch.tensor([images.shape[2] - height + 1, images.shape[3] - width + 1])
    places = (noise.uniform(len(images), 2).cpu() * free).long().tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, places)])


def flip_at_random(images: torch.Tensor, noise: StepNoise) -> torch.Tensor:
    """Flip each image horizontally with probability 1/2."""
    flip = noise.uniform(images.shape[0], 1, 1, 1) < 0.5
    return torch.where(flip, images.flip(-1), images)


def forget_classes(labels: torch.Tensor, probability: float, unknown: int, noise: StepNoise) -> torch.Tensor:
    """Replace each label, with `probability`, by the label of the unknown class."""
    return torch.where(noise.uniform(len(labels)) < probability, unknown, labels)


def batch_spread(images: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation over the batch, averaged over pixels and channels. It is 0 if all images are the same."""
    return images.float().std(0, correction=0).mean()
