# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measurements at a lower resolution."""

import torch
import torch.nn.functional as F

from . import solvers
from .linear_operator import LinearOperator


class SuperResolution(LinearOperator):
    """
    Downsampling: (B, C, H, W) to (B, C, H / scale, W / scale).

    Args:
        scale (`int`): Factor in each direction, at least 1; must divide H and W.
        mode (`str`, *optional*, defaults to `"average"`):
            `"average"` is the mean of scale x scale pixels, `"bicubic"` is PIL's `image.resize(..., Image.BICUBIC)` (with
            antialiasing), `"decimation"` keeps the first pixel of scale x scale.
    """

    def __init__(self, scale: int, mode: str = "average"):
        if scale < 1:
            raise ValueError(f"`scale` must be at least 1, but is {scale}.")
        norms = {"average": 1 / scale**2, "bicubic": None, "decimation": 1.0}
        if mode not in norms:
            raise ValueError(f"`mode` must be one of {', '.join(norms)}, but is {mode!r}.")
        super().__init__(scale=scale, mode=mode)
        self.scale, self.mode, self.row_norm = scale, mode, norms[mode]

    def resizing(self, size: int) -> solvers.Factors:
        """Decompose the matrix that resizes a line of `size` pixels as PIL does (BICUBIC: antialiased, a = -0.5)."""

        def matrix() -> torch.Tensor:
            lines = torch.eye(size, dtype=torch.float64)[None, None]
            small = (size // self.scale, size)
            return F.interpolate(lines, small, mode="bicubic", antialias=True, align_corners=False)[0, 0]

        return self.decomposed((size,), matrix)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        if any(size % self.scale for size in x.shape[-2:]):
            raise ValueError(f"`scale` {self.scale} must divide the height and width of images of {tuple(x.shape)}.")
        if self.mode == "average":
            return F.avg_pool2d(x, self.scale)
        if self.mode == "decimation":
            return x[..., :: self.scale, :: self.scale]
        rows, columns = map(self.resizing, x.shape[-2:])
        return solvers.apply(rows.matrix, columns.matrix, x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        height, width = (size * self.scale for size in y.shape[-2:])
        if self.mode == "average":
            return F.interpolate(y, (height, width), mode="nearest") / self.scale**2
        if self.mode == "decimation":
            x = y.new_zeros(*y.shape[:-2], height, width)
            x[..., :: self.scale, :: self.scale] = y
            return x
        return solvers.apply(self.resizing(height).matrix.mT, self.resizing(width).matrix.mT, y)

    def A_dagger(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        if self.mode != "bicubic":
            return super().A_dagger(y, damping)
        rows, columns = (self.resizing(size * self.scale) for size in y.shape[-2:])
        # The condition number is below 3, so `rcond` leaves nothing out.
        return solvers.inverse(rows, columns, y, damping, rcond=1e-10)
