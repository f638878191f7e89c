# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compressed sensing: random inner products of image blocks, fewer than there are pixels."""

import math
from typing import Self

import torch
import torch.nn.functional as F

from .linear_operator import LinearOperator


class CompressedSensing(LinearOperator):
    """
    Products of each block of b x b pixels of each channel with the rows of a matrix: (B, C, H, W) to (B, C m, H / b, W / b).

    Args:
        matrix (`torch.Tensor` of shape `(m, b * b)`): A matrix with orthonormal rows. `hadamard` and `orthonormal` draw random ones.
    """

    row_norm = 1.0
    matrix: torch.Tensor

    def __init__(self, matrix: torch.Tensor):
        block_size = math.isqrt(matrix.shape[-1])
        if matrix.ndim != 2 or block_size**2 != matrix.shape[1]:
            raise ValueError(f"`matrix` must have shape (m, b * b), but has {tuple(matrix.shape)}.")
        gram = matrix.double() @ matrix.double().mT
        if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), atol=1e-6):
            raise ValueError("`matrix` must have orthonormal rows (matrix @ matrix.T = 1).")
        super().__init__(matrix=matrix)
        self.block_size = block_size

    @classmethod
    def hadamard(cls, ratio: float = 0.25, block_size: int = 8, generator: torch.Generator | None = None) -> Self:
        """
        Draw random rows of the Walsh-Hadamard transform, and flip the signs of pixels at random. `ratio` is m / b^2, above 0 and at
        most 1. `block_size` is b, a power of 2.
        """
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"`block_size` must be a power of 2, but is {block_size}.")
        num_pixels = block_size**2
        transform = torch.ones(1, 1, dtype=torch.float64)
        while len(transform) < num_pixels:  # Sylvester's construction
            transform = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), transform)
        rows = torch.randperm(num_pixels, generator=generator)[: cls.num_rows(ratio, num_pixels)]
        signs = torch.randint(2, (num_pixels,), generator=generator) * 2 - 1
        return cls(transform[rows] * signs / block_size)

    @classmethod
    def orthonormal(cls, ratio: float = 0.25, block_size: int = 8, generator: torch.Generator | None = None) -> Self:
        """Draw random orthonormal rows by a QR decomposition, for any `block_size`. Arguments are as for `hadamard`."""
        num_pixels = block_size**2
        draws = torch.randn(num_pixels, cls.num_rows(ratio, num_pixels), dtype=torch.float64, generator=generator)
        return cls(torch.linalg.qr(draws).Q.mT)

    @staticmethod
    def num_rows(ratio: float, num_pixels: int) -> int:
        if not 0 < ratio <= 1:
            raise ValueError(f"`ratio` must be above 0 and at most 1, but is {ratio}.")
        return max(1, round(ratio * num_pixels))

    def A(self, x: torch.Tensor) -> torch.Tensor:
        if any(size % self.block_size for size in x.shape[-2:]):
            raise ValueError(f"`block_size` {self.block_size} must divide height and width of {tuple(x.shape)}.")
        blocks = F.pixel_unshuffle(x, self.block_size).unflatten(1, (x.shape[1], -1))
        return torch.einsum("mn,bcnhw->bcmhw", self.matrix.to(x), blocks).flatten(1, 2)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        products = y.unflatten(1, (-1, len(self.matrix)))
        blocks = torch.einsum("mn,bcmhw->bcnhw", self.matrix.to(y), products).flatten(1, 2)
        return F.pixel_shuffle(blocks, self.block_size)
