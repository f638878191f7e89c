# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measurements of single pixels: all, some, or their gray values."""

from typing import Self

import torch

from .linear_operator import LinearOperator


class Denoising(LinearOperator):
    """The identity A x = x: the measurement is the image with noise."""

    row_norm = 1.0
    is_diagonal = True

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y


class Inpainting(LinearOperator):
    """
    A mask: A x = m x, pixel by pixel. A measurement has the image's shape, and is 0 where nothing was observed: middle gray in a
    tensor, black in a picture.

    Args:
        mask (`torch.Tensor` of shape `(H, W)`, `(1 or C, H, W)` or `(B, 1 or C, H, W)`):
            1 (True) where a pixel is OBSERVED, 0 (False) where it is missing. The last shape has one mask per image.
    """

    row_norm = 1.0
    is_diagonal = True
    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor):
        if mask.ndim not in (2, 3, 4):
            raise ValueError(f"`mask` must have shape (H, W), (C, H, W) or (B, C, H, W), but has {tuple(mask.shape)}.")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("`mask` must hold only 0 (missing) and 1 (observed).")
        super().__init__(mask=mask.bool())
        self.is_the_same_for_all_images = mask.ndim < 4 or len(mask) == 1

    @classmethod
    def box(cls, height: int, width: int, top: int, left: int, box_height: int, box_width: int) -> Self:
        """Return the operator of a missing box, in pixels, whose first row and column are `top` and `left`."""
        bottom, right = top + box_height, left + box_width
        if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
            raise ValueError(f"`box_height` {box_height} and `box_width` {box_width} must fit {height}x{width} px.")
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[top:bottom, left:right] = False
        return cls(mask)

    @classmethod
    def random(
        cls,
        height: int,
        width: int,
        observed: float,
        generator: torch.Generator | None = None,
        num_masks: int | None = None,
    ) -> Self:
        """
        Return an operator that observes each pixel, in all its channels, with probability `observed`. With `num_masks`, it has
        one mask for each image of a batch of that size.
        """
        if not 0 <= observed <= 1:
            raise ValueError(f"`observed` must be from 0 to 1, but is {observed}.")
        shape = (height, width) if num_masks is None else (num_masks, 1, height, width)
        return cls(torch.rand(shape, generator=generator) < observed)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        *channels, height, width = self.mask.shape[-3:]
        count = len(self.mask) if self.mask.ndim == 4 else 1
        if [height, width] != [*x.shape[2:]] or channels not in ([], [1], [x.shape[1]]) or count not in (1, len(x)):
            raise ValueError(f"`mask` of shape {tuple(self.mask.shape)} does not fit images of {tuple(x.shape)}.")
        return x * self.mask.to(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.A(y)

    def measurement_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(image_shape)  # one image has this shape even with several masks


class Colorization(LinearOperator):
    """
    The gray value of each pixel: y = sum_c w_c x_c.

    Args:
        weights (`tuple[float]`, *optional*, defaults to `(0.299, 0.587, 0.114)`):
            w, one per channel. Defaults to the weights of red, green and blue in PIL's `convert("L")`.
    """

    def __init__(self, weights: tuple[float, ...] = (0.299, 0.587, 0.114)):
        weights = tuple(float(weight) for weight in weights)
        super().__init__(weights=weights)
        self.row_norm = sum(w * w for w in weights)
        if not 0 < self.row_norm < float("inf"):
            raise ValueError(f"`weights` must be finite and not all 0, but are {weights}.")
        self.weights = weights

    def column(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_tensor(self.weights).view(1, -1, 1, 1)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != len(self.weights):
            raise ValueError(f"`weights` are for {len(self.weights)} channel(s), but images have {x.shape[1]}.")
        return (x * self.column(x)).sum(1, keepdim=True)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.column(y)
