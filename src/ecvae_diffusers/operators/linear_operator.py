# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Linear measurements y = A x of images, with their adjoint and pseudo-inverse.

.. math:: \langle A x, y \rangle = \langle x, A^T y \rangle, \qquad A A^+ A = A, \quad A^+ A A^+ = A^+,

where :math:`A A^+` and :math:`A^+ A` are symmetric. The damped inverse :math:`A_s = A^T (A A^T + s I)^{-1}` tends to :math:`A^+`
as s tends to 0.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn

from .solvers import Factors, LeastSquares, factorize, inverse


CONFIG_FILE, TENSORS_FILE = "operator_config.json", "operator.safetensors"
# Largest number of image entries for which an operator's whole matrix is decomposed (half a second, 16 MB).
DENSE_ENTRIES = 1024
ONE = factorize(torch.ones(1, 1))


class LinearOperator(nn.Module):
    """
    A linear measurement of images in [-1, 1]. All methods take batches on any device and in any floating dtype, and are
    differentiable.

    A subclass defines `A` and `A_adjoint`, and passes its constructor's arguments to this constructor, which registers tensors as
    buffers and keeps the other arguments for the config. It sets `row_norm` to c if A A^T = c I on the range of A; otherwise it
    may override `A_dagger` with a closed form.
    """

    # `as_operator` recognizes operators by this attribute, because a pipeline from the Hub brings its own copy of this class.
    is_linear_operator = True
    row_norm: float | None = None  # c if A A^T is c times the projection on the range of A
    solver_dtype: torch.dtype | None = torch.float64  # dtype of CGLS; None keeps that of the measurement
    rcond: float = 0.0  # A^+ leaves out singular values up to this times the largest
    is_the_same_for_all_images: bool = True  # whether all images of a batch are measured alike
    is_diagonal: bool = False  # whether A^T A is diagonal, as for a mask

    def __init__(self, **arguments: Any):
        super().__init__()
        self._arguments = arguments
        self.decompositions: dict[tuple[int, ...], Factors] = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """Measure images (B, C, H, W)."""
        raise NotImplementedError

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Map measurements (B, ...) to images (B, C, H, W) by the adjoint (transpose) of `A`."""
        raise NotImplementedError

    def measurement_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the measurement of one image (C, H, W)."""
        return tuple(self.A(torch.zeros(1, *image_shape)).shape[1:])

    def A_dagger(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        """
        Apply the pseudo-inverse to measurements (B, ...): A^+ y has the least norm of all x whose A x is nearest to y. With a
        `damping` s above 0, apply the damped inverse instead: A_s y = A^T (A A^T + s I)^{-1} y.

        Without a closed form, CGLS computes it from x = 0, in float64 if the device supports it. The relative tolerance is 1e-10 for
        float64 measurements and 1e-8 for float32 ones (1e-6 if CGLS runs in float32).
        """
        if self.row_norm is not None:
            return self.A_adjoint(y) / (self.row_norm + damping)
        return self.solve(y, damping)

    def solve(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        """Compute `A_dagger` by CGLS, even if there is a closed form."""
        dtype = y.dtype if self.solver_dtype is None or y.device.type == "mps" else self.solver_dtype
        tolerance = {torch.float32: 1e-6}.get(dtype, 1e-10 if y.dtype == torch.float64 else 1e-8)
        return LeastSquares.apply(y.to(dtype), self.A, self.A_adjoint, damping, tolerance).to(y.dtype)

    def solve_densely(self, y: torch.Tensor, image_shape: tuple[int, ...], damping: float = 0.0) -> torch.Tensor:
        """Compute `A_dagger` by decomposing the whole matrix, for images (C, H, W) of at most 1,024 entries."""

        def matrix() -> torch.Tensor:
            entries = torch.eye(math.prod(image_shape), dtype=torch.float64).view(-1, *image_shape)
            return self.A(entries).flatten(1).mT

        column = y.flatten(1)[:, None, :, None]
        solved = inverse(self.decomposed(image_shape, matrix), ONE, column, damping, self.rcond)
        return solved.view(len(y), *image_shape)

    def decomposed(self, key: tuple[int, ...], matrix: Callable[[], torch.Tensor]) -> Factors:
        """Decompose a matrix once and cache its factors. Gradients can use them even if this call is in inference mode."""
        if key not in self.decompositions:
            with torch.inference_mode(False), torch.no_grad():
                self.decompositions[key] = factorize(matrix())
        return self.decompositions[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.A(x)

    def to_config(self, tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
        """Return the constructor's arguments as a config for JSON. Tensors are added to `tensors`, and the config holds their names."""
        config: dict[str, Any] = {"_class_name": type(self).__name__}
        for name, value in self._arguments.items():
            if isinstance(value, torch.Tensor):
                # A copy, because safetensors can't save a tensor under two names, such as a mask that two parts share.
                tensors[prefix + name] = getattr(self, name).contiguous().clone()
                value = {"tensor": prefix + name}
            elif isinstance(value, list):
                value = [part.to_config(tensors, f"{prefix}{name}.{i}.") for i, part in enumerate(value)]
            config[name] = value
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor] = {}) -> "LinearOperator":
        """
        Build an operator of any class from the config of `to_config`. Raises `ValueError` if the class is unknown; import your own
        operator classes first.
        """
        config, kinds = dict(config), {kind.__name__: kind for kind in subclasses(LinearOperator)}
        name = config.pop("_class_name", None)
        if name not in kinds:
            raise ValueError(f"`_class_name` must be one of {', '.join(sorted(kinds))}, but is {name!r}.")
        for key, value in config.items():
            if isinstance(value, dict):
                config[key] = tensors[value["tensor"]]
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                config[key] = [cls.from_config(part, tensors) for part in value]
            elif isinstance(value, list):
                config[key] = tuple(value)
        return kinds[name](**config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the config as `operator_config.json` and the tensors as `operator.safetensors`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        config = self.to_config(tensors)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        safetensors.torch.save_file(tensors, folder / TENSORS_FILE)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> "LinearOperator":
        """Load an operator that `save_pretrained` wrote. Raises `ValueError` as `from_config` does, and `OSError` if a file is missing."""
        folder = Path(save_directory)
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return cls.from_config(config, safetensors.torch.load_file(folder / TENSORS_FILE))


class FunctionOperator(LinearOperator):
    """
    An operator defined by two functions, which can't be saved. CGLS computes A^+. The functions receive contiguous copies of
    batches, which they may change, in the dtype of the measurement.

    Args:
        A (`Callable`): A linear map of images (B, C, H, W) to measurements (B, ...).
        A_adjoint (`Callable`): Its adjoint.
    """

    solver_dtype = None
    is_the_same_for_all_images = False  # unknown, so assume that they differ

    def __init__(self, A: Callable[[torch.Tensor], torch.Tensor], A_adjoint: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.functions = (A, A_adjoint)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self.functions[0](x.clone(memory_format=torch.contiguous_format))

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.functions[1](y.clone(memory_format=torch.contiguous_format))

    def to_config(self, tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
        raise ValueError("A `FunctionOperator` can't be saved: a config can't hold functions.")


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def as_operator(operator: Any) -> LinearOperator:
    """
    Convert a [`LinearOperator`], an object with `A` and `A_adjoint` (a `LinearPhysics` of deepinv, for example), or a pair of
    functions (A, A_adjoint) to an operator. Raises `ValueError` for any other object.
    """
    if getattr(operator, "is_linear_operator", False):
        return operator
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        return FunctionOperator(operator.A, operator.A_adjoint)
    if isinstance(operator, tuple | list) and len(operator) == 2 and all(map(callable, operator)):
        return FunctionOperator(*operator)
    raise ValueError(f"`operator` must be an operator or a pair of functions (A, A_adjoint), but is {operator!r}.")
