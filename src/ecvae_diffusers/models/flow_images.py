# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Between images and a flow: 8-bit images as draws from a density, what they cost in bits, and a flow's samples as images."""

import math

import torch


# Largest entry of a sample that a generator learns from with its whole gradient; images lie in [-1, 1].
MAX_ENTRY = 10.0
# Levels of an 8-bit image, each of width 2 / 256 in [-1, 1].
NUM_LEVELS = 256


def dequantize(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    8-bit images as draws from a density on [-1, 1): each level k becomes (k + u) / 128 - 1 with u uniform in [0, 1)
    (Theis et al. 2016, arXiv 1511.01844, section 3.1).

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Levels, in [-1, 1]: k / 127.5 - 1.
        noise (`torch.Tensor`, of the same shape): u.
    """
    levels = ((images.float() + 1.0) * 127.5).round()
    return (levels + noise) * (2.0 / NUM_LEVELS) - 1.0


def bits_per_dimension(log_prob: torch.Tensor, num_entries: int) -> torch.Tensor:
    """
    What an 8-bit image costs, in bits an entry: -log p / (D ln 2) + log2(256 / 2), for the density of dequantized images
    in [-1, 1). A bound from above on the discrete images' own.

    Args:
        log_prob (`torch.Tensor` of shape `(B,)`): Nats an image.
        num_entries (`int`): D, pixels times channels.
    """
    return -log_prob / (num_entries * math.log(2)) + math.log2(NUM_LEVELS / 2)


class AsShown(torch.autograd.Function):
    """`as_shown`: clipping, with a gradient of its own."""

    @staticmethod
    def forward(ctx, samples: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shown = samples.clamp(-1, 1)
        ctx.save_for_backward(samples - shown, weight)
        return shown

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        excess, weight = ctx.saved_tensors
        # A descent step leads an entry against its gradient: outward where the signs differ.
        return torch.where(gradient * excess < 0, 0.0, gradient * weight), None


def as_shown(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Samples as they are shown, clipped to [-1, 1], with the gradients of what they are: an entry that is out of range is
    pulled back by what it is shown as, but never pushed further out. Pushed it would be without end, because what it is shown
    as does not change: wherever data lie at the end of the range, as a black background does, and the energy falls beyond it.

    Nothing else holds a flow to that range; early in training single samples lie at 1e5, and an energy model that has seen
    them tells no images apart any more. The inverse is about as steep there as they are far, so that one of them would drown
    all others: the gradient of a sample whose largest entry m is beyond 10 is multiplied by 10 / m. Without any
    gradient a flow that has learned to make them would never be told. A sample with an infinite entry has none; what is no
    number stays so.

    Args:
        samples (`torch.Tensor` of shape `(B, C, H, W)`): F^-1(u).

    Returns:
        The samples to calibrate, and of each whether it is so far away, shape (B,).
    """
    largest = samples.detach().flatten(1).abs().amax(1)
    weight = (MAX_ENTRY / largest).clamp(max=1).view(-1, 1, 1, 1)
    return AsShown.apply(samples, weight), largest > MAX_ENTRY
