# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Dequantization of images, bits per dimension, and clipping of samples, for flows."""

import math

import torch


# The gradient of a sample is scaled down if an entry exceeds this; images lie in [-1, 1].
MAX_ENTRY = 10.0
# Levels of an 8-bit image, each of width 2 / 256 in [-1, 1].
NUM_LEVELS = 256


def dequantize(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Turn 8-bit images into draws from a density on [-1, 1): each level k becomes (k + u) / 128 - 1 with u uniform in [0, 1) (Theis
    et al. 2016, arXiv 1511.01844, section 3.1).

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): 8-bit images in [-1, 1]: k / 127.5 - 1.
        noise (`torch.Tensor` of the same shape): The uniform draws u.
    """
    levels = ((images.float() + 1.0) * 127.5).round()
    return (levels + noise) * (2.0 / NUM_LEVELS) - 1.0


def bits_per_dimension(log_prob: torch.Tensor, num_entries: int) -> torch.Tensor:
    """
    Return the bits per entry of 8-bit images, -log p / (D ln 2) + log2(256 / 2), for the density p of dequantized images in
    [-1, 1). It is an upper bound on the bits of the discrete images.

    Args:
        log_prob (`torch.Tensor` of shape `(B,)`): Nats per image.
        num_entries (`int`): D, pixels times channels.
    """
    return -log_prob / (num_entries * math.log(2)) + math.log2(NUM_LEVELS / 2)


class AsShown(torch.autograd.Function):
    """Clipping with the gradient that `as_shown` describes."""

    @staticmethod
    def forward(ctx, samples: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shown = samples.clamp(-1, 1)
        ctx.save_for_backward(samples - shown, weight)
        return shown

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        excess, weight = ctx.saved_tensors
        # A descent step moves an entry against its gradient: outward if the signs differ.
        return torch.where(gradient * excess < 0, 0.0, gradient * weight), None


def as_shown(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Clip samples to [-1, 1], as they are displayed. The gradient pulls out-of-range entries back and never pushes them further out.
    A clipped entry looks the same however far out it is, so an energy that falls beyond the range, as for data on a black
    background, would push it out without end.

    Nothing else bounds a flow. Early in training, single samples can reach 1e5, and an energy model that has seen them no longer
    tells images apart. The gradient of such a sample grows with its size and would dominate all others: if the largest entry m
    exceeds 10, the gradient is therefore multiplied by 10 / m (0 for an infinite entry). It is not removed, because the flow would
    then never learn to avoid such samples. NaN stays NaN.

    Args:
        samples (`torch.Tensor` of shape `(B, C, H, W)`): F^-1(u).

    Returns:
        The clipped samples, and whether each sample has an entry above 10, shape (B,), bool.
    """
    largest = samples.detach().flatten(1).abs().amax(1)
    weight = (MAX_ENTRY / largest).clamp(max=1).view(-1, 1, 1, 1)
    return AsShown.apply(samples, weight), largest > MAX_ENTRY
