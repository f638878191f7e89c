# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Separable measurements: :math:`Y = R_h X R_w^T` for each channel.

Their singular values are the products of those of :math:`R_h` and :math:`R_w`: the pseudo-inverse is as exact as two small
decompositions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """A matrix (m, n) and its singular value decomposition U diag(s) V^T, float64 on the CPU."""

    matrix: torch.Tensor
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


@contextmanager
def kept_for_gradients() -> Iterator[None]:
    """Make tensors that can be used for gradients later, even in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def factorize(matrix: torch.Tensor) -> Factors:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Factors(matrix.double(), left, values, right.mT)


def apply(rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `rows` X `columns`^T for each channel of (B, C, H, W)."""
    return rows.to(x) @ x @ columns.to(x).mT


def inverse(rows: Factors, columns: Factors, y: torch.Tensor, damping: float, rcond: float) -> torch.Tensor:
    """
    Return A_s y for `damping` s above 0, or A^+ y for 0, which leaves out singular values up to `rcond` times the largest.
    Computes in float64 if the device has it, since it divides by products of small singular values.
    """
    exact = y if y.device.type == "mps" else y.double()
    values = torch.outer(rows.values, columns.values).to(exact)
    if damping > 0:
        factors = values / (values.square() + damping)
    else:
        factors = torch.where(values > rcond * values.max(), 1 / values.clamp(min=1e-300), 0.0)
    spectrum = apply(rows.left.mT, columns.left.mT, exact) * factors
    return apply(rows.right, columns.right, spectrum).to(y.dtype)
