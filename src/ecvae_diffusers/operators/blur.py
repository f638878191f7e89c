# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Convolutions of an image with a kernel."""

import math

import torch
import torch.nn.functional as F

from . import solvers
from .linear_operator import DENSE_ENTRIES, LinearOperator


# If the second singular value of a kernel is below RANK_ONE times the first, the kernel is replaced by a column times a row. Below
# RANK_ONE_EXACTLY, it already is one.
RANK_ONE, RANK_ONE_EXACTLY = 1e-6, 1e-14


class Blur(LinearOperator):
    """
    Convolution of each channel with one kernel: y = k * x, in the image's size.

    Singular values of a blur go down to 0. A^+ leaves out those up to `rcond` times the largest, because inverting them would turn
    rounding errors into large noise. A A^+ A equals A up to `rcond`.

    Args:
        kernel (`torch.Tensor` of shape `(h, w)`): k, with its centre at (h // 2, w // 2). A sum of 1 keeps the brightness. See
            [`gaussian_kernel`], [`uniform_kernel`] and [`motion_kernel`].
        padding (`str`, *optional*, defaults to `"circular"`):
            What lies beyond the border. `"circular"` is the opposite side; A^+ then divides spectra. `"reflect"` is the mirror
            image without the border pixel; A^+ then decomposes two small matrices if the kernel is a column times a row, and
            otherwise the whole matrix for images of up to 1,024 pixels. For larger images CGLS computes A^+ and ignores
            `rcond`. Without noise, the relative residual of restorations is then at most 3e-4.
        rcond (`float`, *optional*, defaults to 1e-3): The cutoff of singular values, at least 0 and below 1.
    """

    kernel: torch.Tensor

    def __init__(self, kernel: torch.Tensor, padding: str = "circular", rcond: float = 1e-3):
        if kernel.ndim != 2 or not kernel.isfinite().all() or not kernel.any():
            raise ValueError("`kernel` must have shape (h, w) and finite values that are not all 0.")
        if padding not in ("circular", "reflect"):
            raise ValueError(f"`padding` must be circular or reflect, but is {padding!r}.")
        if not 0 <= rcond < 1:
            raise ValueError(f"`rcond` must be at least 0 and below 1, but is {rcond}.")
        kernel = kernel.cpu().double()
        left, values, right = torch.linalg.svd(kernel, full_matrices=False)
        second = (values[1] / values[0]).item() if len(values) > 1 else 0.0
        column_and_row = (left[:, 0] * values[0], right[0])
        if RANK_ONE_EXACTLY < second < RANK_ONE:
            kernel = torch.outer(*column_and_row)
        super().__init__(kernel=kernel, padding=padding, rcond=rcond)
        self.padding, self.rcond = padding, rcond
        self.column_and_row = column_and_row if second < RANK_ONE else None

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self.check_size(x)
        if self.padding == "circular":
            return self.filtered(x, self.transfer(x))
        rows, columns = (self.mirrored(dim, x.shape[dim - 2]).to(x.device) for dim in (0, 1))
        padded = x.index_select(-2, rows).index_select(-1, columns)
        blurred = F.conv2d(padded.flatten(0, 1).unsqueeze(1), self.weight(padded))
        return blurred.squeeze(1).unflatten(0, padded.shape[:2])

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self.check_size(y)
        if self.padding == "circular":
            return self.filtered(y, self.transfer(y).conj())
        rows, columns = (self.mirrored(dim, y.shape[dim - 2]).to(y.device) for dim in (0, 1))
        spread = F.conv_transpose2d(y.flatten(0, 1).unsqueeze(1), self.weight(y)).unflatten(0, y.shape[:2]).squeeze(2)
        # Values beyond the border are added to the pixels that they mirror.
        folded = spread.new_zeros(*y.shape[:3], len(columns))[..., : y.shape[2], :].index_add(-2, rows, spread)
        return folded.new_zeros(y.shape).index_add(-1, columns, folded)

    def A_dagger(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        if self.padding == "circular":
            exact = y if y.device.type == "mps" else y.double()
            transfer = self.transfer(exact)
            power = transfer.abs().square()
            if damping > 0:
                inverse = transfer.conj() / (power + damping)
            else:
                kept = power > self.rcond**2 * power.max()
                inverse = torch.where(kept, transfer.conj() / power.clamp(min=1e-300), 0.0)
            return self.filtered(exact, inverse).to(y.dtype)
        if self.column_and_row is not None:
            rows, columns = (self.line(part, dim, y.shape[dim - 2]) for dim, part in enumerate(self.column_and_row))
            return solvers.inverse(rows, columns, y, damping, self.rcond)
        if y.shape[-2] * y.shape[-1] > DENSE_ENTRIES:
            return self.solve(y, damping)
        return self.solve_densely(y.flatten(0, 1), (1, *y.shape[-2:]), damping).view(y.shape)

    def check_size(self, x: torch.Tensor) -> None:
        if any(k > size for k, size in zip(self.kernel.shape, x.shape[-2:])):  # a mirror image has size - 1 pixels
            raise ValueError(
                f"`kernel` of shape {tuple(self.kernel.shape)} is larger than images of {tuple(x.shape[-2:])}."
            )

    def transfer(self, like: torch.Tensor) -> torch.Tensor:
        """Return the kernel's spectrum at the size of `like`, in its precision or in float32, which FFTs need at least."""
        height, width = like.shape[-2:]
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        placed = like.new_zeros(height, width)
        placed[: self.kernel.shape[0], : self.kernel.shape[1]] = self.kernel.to(like)
        centre = (-(self.kernel.shape[0] // 2), -(self.kernel.shape[1] // 2))
        return torch.fft.rfft2(placed.roll(centre, (0, 1)))

    @staticmethod
    def filtered(x: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x.to(transfer.real.dtype)) * transfer, s=x.shape[-2:]).to(x.dtype)

    def weight(self, like: torch.Tensor) -> torch.Tensor:
        # `conv2d` correlates, so the kernel is flipped.
        return self.kernel.to(like).flip(0, 1)[None, None]

    def mirrored(self, dim: int, size: int) -> torch.Tensor:
        """Return the index of the pixel at each place of a line of `size` pixels after padding by reflection."""
        length = self.kernel.shape[dim]
        before = length - 1 - length // 2
        places = torch.arange(-before, size + length - 1 - before).abs()
        return torch.where(places >= size, 2 * (size - 1) - places, places)

    def line(self, part: torch.Tensor, dim: int, size: int) -> solvers.Factors:
        """Decompose the matrix that blurs one line of `size` pixels."""

        def matrix() -> torch.Tensor:
            reads = torch.eye(size, dtype=torch.float64)[self.mirrored(dim, size)]
            weighted = [weight * reads[len(part) - 1 - i :][:size] for i, weight in enumerate(part)]
            return sum(weighted, torch.zeros(()))

        return self.decomposed((dim, size), matrix)


def gaussian_kernel(std: float | tuple[float, float], angle: float = 0.0, size: int | None = None) -> torch.Tensor:
    """
    Return a Gaussian kernel that sums up to 1.

    Args:
        std (`float` or `tuple[float]`): Standard deviation in pixels, or a vertical and a horizontal one (before rotation).
        angle (`float`, *optional*, defaults to 0.0): Counter-clockwise rotation in degrees.
        size (`int`, *optional*): Height and width, odd. Defaults to three standard deviations on each side.
    """
    along_rows, along_columns = (std, std) if isinstance(std, int | float) else std
    if min(along_rows, along_columns) <= 0:
        raise ValueError(f"`std` must be above 0, but is {std}.")
    if size is None:
        size = 2 * math.ceil(3 * max(along_rows, along_columns)) + 1
    if size < 1 or size % 2 == 0:
        raise ValueError(f"`size` must be odd and at least 1, but is {size}.")
    turned_x, turned_y = turned_grid(size, angle)
    kernel = torch.exp(-0.5 * ((turned_y / along_rows) ** 2 + (turned_x / along_columns) ** 2))
    return kernel / kernel.sum()


def uniform_kernel(size: int) -> torch.Tensor:
    """Return the kernel that averages `size` x `size` pixels."""
    return torch.full((size, size), 1 / size**2, dtype=torch.float64)


def motion_kernel(length: float, angle: float = 0.0) -> torch.Tensor:
    """
    Return the kernel of a straight motion of `length` pixels, turned by `angle` degrees counter-clockwise from the horizontal.

    It sums up to 1. The weight of a pixel is the share of the line, one pixel wide, that lies in it, computed by oversampling.
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1 px, but is {length}.")
    size = 2 * math.ceil((length + 1) / 2) + 1
    fine = 32
    turned_x, turned_y = turned_grid(size * fine, angle, fine)
    line = ((turned_x.abs() <= length / 2) & (turned_y.abs() <= 0.5)).double()
    kernel = F.avg_pool2d(line[None, None], fine)[0, 0]
    kernel = kernel[kernel.sum(1) > 0][:, kernel.sum(0) > 0]
    return kernel / kernel.sum()


def turned_grid(size: int, angle: float, per_pixel: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coordinates x and y from the centre, in pixels, in axes turned counter-clockwise by `angle` degrees (y downwards)."""
    places = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / per_pixel
    y, x = torch.meshgrid(places, places, indexing="ij")
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return cos * x - sin * y, sin * x + cos * y
