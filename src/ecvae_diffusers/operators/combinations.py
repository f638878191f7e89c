# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Combinations of measurements.

The pseudo-inverse of a composition is NOT the product of the parts' pseudo-inverses: in general :math:`(F G)^+ \ne G^+ F^+`,
for example for a mask after pooling. If a part has a cutoff, as a blur does, the whole matrix is decomposed with the largest
cutoff of the parts, for images of at most 1,024 entries. All other cases are solved by CGLS without a cutoff. For a wide blur of a
larger image, CGLS stops after 1,000 iterations with a warning.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from .linear_operator import DENSE_ENTRIES, LinearOperator, as_operator


class Combination(LinearOperator):
    """Base class of [`Compose`] and [`Stack`]: a list of operators."""

    parts: Any  # a `ModuleList` of operators

    def __init__(self, operators: Sequence[Any], **arguments: Any):
        parts = [as_operator(part) for part in operators]
        super().__init__(operators=parts, **arguments)
        self.parts = nn.ModuleList(parts)
        self.solver_dtype = None if any(part.solver_dtype is None for part in parts) else torch.float64
        self.rcond = max(part.rcond for part in parts)
        self.is_the_same_for_all_images = all(part.is_the_same_for_all_images for part in parts)

    def A_dagger(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        if self.rcond > 0 and self.is_the_same_for_all_images:
            image_shape = tuple(self.A_adjoint(y).shape[1:])
            if math.prod(image_shape) <= DENSE_ENTRIES:
                return self.solve_densely(y, image_shape, damping)
        return self.solve(y, damping)


class Compose(Combination):
    """
    A composition of measurements: `Compose([f, g])` applies g first, A x = F G x.

    Args:
        operators (`list`): Operators, or objects that [`as_operator`] converts. The last one is applied first.
    """

    def __init__(self, operators: Sequence[Any]):
        super().__init__(operators)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            x = part.A(x)
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            y = part.A_adjoint(y)
        return y

    def measurement_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        for part in reversed(self.parts):
            image_shape = part.measurement_shape(image_shape)
        return image_shape


class Stack(Combination):
    """
    Several measurements of one image, as one row of numbers per image: A x = (F x, G x, ...), of shape (B, m).

    Args:
        operators (`list`): Operators, or objects that [`as_operator`] converts.
        image_shape (`tuple[int]`): (C, H, W) of the images.
        measurement_shapes (`list[tuple[int]]`, *optional*):
            Shape of each operator's measurement of one image. By default, measuring one float32 image on the CPU tells the shapes.
            Required for functions that do not accept such an image.
    """

    def __init__(
        self,
        operators: Sequence[Any],
        image_shape: tuple[int, ...],
        measurement_shapes: Sequence[tuple[int, ...]] | None = None,
    ):
        super().__init__(operators, image_shape=tuple(image_shape))
        self.image_shape = tuple(image_shape)
        if measurement_shapes is None:
            measurement_shapes = [part.measurement_shape(self.image_shape) for part in self.parts]
        self.shapes = [tuple(shape) for shape in measurement_shapes]
        self.lengths = [math.prod(shape) for shape in self.shapes]

    def join(self, measurements: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the measurements (B, ...) of all operators to one row of numbers per image."""
        shapes = [tuple(part.shape[1:]) for part in measurements]
        if shapes != self.shapes:
            raise ValueError(f"`measurements` must have shapes (batch, ...) with {self.shapes}, but has {shapes}.")
        return torch.cat([part.flatten(1) for part in measurements], dim=1)

    def split(self, y: torch.Tensor) -> list[torch.Tensor]:
        """Undo `join`."""
        return [part.unflatten(1, shape) for part, shape in zip(y.split(self.lengths, dim=1), self.shapes)]

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self.join([part.A(x) for part in self.parts])

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        first, *others = (part.A_adjoint(measured) for part, measured in zip(self.parts, self.split(y)))
        return sum(others, first)
