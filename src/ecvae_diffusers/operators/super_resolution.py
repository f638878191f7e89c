# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measurements of fewer, larger pixels."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from . import separable
from .linear_operator import LinearOperator, check_damping


MODES = ("average", "bicubic", "decimation")
# Cutoff of the bicubic pseudo-inverse, whose condition number is below 3.
RCOND = 1e-10


@lru_cache(maxsize=32)
def bicubic_factors(size: int, scale: int) -> separable.Factors:
    """Decompose the matrix that resizes a line of `size` pixels as PIL does (BICUBIC: antialiased, a = -0.5)."""
    with separable.kept_for_gradients():
        lines = torch.eye(size, dtype=torch.float64)[None, None]
        matrix = F.interpolate(lines, (size // scale, size), mode="bicubic", antialias=True, align_corners=False)
        return separable.factorize(matrix[0, 0])


class SuperResolution(LinearOperator):
    """
    A lower resolution: (B, C, H, W) to (B, C, H / scale, W / scale).

    Args:
        scale (`int`): Pixels that become one in each direction; must divide H and W.
        mode (`str`, *optional*, defaults to `"average"`):
            `"average"` is the mean of scale x scale pixels, `"bicubic"` is PIL's `image.resize(..., Image.BICUBIC)` (with
            antialiasing), `"decimation"` is the first pixel of scale x scale.
    """

    def __init__(self, scale: int, mode: str = "average"):
        if scale < 1:
            raise ValueError(f"`scale` must be at least 1, but is {scale}.")
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, but is {mode!r}.")
        super().__init__(scale=scale, mode=mode)
        self.scale, self.mode = scale, mode
        self.row_norm = {"average": 1 / scale**2, "bicubic": None, "decimation": 1.0}[mode]

    def factors(self, height: int, width: int) -> tuple[separable.Factors, separable.Factors]:
        return bicubic_factors(height, self.scale), bicubic_factors(width, self.scale)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self.measurement_shape(tuple(x.shape[1:]))
        if self.mode == "average":
            return F.avg_pool2d(x, self.scale)
        if self.mode == "decimation":
            return x[..., :: self.scale, :: self.scale]
        rows, columns = self.factors(*x.shape[-2:])
        return separable.apply(rows.matrix, columns.matrix, x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        height, width = (size * self.scale for size in y.shape[-2:])
        if self.mode == "average":
            return F.interpolate(y, (height, width), mode="nearest") / self.scale**2
        if self.mode == "decimation":
            x = y.new_zeros(*y.shape[:-2], height, width)
            x[..., :: self.scale, :: self.scale] = y
            return x
        rows, columns = self.factors(height, width)
        return separable.apply(rows.matrix.mT, columns.matrix.mT, y)

    def A_dagger(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        check_damping(damping)
        if self.mode != "bicubic":
            return super().A_dagger(y, damping)
        rows, columns = self.factors(*(size * self.scale for size in y.shape[-2:]))
        return separable.inverse(rows, columns, y, damping, RCOND)

    def measurement_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = image_shape
        if height % self.scale or width % self.scale:
            raise ValueError(f"`scale` {self.scale} must divide the image's {height}x{width} pixels.")
        return channels, height // self.scale, width // self.scale
