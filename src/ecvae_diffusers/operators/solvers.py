# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Pseudo-inverses of operators.

Small and separable matrices, :math:`Y = R_h X R_w^T` for each channel, are inverted by singular value decomposition. Their singular
values are the products of those of :math:`R_h` and :math:`R_w`. Other operators are inverted by conjugate gradients (CGLS):

.. math:: \min_x \|y - A x\|^2 + s \|x\|^2

From x = 0 every iterate lies in the range of A^T, and the limit for s = 0 is the solution of least norm, A^+ y.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


MAX_ITERATIONS = 1000
# In float32, an entry of the batch stops after this many iterations without a smaller gradient.
STAGNATION = 50


class Factors(NamedTuple):
    """A matrix (m, n) and its singular value decomposition U diag(s) V^T, float64 on the CPU."""

    matrix: torch.Tensor
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def factorize(matrix: torch.Tensor) -> Factors:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Factors(matrix.double(), left, values, right.mT)


def apply(rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `rows` X `columns`^T for each channel of (B, C, H, W)."""
    return rows.to(x) @ x @ columns.to(x).mT


def inverse(rows: Factors, columns: Factors, y: torch.Tensor, damping: float, rcond: float) -> torch.Tensor:
    """
    Return A_s y for a `damping` s above 0, and A^+ y for 0. A^+ leaves out singular values up to `rcond` times the largest.
    Computes in float64 if the device supports it, because it divides by products of small singular values.
    """
    exact = y if y.device.type == "mps" else y.double()
    values = torch.outer(rows.values, columns.values).to(exact)
    if damping > 0:
        factors = values / (values.square() + damping)
    else:
        factors = torch.where(values > rcond * values.max(), 1 / values.clamp(min=1e-300), 0.0)
    spectrum = apply(rows.left.mT, columns.left.mT, exact) * factors
    return apply(rows.right, columns.right, spectrum).to(y.dtype)


def cgls(
    A: Callable[[torch.Tensor], torch.Tensor],
    A_adjoint: Callable[[torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    damping: float = 0.0,
    tolerance: float = 1e-10,
    max_iterations: int = MAX_ITERATIONS,
) -> torch.Tensor:
    """
    Return x = (A^T A + s I)^{-1} A^T y, or A^+ y for s = 0, of each entry of a batch (Hestenes and Stiefel 1952; Bjorck 1996,
    algorithm 7.4.1), in float32 or float64.

    An entry of the batch has converged if |A^T r - s x| is at most `tolerance` times |A^T y|, or |r| at most `tolerance` times |y|,
    with r = y - A x. float32 reaches about 1e-6, and an entry stops when it no longer improves. After `max_iterations`, all entries
    stop with a warning.
    """

    def squares(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1).square().sum(1)

    def each(factor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return factor.view(-1, *[1] * (tensor.ndim - 1)) * tensor

    residual, direction = y, A_adjoint(y)
    x, gradient_norm = torch.zeros_like(direction), squares(direction)
    enough_gradient, enough_residual = tolerance**2 * gradient_norm, tolerance**2 * squares(y)
    least, since = gradient_norm, torch.zeros_like(gradient_norm)
    for _ in range(max_iterations):
        is_active = (gradient_norm > enough_gradient) & (squares(residual) > enough_residual)
        if x.dtype == torch.float32:
            is_active &= since < STAGNATION
        if not is_active.any():
            return x
        image = A(direction)
        curvature = squares(image) + damping * squares(direction)
        # A converged entry stays unchanged, because its direction may be 0.
        step = torch.where(is_active, gradient_norm / curvature.where(is_active, torch.ones_like(curvature)), 0.0)
        x, residual = x + each(step, direction), residual - each(step, image)
        gradient = A_adjoint(residual) - damping * x
        before, gradient_norm = gradient_norm, torch.where(is_active, squares(gradient), gradient_norm)
        ratio = torch.where(is_active, gradient_norm / before.where(is_active, torch.ones_like(before)), 0.0)
        direction = gradient + each(ratio, direction)
        since = torch.where(gradient_norm < least, torch.zeros_like(since), since + 1)
        least = torch.minimum(least, gradient_norm)
    warnings.warn(
        f"CGLS stopped after {max_iterations} iterations without reaching a relative residual of {tolerance}."
    )
    return x


class LeastSquares(torch.autograd.Function):
    """
    [`cgls`], differentiable in y without a graph of its iterations: the adjoint of (A^T A + s I)^{-1} A^T is
    (A A^T + s I)^{-1} A, the same problem with A^T instead of A.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, A: Callable, A_adjoint: Callable, *settings: Any) -> torch.Tensor:
        ctx.problem = (A, A_adjoint, *settings)
        return cgls(A, A_adjoint, y, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        A, A_adjoint, *settings = ctx.problem
        return LeastSquares.apply(gradient, A_adjoint, A, *settings), None, None, None, None
