# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Least squares by conjugate gradients on the normal equations (CGLS), for operators that are functions:

.. math:: \min_x \|y - A x\|^2 + s \|x\|^2

From x = 0 every iterate lies in the range of A^T, and the limit for s = 0 is the solution of least norm, A^+ y.
"""

import warnings
from collections.abc import Callable

import torch


MAX_ITERATIONS = 1000
# Iterations without a smaller gradient after which float32 can't improve an entry.
STAGNATION = 50


def cgls(
    A: Callable[[torch.Tensor], torch.Tensor],
    A_adjoint: Callable[[torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    damping: float = 0.0,
    tolerance: float = 1e-10,
    max_iterations: int = MAX_ITERATIONS,
) -> torch.Tensor:
    """
    Solve each entry of a batch independently (Hestenes and Stiefel 1952; Bjorck 1996, algorithm 7.4.1).

    Args:
        A, A_adjoint (`Callable`): A linear map of batches (B, ...), and its adjoint.
        y (`torch.Tensor` of shape `(B, ...)`): Right-hand sides, float32 or float64.
        damping (`float`, *optional*, defaults to 0.0): s, at least 0.
        tolerance (`float`, *optional*, defaults to 1e-10):
            An entry is done if its A^T r - s x is at most this times A^T y in norm, or its r this times y. float32 reaches
            about 1e-6, and stops where it no longer improves.
        max_iterations (`int`, *optional*, defaults to 1000): Iterations after which to stop with a warning.

    Returns:
        `torch.Tensor` of shape `(B, ...)`: x = (A^T A + s I)^{-1} A^T y, or A^+ y for s = 0.
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
        # An entry that is done stays where it is: its direction may be 0.
        step = torch.where(is_active, gradient_norm / curvature.where(is_active, torch.ones_like(curvature)), 0.0)
        x, residual = x + each(step, direction), residual - each(step, image)
        gradient = A_adjoint(residual) - damping * x
        before, gradient_norm = gradient_norm, torch.where(is_active, squares(gradient), gradient_norm)
        ratio = torch.where(is_active, gradient_norm / before.where(is_active, torch.ones_like(before)), 0.0)
        direction = gradient + each(ratio, direction)
        since = torch.where(gradient_norm < least, torch.zeros_like(since), since + 1)
        least = torch.minimum(least, gradient_norm)
    warnings.warn(
        f"CGLS stopped after {max_iterations} iterations, before its relative gradient or residual reached {tolerance}."
    )
    return x


class LeastSquares(torch.autograd.Function):
    """
    Make [`cgls`] differentiable in y without a graph of its iterations: the adjoint of (A^T A + s I)^{-1} A^T is
    (A A^T + s I)^{-1} A, the same problem with A^T instead of A.
    """

    @staticmethod
    def forward(ctx, y, A, A_adjoint, damping, tolerance):
        ctx.problem = (A, A_adjoint, damping, tolerance)
        return cgls(A, A_adjoint, y, damping, tolerance)

    @staticmethod
    def backward(ctx, gradient):
        A, A_adjoint, *settings = ctx.problem
        return LeastSquares.apply(gradient, A_adjoint, A, *settings), None, None, None, None
