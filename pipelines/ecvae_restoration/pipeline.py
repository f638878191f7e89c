# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# diffusers loads it from a folder without the package, with trust_remote_code=True.
"""Zero-shot restoration of damaged or incomplete images with an energy-calibrated VAE."""

import inspect
import json
import math
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL.Image
import safetensors.torch
import torch
import torch.nn as nn
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils import parametrize


# The code of component classes is saved in separate files. Here their base classes stand in for them.
AutoencoderEC = ModelMixin
EnergyModel = ModelMixin


LARGEST_VALUE = 1e12


def check_number(name: str, value: float, low: float, high: float = LARGEST_VALUE, whole: bool = False) -> None:
    """Raise `ValueError` if an argument is not from `low` to `high` or, with `whole`, not an integer."""
    if not low <= value <= high or (whole and not isinstance(value, int | np.integer)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} from {low:g} to {high:g}, but is {value}.")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` if an argument is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, but is {value!r}.")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Freeze a module while a chain runs on it: evaluation mode, no parameter gradients, normalized weights computed once. In training
    mode, spectral norm would take a power iteration at every step and so change the energy. The mode and `requires_grad` of every
    part are restored afterwards.

    Gradients also pass through a module that diffusers offloads or casts layer by layer. Its hooks swap the data of a parameter
    after the layer's forward pass, so the tensors that backward needs are saved during that pass.
    """
    modes = [(m, m.training) for m in module.modules()]
    trained = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    is_hooked = any(hasattr(m, "_diffusers_hook") for m, _ in modes)
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    try:
        with parametrize.cached(), kept if is_hooked else nullcontext():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def compute_energy(
    energy_model: Callable, sample: torch.Tensor, condition: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return one energy per sample, shape (B,), in float32 or higher precision. `energy_model` is an [`EnergyModel`] or any callable
    that returns a tensor of B numbers. A module receives the samples in the precision of its parameters. A `condition` of B items,
    such as class labels, is passed as the second argument. Raises `ValueError` if the number of energies is not B.
    """
    if isinstance(energy_model, nn.Module):
        parameter = next(energy_model.parameters(), sample)
        if parameter.dtype != sample.dtype:
            # Layerwise casting stores weights in another precision than a diffusers model computes in, which is its `dtype`.
            sample = sample.to(getattr(energy_model, "dtype", parameter.dtype))
    output = energy_model(sample) if condition is None else energy_model(sample, condition)
    energy = getattr(output, "energy", output)
    if not isinstance(energy, torch.Tensor) or energy.numel() != len(sample):
        found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
        raise ValueError(f"`energy_model` must return one energy per sample ({len(sample)}), but returned {found}.")
    return energy.to(torch.promote_types(energy.dtype, torch.float32)).view(len(sample))


def out_of_inference_mode(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor from inference mode, which autograd can't use. Return any other tensor as it is."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def energy_and_gradient(
    energy_model: Callable, sample: torch.Tensor, condition: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the energies of samples, shape (B,), and their gradients, in the shape and dtype of `sample`, without a graph."""
    with torch.inference_mode(False), torch.enable_grad():
        sample = out_of_inference_mode(sample).detach().requires_grad_()
        energy = compute_energy(energy_model, sample, condition)
        return energy.detach(), torch.autograd.grad(energy.sum(), sample)[0]


MAX_ITERATIONS = 1000


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


CONFIG_FILE, TENSORS_FILE = "operator_config.json", "operator.safetensors"


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


HIGHEST_FREQUENCY = math.sqrt(0.5)


def bands_around(height: int, width: int, num_bands: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the band below each frequency of `torch.fft.rfft2`, and the weight of the band above, both (H, W // 2 + 1)."""
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64)
    radius = torch.hypot(vertical[:, None], horizontal[None])  # cycles per pixel
    place = radius / HIGHEST_FREQUENCY * (num_bands - 1)
    below = place.floor().long().clamp(max=max(num_bands - 2, 0))
    return below, (place - below).clamp(0, 1)


def multiplicity(height: int, width: int) -> torch.Tensor:
    """Return how many frequencies of `fft2` each of `rfft2` stands for: 1 in columns that mirror themselves, 2 elsewhere."""
    count = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
    count[0] = 1
    count[width - width // 2 :] = 1  # a column that only an even width has
    return count.expand(height, -1)


def mean_over_frequencies(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return the mean over all frequencies of values given at the frequencies of `rfft2`."""
    count = multiplicity(values.shape[0], width)
    return (values * count).sum() / count.sum()


def at_frequencies(spectrum: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate S from its bands to the frequencies of `rfft2`, (H, W // 2 + 1)."""
    if len(spectrum) == 1:
        return spectrum.expand(height, width // 2 + 1)
    below, above = bands_around(height, width, len(spectrum))
    return (1 - above) * spectrum[below] + above * spectrum[below + 1]


def colored(white: torch.Tensor, spectrum: list[float] | None) -> torch.Tensor:
    """
    Apply C^(1/2) to white noise (B, C, H, W) of variance 1. The result has the correlations of the model's error, and variance 1 per
    pixel. Without a `spectrum`, C is the identity.
    """
    if spectrum is None:
        return white
    height, width = white.shape[-2:]
    values = at_frequencies(torch.tensor(spectrum, dtype=torch.float64), height, width)
    gain = (values / mean_over_frequencies(values, width)).sqrt().to(white)
    return torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(height, width))


Generators = torch.Generator | list[torch.Generator] | None


ENOUGH_RESIDUAL = 1e-6


CUTOFF_LEVELS = (1e-4, 1e-5, 1e-6, 1e-7)


DESCENT_SHARE = 0.4


DESCENT_RATE, DESCENT_BETAS = 0.4, (0.8, 0.9)


NUM_CURVATURE_PROBES = 6


FIRST_LANGEVIN_STEP, LAST_LANGEVIN_STEP = 0.6, 0.1


SQUARE_LIMIT, SQUARE_DECAY = 4.0, 0.9


NUM_VARIANCE_PROBES = 64


LEAST_SEEN = 0.1


@dataclass(frozen=True)
class Likelihood:
    """
    The likelihood p(y | z) of B measurements, with M answers each.

    The answers' images and latents have shape (B * M, ...), grouped by measurement. The operator is called with batches of B, once
    per answer, because it may have one mask per image.
    """

    operator: LinearOperator  # A
    y: torch.Tensor  # (B, ...), of images in [-1, 1]
    noise_std: float  # sigma, in the unit of y
    model_variance: float  # v, above 0
    num_answers: int = 1  # M
    error_spectrum: list[float] | None = (
        None  # S, the spectrum of the model's error (`model_error.py`), for `variance`
    )

    @property
    def damping(self) -> float:
        """Return s = sigma^2 / v."""
        return self.noise_std**2 / self.model_variance

    def each_answer(self, function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        answers = tensor.unflatten(0, (-1, self.num_answers)).unbind(1)
        return torch.stack([function(answer.contiguous()) for answer in answers], dim=1).flatten(0, 1)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self.each_answer(self.operator.A, x)

    def A_dagger(self, y: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        return self.each_answer(lambda y: self.operator.A_dagger(y, damping), y)

    def misfit(self, x: torch.Tensor) -> torch.Tensor:
        """Return r = y - A x."""
        return self.y.to(x.dtype).repeat_interleave(self.num_answers, dim=0) - self.A(x)

    def relative_residual(self, x: torch.Tensor) -> torch.Tensor:
        """Return ||A x - y|| / ||y|| of each answer, shape (B * M,), or ||A x|| if y is 0; in float64 if possible."""
        size = self.exact(self.y).flatten(1).norm(dim=1).repeat_interleave(self.num_answers)
        difference = self.misfit(self.exact(x)).flatten(1).norm(dim=1)
        return torch.where(size > 0, difference / size.clamp(min=1e-30), difference).float()

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of -log p(y | z) with respect to x = G(z), -A_s r / v."""
        return -self.A_dagger(self.misfit(x), self.damping) / self.model_variance

    def curvature_probe(self, like: torch.Tensor, generator: Generators) -> torch.Tensor:
        """
        Draw images g with covariance A^T (v A A^T + sigma^2 I)^{-1} A. With the decoder's Jacobian J, the mean of (J^T g)^2
        is the diagonal of the Gauss-Newton curvature of -log p(y | z).
        """
        noise = math.sqrt(self.model_variance) * self.A(draw(like.shape, generator, like))
        if self.noise_std > 0:
            noise = noise + self.noise_std * draw(noise.shape, generator, like)
        return self.A_dagger(noise, self.damping) / self.model_variance

    def project(self, g: torch.Tensor) -> torch.Tensor:
        """Return (I - A_s A) g, where I - A_s A is the (symmetric) derivative of x^ with respect to G."""
        return g - self.A_dagger(self.A(g), self.damping)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """
        Return x^ = G + A_s r. Without noise, its relative residual is at most 1e-6 if y is in the range of A: what the cutoff of a
        blur's A^+ leaves out is added in float64, with decreasing damping.
        """
        restored = x + self.A_dagger(self.misfit(x), self.damping)
        for level in CUTOFF_LEVELS if self.noise_std == 0 else ():
            if (self.relative_residual(restored) <= ENOUGH_RESIDUAL).all():
                break
            exact = self.exact(restored)
            size = self.A(exact).norm() / exact.norm().clamp(min=1e-30)
            rest = self.A_dagger(self.misfit(exact), (level * size.item()) ** 2)
            restored = (exact + rest).to(x.dtype)
        return restored

    def exact(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert to float64 if the device and the operator support it."""
        return tensor if tensor.device.type == "mps" or self.operator.solver_dtype is None else tensor.double()

    def sample(self, x: torch.Tensor, generator: Generators) -> torch.Tensor:
        """
        Draw x given z and y, with a residual of sigma per entry if v is right. The decoder's image stays as it is where the
        measurement tells nothing (in the null space of A, and where a blur removes almost everything): a draw would add noise of
        variance v to each pixel. Without noise there is nothing to draw: use `mean`.
        """
        error = math.sqrt(self.model_variance) * draw(x.shape, generator, x)
        seen = self.A_dagger(self.A(error), LEAST_SEEN * self.damping)
        misfit = self.misfit(x + seen)
        misfit = misfit + self.noise_std * draw(misfit.shape, generator, x)
        return x + seen + self.A_dagger(misfit, self.damping)

    def variance(self, like: torch.Tensor) -> torch.Tensor:
        r"""
        Return the variance of each pixel x given z and y, (B, C, H, W). The error of the mean x^ is (I - A_s A) e - A_s n, where
        the model's error e has covariance v C (`model_error.py`), so this is the diagonal of

        .. math:: v (I - A_s A) C (I - A_s A)^T + \sigma^2 A_s A_s^T,

        or v (I - A_s A) for C = I. If A^T A is diagonal, the result is exact and does not depend on C. Otherwise it is estimated from
        64 draws of random signs, with an error of about 9% of a pixel's standard deviation.
        """
        if self.operator.is_diagonal:
            seen = self.operator.A_dagger(self.operator.A(torch.ones_like(like)), self.damping)
            return self.model_variance * (1 - seen)
        # All images have the same variance if the operator is the same for all.
        count = 1 if self.operator.is_the_same_for_all_images else len(like)
        entries, measured = like[:count], self.y[:count].to(like.dtype)
        generator = torch.Generator().manual_seed(0)

        def signs(tensor: torch.Tensor) -> torch.Tensor:
            drawn = torch.randint(2, tensor.shape[1:], generator=generator).to(tensor) * 2 - 1
            return drawn.expand_as(tensor).contiguous()

        total = torch.zeros_like(entries)
        for _ in range(NUM_VARIANCE_PROBES):
            error = math.sqrt(self.model_variance) * colored(signs(entries), self.error_spectrum)
            misfit = self.operator.A(error)
            if self.noise_std > 0:
                misfit = misfit + self.noise_std * signs(measured)
            total += (error - self.operator.A_dagger(misfit, self.damping)).square()
        variance = total / NUM_VARIANCE_PROBES
        if self.error_spectrum is None:
            variance = variance.clamp(max=self.model_variance)  # the exact variance never exceeds it
        return variance.expand_as(like)


def draw(shape: tuple[int, ...], generator: Generators, like: torch.Tensor) -> torch.Tensor:
    """Draw from N(0, I). Each generator of a list draws an equal share of the batch, such as the tiles of one answer."""
    generators = generator if isinstance(generator, list) else [generator]
    part = (shape[0] // len(generators), *shape[1:])
    return torch.cat([randn_tensor(part, generator=one, device=like.device, dtype=like.dtype) for one in generators])


class Canvas:
    """A division of images into tiles of the model's size. Neighbouring tiles share at least `overlap` pixels."""

    def __init__(self, height: int, width: int, tile_size: int, overlap: int):
        self.height, self.width, self.tile_size = height, width, tile_size
        tops, lefts = (self.starts(size, tile_size, overlap) for size in (height, width))
        self.corners = [(top, left) for top in tops for left in lefts]
        # A tile has less weight near its border.
        ramp = torch.arange(tile_size) + 0.5
        ramp = ramp.minimum(ramp.flip(0)).clamp(max=max(overlap, 1))
        weight = torch.outer(ramp, ramp).expand(len(self.corners), 1, -1, -1)
        self.weights = weight / self.split(self.split_adjoint(weight))

    @staticmethod
    def starts(size: int, tile_size: int, overlap: int) -> list[int]:
        """Return the first pixel of each tile along one side, evenly spread."""
        count = 1 + math.ceil((size - tile_size) / max(1, tile_size - overlap))
        return [round(i * (size - tile_size) / max(1, count - 1)) for i in range(count)]

    def __len__(self) -> int:
        return len(self.corners)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Cut images (N, C, H, W) into tiles (N * T, C, S, S)."""
        size = self.tile_size
        tiles = [x[..., top : top + size, left : left + size] for top, left in self.corners]
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def split_adjoint(self, tiles: torch.Tensor) -> torch.Tensor:
        """Apply the adjoint of `split`: sum tiles where they overlap."""
        size, tiles = self.tile_size, tiles.unflatten(0, (-1, len(self)))
        x = tiles.new_zeros(tiles.shape[0], tiles.shape[2], self.height, self.width)
        for index, (top, left) in enumerate(self.corners):
            x[..., top : top + size, left : left + size] += tiles[:, index]
        return x

    def join(self, tiles: torch.Tensor) -> torch.Tensor:
        """Join tiles (N * T, C, S, S) to images (N, C, H, W): their weighted mean where they overlap."""
        return self.split_adjoint(self.weigh(tiles))

    def weigh(self, tiles: torch.Tensor) -> torch.Tensor:
        """Multiply tiles by their weights, which sum up to 1 in each pixel of the image."""
        return (tiles.unflatten(0, (-1, len(self))) * self.weights.to(tiles)).flatten(0, 1)

    def join_adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the adjoint of `join`, which maps gradients of images to those of tiles."""
        return self.weigh(self.split(x))


def neural_transport(
    decode: Callable[[torch.Tensor], torch.Tensor],
    likelihood: Likelihood,
    canvas: Canvas,
    latents: torch.Tensor,
    num_steps: int,
    method: str = "langevin",
    energy_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None,
    energy_weight: float = 1.0,
    generator: Generators = None,
    on_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Return latents that explain a measurement: draws from e^{-U}, or minima of U.

    `"langevin"` first descends by Adam and estimates the diagonal h of the curvature of U there. It then takes Langevin steps
    z <- z - t / h grad U + sqrt((2 t - t^2) / h) n at temperature 1, with t falling from 0.6 to 0.1. `"map"` only descends, with
    a rate that falls to 0 along a cosine.

    Args:
        decode (`Callable`): The differentiable decoder G, from latents (N, ...) to tiles (N, C, S, S) in float32.
        likelihood ([`Likelihood`]), canvas ([`Canvas`]): The measurements, and the division of their images into tiles.
        latents (`torch.Tensor` of shape `(B * M * T, ...)`): Initial latents of B measurements, M answers and T tiles.
        num_steps (`int`): Total number of decoder passes.
        energy_gradient (`Callable`, *optional*): The gradient of f with respect to tiles, in their shape.
        energy_weight (`float`, *optional*, defaults to 1.0): w.
        on_step (`Callable`, *optional*): Called with the number of the step and the latents; returns the next latents.
    """
    num_probes = min(NUM_CURVATURE_PROBES, num_steps // 5) if method == "langevin" else 0
    num_descents = num_steps if method == "map" else max(1, round(DESCENT_SHARE * num_steps))
    num_tiles = len(canvas)

    def pull_back(latents: torch.Tensor, gradient_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return J^T g, where g is `gradient_of` of the decoded tiles and J the decoder's Jacobian."""
        with torch.inference_mode(False), torch.enable_grad():
            # A tensor from inference mode can't carry gradients, but a copy of it can.
            latents = (latents.clone() if latents.is_inference() else latents.detach()).requires_grad_()
            tiles = decode(latents)
            return torch.autograd.grad(tiles, latents, gradient_of(tiles.detach()))[0]

    def tile_gradient(tiles: torch.Tensor) -> torch.Tensor:
        x = canvas.join(tiles)
        gradient = likelihood.gradient(x)
        if energy_gradient is not None:
            restored = x - likelihood.model_variance * gradient  # x^ = G + A_s r
            along = canvas.split_adjoint(energy_gradient(canvas.split(restored)))
            gradient = gradient + energy_weight * likelihood.project(along)
        gradient = canvas.join_adjoint(gradient)
        if num_tiles > 1:
            # The term for the difference between tiles and their mean. The mean depends on the tiles too, but the weighted
            # differences to it sum up to 0.
            gradient = gradient + canvas.weigh(tiles - canvas.split(x)) / likelihood.model_variance
        return gradient

    def probe_gradient(tiles: torch.Tensor) -> torch.Tensor:
        return canvas.join_adjoint(likelihood.curvature_probe(canvas.join(tiles), generator))

    def gradient(latents: torch.Tensor) -> torch.Tensor:
        return pull_back(latents, tile_gradient) + latents

    def step_done(step: int, latents: torch.Tensor) -> torch.Tensor:
        return latents if on_step is None else on_step(step, latents)

    first, second = torch.zeros_like(latents), torch.zeros_like(latents)
    beta1, beta2 = DESCENT_BETAS
    for step in range(num_descents):
        slope = gradient(latents)
        first, second = torch.lerp(slope, first, beta1), torch.lerp(slope.square(), second, beta2)
        direction = first / (1 - beta1 ** (step + 1)) / ((second / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
        left = 0.5 * (1 + math.cos(math.pi * step / num_descents))
        rate = DESCENT_RATE * (left if method == "map" else 0.1 + 0.9 * left)
        latents = step_done(step, latents - rate * direction)
    if method == "map":
        return latents

    curvature = torch.zeros_like(latents)
    for probe in range(num_probes):
        curvature += pull_back(latents, probe_gradient).square() / num_probes
        latents = step_done(num_descents + probe, latents)
    # Answers to one measurement are near each other and share one estimate.
    shared = 1 + curvature.unflatten(0, (-1, likelihood.num_answers, num_tiles)).mean(1, keepdim=True)
    estimate = shared.expand(-1, likelihood.num_answers, *[-1] * (shared.ndim - 2)).flatten(0, 2)
    # A few probes may underestimate the curvature, and steps would then grow without bound. The squared gradient bounds them: its
    # mean along a stationary chain is the curvature too.
    square = estimate
    start = num_descents + num_probes
    for step in range(start, num_steps):
        done = (step - start) / max(1, num_steps - 1 - start)
        size = FIRST_LANGEVIN_STEP + done * (LAST_LANGEVIN_STEP - FIRST_LANGEVIN_STEP)
        slope, noise = gradient(latents), draw(latents.shape, generator, latents)
        square = torch.lerp(slope.square(), square, SQUARE_DECAY)
        bound = torch.maximum(square, slope.square() / SQUARE_LIMIT) / SQUARE_LIMIT
        variance = 1 / torch.maximum(estimate, bound)
        # With this noise a step is exact if U is quadratic and the curvature is right.
        spread = (variance * (1 - (1 - size) ** 2)).sqrt()
        latents = step_done(step, latents - size * variance * slope + spread * noise)
    return latents


def label_ids(names: list[str], config: Any) -> list[int]:
    """Return the numbers of classes from their names in a model's config. Raises `ValueError` if there is no such class."""
    known = {name: int(number) for number, name in (config.get("id2label") or {}).items()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`class_labels` must be among {list(known)}, but has {unknown[0]!r}.")
    return [known[name] for name in names]


def prepare_labels(class_labels: Any, count: int, config: Any) -> list[int | None] | None:
    """
    Return the class number of each of `count` images, or `None` for images without a given class. Return `None` for a model without
    classes. Raises `ValueError` if the model has no such class, or there are not `count` labels.
    """
    if hasattr(class_labels, "tolist"):  # a tensor or an array
        class_labels = class_labels.reshape(-1).tolist()
    labels = list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels] * count
    num_classes = config.get("num_class_embeds")  # configs saved by earlier versions lack it
    if num_classes is None:
        if labels != [None] * len(labels):
            raise ValueError(f"`class_labels` must be None for a model without classes, but is {class_labels!r}.")
        return None
    if len(labels) != count:
        raise ValueError(f"`class_labels` must have one label per image ({count}), but has {len(labels)}.")
    numbers: list[int | None] = []
    for label in labels:
        if isinstance(label, str):
            numbers += label_ids([label], config)
        elif label is None:
            numbers.append(None)
        elif isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label <= num_classes:
            numbers.append(int(label))
        else:
            raise ValueError(
                f"`class_labels` must be names, integers from 0 to {num_classes} (unknown) or None, but has {label!r}."
            )
    return numbers


logger = logging.get_logger(__name__)


Images = PIL.Image.Image | np.ndarray | torch.Tensor | list


ClassLabels = str | int | list[str | int | None] | torch.Tensor | None


MODES = {1: "L", 3: "RGB", 4: "RGBA"}


GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}


EXIF_ORIENTATION, TIFF_BITS = 0x0112, 0x0102


UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


RANGE_TOLERANCE = 1e-3


DARK, BRIGHT = 0.06, 0.94


LEAST_REGION = 0.005


SHADE_TOLERANCE = 2


def white_level(image: PIL.Image.Image) -> int | None:
    """Return the pixel value of white, or `None` if the picture's mode does not define it."""
    # Modes of float and 32-bit pixels do not define white, except in file formats that store 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 4095 if getattr(image, "tag_v2", {}).get(TIFF_BITS) == (12,) else 65535
    return None if image.mode in ("F", "I") else 255


def check_mode(image: PIL.Image.Image) -> int:
    """Return the pixel value of white. Raises `ValueError` if the picture's mode does not define it."""
    if (white := white_level(image)) is not None:
        return white
    low, high = np.asarray(image).min(), np.asarray(image).max()
    guess = next((level for level in (1, 255, 65535) if high <= level), high)
    raise ValueError(
        f"mode {image.mode} does not define white; its values are from {low:.4g} to {high:.4g}. If white is {guess:g}, use "
        f"PIL.Image.fromarray((numpy.asarray(image) / {guess:g} * 255).clip(0, 255).round().astype('uint8'))"
    )


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, from 1 (upright) to 8. Raises `ValueError` if the EXIF data can't be read."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error) as error:
        raise ValueError(f"the EXIF data can't be read ({error}). To ignore them: image.info.pop('exif')") from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture upright according to its EXIF data: cameras store photographs as they were held."""
    image.load()  # Pillow turns TIFF files upright itself when it loads them.
    stored = orientation(image)
    return image.transpose(UPRIGHT[stored]) if stored in UPRIGHT else image


def opacity(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the alpha channel of a picture of mode L, I;16 or RGB that has a transparent colour."""
    pixels, key = np.asarray(image), np.array(image.info["transparency"])
    if image.mode == "RGB" and key.max() > 255:
        key = key >> 8  # Pillow keeps only the high bytes of 16-bit pixels, but both bytes of the transparent colour.
    if image.mode == "L":
        # Pillow scales 2- and 4-bit pixels to 8 bits, but not the transparent colour.
        scales = [scale for scale in (1, 17, 85) if not (pixels % scale).any() and (pixels == key * scale).any()]
        key = key * (scales or [1])[0]
    transparent = (pixels == key).all(-1) if image.mode == "RGB" else pixels == key
    return PIL.Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))


def read_picture(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """
    Convert a picture of any mode to 1, 3 or 4 channels of 8 bits.

    The picture is turned upright according to its EXIF data, and 16 bits are scaled and rounded to 8. Transparent pixels are laid
    over white unless there are 4 channels.

    Raises:
        ValueError: if the mode does not define white, or the EXIF data can't be read.
    """
    white = check_mode(image)
    image = upright(image)
    alpha = None
    if "transparency" in image.info and (white > 255 or image.mode in ("L", "RGB")):
        alpha = opacity(image)
    if white > 255:
        levels = np.asarray(image).astype(np.float64) * (255 / white)
        image = PIL.Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if alpha is not None:
        image = image.convert("RGB")
        image.info.pop("transparency", None)
        image.putalpha(alpha)
    elif image.has_transparency_data:
        # Pillow converts La, whose colours are multiplied by alpha, only to LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if channels < 4 and image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    # Pillow converts LAB only to RGB.
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(MODES[channels])


def read_mask(mask: PIL.Image.Image) -> np.ndarray:
    """
    Return which pixels a mask repaints, as a bool array of shape (H, W).

    A mask of black and one other level or colour repaints all that is not black. Examples are labels 0 and 1, a palette with one
    object, and painted strokes. A mask with shades of white, or of one bright colour, on a dark ground repaints pixels of at least
    half the level of white.

    Raises:
        ValueError: if a mask is of neither kind, or has transparent pixels. The message suggests a conversion.
    """
    white = white_level(mask)
    if mask.has_transparency_data and np.asarray(read_picture(mask, 4))[..., 3].min() < 255:
        alpha = "mask.convert('RGBA').getchannel('A')"
        raise ValueError(
            f"mode {mask.mode} has transparent pixels. To repaint transparent pixels: {alpha}.point(lambda a: 255 - a). "
            f"To repaint opaque pixels: {alpha}"
        )
    pixels = np.asarray(read_picture(mask, 3)) if white == 255 else np.asarray(upright(mask))[..., None]
    level = pixels.max(-1)
    brightest = pixels.reshape(-1, pixels.shape[-1])[level.argmax()]
    if level.min() == 0 and np.isfinite(brightest).all() and (pixels == brightest)[level > 0].all():
        return level > 0
    if white is not None:
        shades = (level / max(level.max(), 1))[..., None] * brightest
        is_gray = len(set(brightest.tolist())) == 1
        if np.abs(pixels - shades).max() <= SHADE_TOLERANCE and is_in_black_and_white(level / white, is_gray):
            return level >= white / 2
    frequent = Counter(map(tuple, pixels.reshape(-1, pixels.shape[-1]).tolist())).most_common(5)
    values = [one[0] if len(set(one)) == 1 else one for one, _ in frequent]
    example = next((value for value in values if value != 0), 0)
    array, each = ("numpy.asarray(mask.convert('RGB'))", ".all(-1)") if white == 255 else ("numpy.asarray(mask)", "")
    raise ValueError(
        f"mode {mask.mode} with the values {values} is not black (kept) and white (repainted). To repaint one of the values: "
        f"PIL.Image.fromarray(({array} == {example}){each})"
    )


def is_in_black_and_white(level: np.ndarray, gray: bool) -> bool:
    """Return whether the levels (H, W) of a mask, from 0 to 1, are bright shapes with soft edges on a dark ground, not labels."""
    levels = np.unique(level)
    if len(levels) == 1:
        return gray and levels[0] == 1
    if not (levels[0] < 0.5 <= levels[-1] and (levels[0] < DARK or levels[-1] > BRIGHT)):
        return False
    # A level fills a region if at least half of its pixels lie in 2 x 2 squares of it. Levels of soft edges do not.
    corner = level[:-1, :-1]
    square = (corner == level[1:, :-1]) & (corner == level[:-1, 1:]) & (corner == level[1:, 1:])
    inside = np.zeros(level.shape, bool)
    for part in (inside[:-1, :-1], inside[1:, :-1], inside[:-1, 1:], inside[1:, 1:]):
        part |= square
    inside_counts, counts = (
        np.bincount(np.searchsorted(levels, some), minlength=len(levels)) for some in (level[inside], level.ravel())
    )
    regions = levels[(inside_counts >= LEAST_REGION * level.size) & (2 * inside_counts >= counts)]
    regions = regions[(regions > levels[0]) & (regions < levels[-1])]
    only_white = (levels >= 0.5).sum() == 1  # False for JPEG files: their noise makes several bright levels
    return not (((regions > DARK) & (regions < BRIGHT)).any() or (only_white and (regions < 0.5).any()))


def as_list(images: Images, name: str) -> list:
    """Return an argument as a list of PIL images, arrays or tensors. Raises `ValueError` for other or mixed types or sizes."""
    images = list(images) if isinstance(images, list | tuple) else [images]
    kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
    if not images or not any(all(isinstance(one, kind) for one in images) for kind in kinds):
        found = sorted({type(one).__name__ for one in images})
        raise ValueError(
            f"`{name}` must hold at least one PIL image, numpy array or tensor, all of one type, but holds {found}."
        )
    sizes = {one.size if isinstance(one, PIL.Image.Image) else tuple(one.shape) for one in images}
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must hold images of one size, but holds {sorted(sizes)}.")
    return images


def read_all(images: list[PIL.Image.Image], name: str, read: Callable[[PIL.Image.Image], np.ndarray]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.stack([read(one) for one in images]))
    except ValueError as error:
        raise ValueError(f"`{name}` can't be read: {error}") from error


def prepare_picture(image: Images, processor: VaeImageProcessor, channels: int) -> torch.Tensor:
    """
    Convert pictures to one tensor (B, C, H, W) in [0, 1].

    PIL images are converted to `channels` channels. Arrays (B, H, W, C) and tensors (B, C, H, W) keep their channels, and values
    that are not finite. Raises `ValueError` if pictures can't be read, are not floating-point, or leave [0, 1].
    """
    images = as_list(image, "image")
    if isinstance(images[0], PIL.Image.Image):
        levels = read_all(images, "image", lambda one: np.atleast_3d(np.asarray(read_picture(one, channels))))
        if channels == 1 and any(has_colours(one) for one in images):
            logger.warning("`image` has colours, but the model is gray: it is converted to gray, as in training.")
        return levels.permute(0, 3, 1, 2).float() / 255
    if images[0].ndim == 2:
        images = [one[None] if isinstance(one, torch.Tensor) else one[..., None] for one in images]
    if not (first := torch.as_tensor(images[0])).is_floating_point():
        raise ValueError(f"`image` must be floating-point in [0, 1], but is {first.dtype}.")
    picture = processor.preprocess(images[0] if len(images) == 1 else images)
    finite = picture[picture.isfinite()]
    low, high = finite.aminmax() if len(finite) else (0, 1)
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"`image` must be in [0, 1], but is from {low:g} to {high:g}.")
    return picture


def has_colours(image: PIL.Image.Image) -> bool:
    if image.mode in GRAY_MODES:
        return False
    pixels = np.asarray(read_picture(image, 3))
    return bool((pixels[..., 1:] != pixels[..., :1]).any())


def prepare_mask(mask_image: Images, processor: VaeImageProcessor, like: torch.Tensor) -> torch.Tensor:
    """
    Return which pixels of pictures `like` (B, C, H, W) were observed, as a bool tensor (1 or B, 1, H, W): those where the mask is
    black. Raises `ValueError` if a mask can't be read or does not fit. Warns if a mask repaints nothing or everything.
    """
    masks = as_list(mask_image, "mask_image")
    if isinstance(masks[0], PIL.Image.Image):
        repainted = read_all(masks, "mask_image", read_mask).unsqueeze(1)
    else:
        if not all(((one >= 0) & (one <= 1)).all() for one in masks):
            raise ValueError("`mask_image` as an array or tensor must have values from 0 (kept) to 1 (repainted).")
        repainted = processor.preprocess(masks[0] if len(masks) == 1 else masks) >= 0.5
    count = 1 if len(repainted) == 1 else len(like)
    check_shape("mask_image", repainted, (count, 1, *like.shape[2:]))
    for found, what in ((~repainted.flatten(1).any(1), "nothing"), (repainted.flatten(1).all(1), "everything")):
        if found.any():
            logger.warning(
                f"`mask_image` repaints {what} in {int(found.sum())} of {count} mask(s): white is repainted, black is kept."
            )
    return ~repainted


def is_turned(images: Images) -> bool:
    """Return whether EXIF data turn any of the pictures."""
    return any(isinstance(one, PIL.Image.Image) and orientation(one) in UPRIGHT for one in as_list(images, "image"))


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(tensor.shape)}.")


def check_generator(generator: Generators, count: int) -> None:
    """Raise `ValueError` if `generator` is not one generator, or a list of one for each of `count` images."""
    kinds = [type(one) for one in generator] if isinstance(generator, list) else type(generator)
    if kinds not in (torch.Generator, [torch.Generator] * count, type(None)):
        raise ValueError(f"`generator` must be a torch.Generator or a list of {count}, one per image, but is {kinds}.")


def known_labels(pipeline: Any, class_labels: ClassLabels, count: int) -> torch.Tensor | None:
    """Return class numbers (B,), with the unknown class where none is given. Return `None` for a model without classes."""
    labels = prepare_labels(class_labels, count, pipeline.vae.config)
    if labels is None:
        return None
    unknown = pipeline.vae.config.num_class_embeds
    numbers = [unknown if label is None else label for label in labels]
    return torch.tensor(numbers, device=pipeline._execution_device)


def check_finite(images: torch.Tensor, suspects: str) -> None:
    """Raise `ValueError` if decoded images are not finite: they would be displayed as black."""
    if not images.isfinite().all():
        raise ValueError(f"Images are not finite in {images.dtype}. Check {suspects}.")


def postprocess(sample: torch.Tensor, processor: VaeImageProcessor, output_type: str | None) -> Any:
    """Convert images in [-1, 1] to `output_type`. Denormalizes the batch at once, which the processor would do image by image."""
    check_choice("output_type", output_type, ("pil", "np", "pt", None))
    return processor.postprocess(processor.denormalize(sample), output_type=output_type or "np")


OURS = ("ecvae_diffusers", "diffusers_modules")


KNOWN = (*OURS, "diffusers", "transformers", "builtins")


def unwrapped(component):
    """Return the model inside a compiled one (`torch.compile`), or any other component unchanged."""
    return getattr(component, "_orig_mod", component)


class SelfContained:
    """
    Mixin for pipelines that are saved with their code, so that the folder also loads without this package. It must stand
    before `DiffusionPipeline` in the list of base classes.

    Generated single-file pipelines use this class. In the package, [`~pipelines.self_contained.SelfContained`] extends it.
    """

    components: dict[str, Any]  # of `DiffusionPipeline`

    @property
    def saved_class(self) -> type:
        """The class whose code is saved. For a subclass from another package, it is the pipeline that it extends."""
        return next(kind for kind in type(self).__mro__ if DiffusionPipeline in kind.__bases__)

    def pipeline_code(self) -> str:
        """Return the content of `pipeline.py`."""
        return Path(inspect.getfile(self.saved_class)).read_text(encoding="utf-8")

    def travelling_components(self) -> dict[str, type]:
        """Return the classes of components, by name, that neither diffusers nor transformers provides. Their code is saved."""
        classes = {name: type(unwrapped(component)) for name, component in self.components.items()}
        return {name: kind for name, kind in classes.items() if kind.__module__.split(".")[0] in OURS}

    def save_code(self, save_directory: str | Path) -> None:
        """Write `pipeline.py` and the code of each component. Warn of classes from other packages, whose code is not saved."""
        for name, component in self.components.items():
            kind = type(unwrapped(component))
            if kind.__module__.split(".")[0] not in KNOWN:
                warnings.warn(
                    f"The code of `{name}` ({kind}) is not saved: import its module before you load the folder."
                )
        mine, saved = type(self).__name__, self.saved_class.__name__
        if type(self) is not self.saved_class:
            warnings.warn(f"The code of {mine} is not saved: `DiffusionPipeline.from_pretrained` loads a {saved}.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(self.pipeline_code(), encoding="utf-8")
        for name, kind in self.travelling_components().items():
            source = Path(inspect.getfile(kind))
            (folder / name).mkdir(exist_ok=True)
            (folder / name / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # `auto_map` is for `AutoModel`.
        parent: Any = super()
        return parent.extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """Return the content of `model_index.json`, which names code files in the folder and no path of this machine."""
        parent: Any = super()
        index = json.loads(parent.to_json_string())
        index.pop("_name_or_path", None)
        index["_class_name"] = ["pipeline", self.saved_class.__name__]
        for name, kind in self.travelling_components().items():
            index[name] = [Path(inspect.getfile(kind)).stem, kind.__name__]
        # `AutoModel` looks up the code of a component here. Only one class can be named: that of the first component.
        first = next(iter(self.components))
        if first in self.travelling_components():
            index["auto_map"] = {"AutoModel": ".".join(index[first])}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Save the code and `model_index.json`, and remove paths of this machine from the components' configs."""
        self.save_code(save_directory)
        for name in self.travelling_components():
            for path in (Path(save_directory) / name).glob("*config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        parent: Any = super()
        parent.save_config(save_directory, **kwargs)


logger = logging.get_logger(__name__)

# Entries of a generation pipeline's index.
GENERATION_ONLY = ("scheduler", "anomaly_threshold")
# Standard deviation of rounding to 8 bits, for values in [-1, 1].
ROUNDING_STD = 2 / (255 * math.sqrt(12))
# Spread of the initial latents around the encoding of A^+ y, in standard deviations of the prior.
START_SPREAD = 0.3
# Least damping of the inverse that makes the image to encode from the measurement: A^+ alone would amplify noise.
START_DAMPING = 1e-3
# The pipeline warns if answers leave [-1, 1] by more than LARGEST_EXCESS, or differ from a noisy measurement by more than
# LARGEST_MISFIT standard deviations of the noise (both root mean squares), or have a relative residual above LARGEST_RESIDUAL
# without noise.
LARGEST_EXCESS, LARGEST_MISFIT, LARGEST_RESIDUAL = 0.1, 3.0, 1e-5
# Upper bound of `reconstruction_variance`: the largest squared error of a pixel in [-1, 1].
LARGEST_VARIANCE = 4.0


@dataclass
class ECVAERestorationOutput(BaseOutput):
    """
    Output of the restoration pipeline: M answers to each of B measurements, grouped by measurement.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            B * M answers. Without noise, each agrees with its measurement. With noise, each is a draw whose residual is about as
            large as the noise.
        mean (as `images`): The mean of the answers to each measurement, B images, without the noise of the draws.
        std (`np.ndarray` of shape `(B, H, W, C)`, or `torch.Tensor` `(B, C, H, W)` for `output_type="pt"`):
            Standard deviation of each pixel given the measurement, for images in [0, 1]. It combines the spread of the answers and
            the error of the model at the right latents. A single answer has no spread, so set `num_restorations` to 8 or so if
            `std` matters.
        residual (`torch.Tensor` of shape `(B * M,)`):
            ||A x - y|| / ||y|| of each answer as a float image, before it is clamped to [-1, 1].
        residual_output (`torch.Tensor` of shape `(B * M,)`): The same for `images`, which are clamped and rounded.
        residual_mean (`torch.Tensor` of shape `(B,)`): The same for `mean` before it is clamped.
        energy (`torch.Tensor` of shape `(B * M,)`, *optional*): Energy of each answer, mean over tiles; low means like the training data.
        num_network_calls (`int`): Passes through the decoder, the encoder and the energy model per answer and tile.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    mean: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    std: np.ndarray | torch.Tensor
    residual: torch.Tensor
    residual_output: torch.Tensor
    residual_mean: torch.Tensor
    energy: torch.Tensor | None
    num_network_calls: int


class Interruption(Exception):
    """Raised to stop a search early. Its argument is the latents that the search has reached."""


class ECVAERestorationPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for zero-shot restoration: it solves inverse problems y = A x + n with a known linear A, such as inpainting,
    super-resolution, deblurring, colorization, denoising and compressed sensing. The model needs no training for these tasks.

    The pipeline loads the folder of an [`ECVAEPipeline`], or shares its weights (`ECVAERestorationPipeline.from_pipe`). Images
    larger than the model's size are restored in overlapping tiles.

    Args:
        vae ([`AutoencoderEC`]): The autoencoder whose decoder defines the prior: it maps latents from N(0, I) to images.
        energy_model ([`EnergyModel`], *optional*): Measures how similar an answer is to the training data.
    """

    model_cpu_offload_seq = "vae->energy_model"
    _optional_components = ["energy_model"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False
    num_timesteps = 0  # steps of the latest search: its `num_inference_steps`

    def __init__(self, vae: AutoencoderEC, energy_model: EnergyModel | None = None):
        super().__init__()
        self.register_modules(vae=vae, energy_model=energy_model)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
        self.mask_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # Folders of a generation pipeline also have these, and all folders of version 0.1 a scheduler.
        config_dict = {name: value for name, value in config_dict.items() if name not in GENERATION_ONLY}
        return super().extract_init_dict(config_dict, **kwargs)

    def register_to_config(self, **kwargs) -> None:
        # `from_pipe` also passes config entries that only a generation pipeline has.
        super().register_to_config(
            **{name: value for name, value in kwargs.items() if name.removeprefix("_") not in GENERATION_ONLY}
        )

    @property
    def interrupt(self) -> bool:
        """Whether the search stops after this step. Set `_interrupt` to stop it, from a callback for example."""
        return self._interrupt

    def prepare_measurement(
        self, image: Images, operator: Any, mask_image: Images | None
    ) -> tuple[LinearOperator, torch.Tensor, bool, tuple[int, int]]:
        """Return the operator, the measurement y of images in [-1, 1], whether it was a picture, and the image's height and width."""
        channels, size = self.vae.config.in_channels, self.vae.config.sample_size
        images = as_list(image, "image")
        is_picture = mask_image is not None or not isinstance(images[0], torch.Tensor)
        if is_picture:
            # Gray pictures stay gray, because an operator may measure the gray values of colour images.
            gray = mask_image is None and all(getattr(one, "mode", None) in GRAY_MODES for one in images)
            y = prepare_picture(image, self.image_processor, 1 if gray else channels)
        else:
            y = image if isinstance(image, torch.Tensor) else torch.stack(images)
            if not y.is_floating_point():
                raise ValueError(f"`image` as a tensor must be a floating-point measurement, but is {y.dtype}.")
        y = y.to(device=self._execution_device, dtype=torch.promote_types(y.dtype, torch.float32))
        if mask_image is not None:
            observed = prepare_mask(mask_image, self.mask_processor, y).to(y.device)
            if is_turned(image) and not is_turned(mask_image):
                logger.warning(
                    "`image` is turned upright by its EXIF data, but `mask_image` has none: check that it is upright."
                )
            # Repainted pixels do not count, even if their values are not finite.
            y = torch.where(observed, y, 0.0)
            y = y.expand(-1, channels, -1, -1) if y.shape[1] == 1 else y
            operator = Inpainting(observed)
        operator = as_operator(operator)
        back = operator.A_adjoint(y)
        if back.ndim != 4 or back.shape[1] != channels or min(back.shape[2:]) < size:
            allowed = f"of images with {channels} channel(s) and at least {size}x{size} px"
            raise ValueError(f"`image` must be a measurement {allowed}, but is one of {tuple(back.shape[1:])}.")
        measured = operator.A(torch.ones_like(back) if is_picture else back)
        check_shape("image", y, tuple(measured.shape))
        if not all((values.abs() <= LARGEST_VALUE).all() for values in (y, back, measured)):
            raise ValueError(f"`image`, and `operator` applied to it, must be finite and at most {LARGEST_VALUE:g}.")
        if is_picture:
            # A picture p measures an image in [0, 1]. The measurement of the same image in [-1, 1] is 2 p - A 1.
            y = 2 * y - measured
        return operator, y, is_picture, tuple(back.shape[2:])

    def prepare_latents(
        self,
        likelihood: Likelihood,
        canvas: Canvas,
        start: str,
        generator: Generators,
        latents: torch.Tensor | None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        count = len(likelihood.y) * likelihood.num_answers
        check_generator(generator, count)
        shape = (count * len(canvas), self.vae.config.latent_channels, 1, 1)
        if latents is not None:
            check_shape("latents", latents, shape)
            return latents.to(device=self._execution_device, dtype=torch.float32)
        noise = draw(shape, generator, likelihood.y)
        if start == "prior":
            return noise
        guess = likelihood.operator.A_dagger(likelihood.y, max(likelihood.damping, START_DAMPING)).float().clamp(-1, 1)
        classes = {} if labels is None else {"class_labels": labels.repeat_interleave(len(canvas))}
        encoded = self.vae.encode(canvas.split(guess).to(self.vae.dtype), **classes).latent_dist.mode().float()
        answers = encoded.unflatten(0, (-1, len(canvas))).repeat_interleave(likelihood.num_answers, dim=0)
        return answers.flatten(0, 1) + START_SPREAD * noise

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        operator: Any = None,
        mask_image: Images | None = None,
        noise_std: float | None = None,
        num_restorations: int = 1,
        num_inference_steps: int = 75,
        method: str = "langevin",
        energy_weight: float = 0.0,
        start: str = "encoding",
        tile_overlap: int | None = None,
        reconstruction_variance: float | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        class_labels: ClassLabels = None,
    ) -> ECVAERestorationOutput:
        r"""
        The call function to the pipeline for restoration.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                The measurement, never a clean image. With `mask_image` it is a picture: PIL, an array (B, H, W, C) or a tensor
                (B, C, H, W) in [0, 1]. With `operator`, PIL images and arrays are measurements of an image in [0, 1], and a
                tensor (B, ...) is the measurement y = A x of an image x in [-1, 1]. PIL images are read as in training: turned
                upright by their EXIF data, with transparent pixels over white.
            operator ([`~operators.LinearOperator`], an object with `A` and `A_adjoint`, or a pair of functions, *optional*):
                The linear operator A, called with batches of B.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*):
                Instead of `operator`: white (1) pixels of `image` are repainted, black (0) ones kept. One mask, or one per image.
                PIL masks may also have black and one other level or colour, such as labels 0 and 1, or painted strokes.
            noise_std (`float`, *optional*):
                The standard deviation sigma of the noise in each entry of y, for images in [-1, 1]. Divide noise in 8-bit levels
                by 127.5. Defaults to 0.0023 (rounding to 8 bits) for pictures, and to 0 for tensors with an `operator`.
            num_restorations (`int`, *optional*, defaults to 1):
                Number M of answers per measurement. They differ in what was not measured; `std` needs several.
            num_inference_steps (`int`, *optional*, defaults to 75):
                Number of search steps, each a forward and a backward pass of the decoder. One more pass decodes the answer.
            method (`str`, *optional*, defaults to `"langevin"`):
                `"langevin"` draws answers from the posterior, `"map"` finds the most likely latents near each start.
            energy_weight (`float`, *optional*, defaults to 0.0):
                Weight w of an answer's energy in the search, at least 0. A weight above 0 requires an `energy_model`.
            start (`str`, *optional*, defaults to `"encoding"`):
                `"encoding"` starts the latents near the encoding of A^+ y, `"prior"` at draws from N(0, I).
            tile_overlap (`int`, *optional*): Pixels that neighbouring tiles share. Defaults to a quarter of a tile.
            reconstruction_variance (`float`, *optional*):
                Mean squared error v of the model's reconstructions per pixel, for images in [-1, 1]. Defaults to the value that
                training measured. How the error spreads over frequencies always comes from training.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per answer (B * M), to make restoration deterministic.
            latents (`torch.Tensor` of shape `(B * M * tiles, latent_channels, 1, 1)`, *optional*):
                Initial latents instead of `start`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1]. `None` means `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`ECVAERestorationOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, step, {"latents": latents})` after each step. It may return new latents in a dict,
                or set `pipe._interrupt = True`: the answers are then made from the latents of that step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Tensors that the callback gets: `"latents"`.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                Names or numbers of the classes that the measurements show, one for all or one per measurement (B). `None` is the
                unknown class. A model without classes accepts only `None`.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from ecvae_diffusers import ECVAERestorationPipeline

            >>> pipe = ECVAERestorationPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> output = pipe(Image.open("damaged.png"), mask_image=Image.open("mask.png"))  # doctest: +SKIP
            >>> output.images[0].save("restored.png")  # doctest: +SKIP
            ```

        Returns:
            [`ECVAERestorationOutput`] or `tuple`

        Raises:
            ValueError: if an argument is outside its range, or shapes do not fit.
        """
        config, size = self.vae.config, self.vae.config.sample_size
        overlap = size // 4 if tile_overlap is None else tile_overlap
        variance = config.reconstruction_variance if reconstruction_variance is None else reconstruction_variance
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, ("latents",))
        if (operator is None) == (mask_image is None):
            raise ValueError("Exactly one of `operator` and `mask_image` must be given.")
        if variance is None or (energy_weight and self.energy_model is None):
            missing = (
                "`reconstruction_variance` must be given"
                if variance is None
                else "`energy_weight` requires an `energy_model`"
            )
            raise ValueError(f"{missing}: the pipeline has none.")
        check_number("num_restorations", num_restorations, 1, whole=True)
        check_number("num_inference_steps", num_inference_steps, 1, whole=True)
        check_number("energy_weight", energy_weight, 0)
        check_number("tile_overlap", overlap, 0, size - 1, whole=True)
        check_number("reconstruction_variance", variance, 1e-12, LARGEST_VARIANCE)
        check_choice("method", method, ("langevin", "map"))
        check_choice("start", start, ("encoding", "prior"))
        check_choice("output_type", output_type, ("pil", "np", "pt", None))
        operator, y, is_picture, (height, width) = self.prepare_measurement(image, operator, mask_image)
        noise_std = (ROUNDING_STD if is_picture else 0.0) if noise_std is None else float(noise_std)
        check_number("noise_std", noise_std, 0, max(1.0, y.abs().max().item()))

        spectrum = config.get("reconstruction_spectrum")  # configs saved by earlier versions lack it
        likelihood = Likelihood(operator, y, noise_std, variance, num_restorations, spectrum)
        canvas = Canvas(height, width, size, overlap)
        labels, of_tiles = known_labels(self, class_labels, len(y)), None
        if labels is not None:
            of_tiles = labels.repeat_interleave(num_restorations * len(canvas))
        classes = {} if of_tiles is None else {"class_labels": of_tiles}
        calls = ["encoder"] if latents is None and start == "encoding" else []
        latents = self.prepare_latents(likelihood, canvas, start, generator, latents, labels)
        # Operators without a `solver_dtype`, such as functions, are called in the measurement's precision.
        dtype = y.dtype if operator.solver_dtype is None else torch.float32

        def decode(latents: torch.Tensor) -> torch.Tensor:
            calls.append("decoder")
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False, **classes)[0].to(dtype)

        def energy_gradient(tiles: torch.Tensor) -> torch.Tensor:
            calls.append("energy model")
            return energy_and_gradient(self.energy_model, tiles, of_tiles)[1]

        def on_step(step: int, latents: torch.Tensor) -> torch.Tensor:
            progress_bar.update()
            if callback_on_step_end is not None:
                tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                latents = (callback_on_step_end(self, step, step, tensors) or {}).pop("latents", latents)
            if self.interrupt:
                raise Interruption(latents)
            return latents

        self._interrupt, self.num_timesteps = False, num_inference_steps
        frozen_energy_model = frozen(self.energy_model) if energy_weight > 0 else nullcontext()
        with self.progress_bar(total=num_inference_steps) as progress_bar, frozen(self.vae), frozen_energy_model:
            try:
                latents = neural_transport(
                    decode, likelihood, canvas, latents, num_inference_steps, method,
                    energy_gradient if energy_weight > 0 else None, energy_weight, generator, on_step,
                )  # fmt: skip
            except Interruption as interruption:
                (latents,) = interruption.args
            decoded = canvas.join(decode(latents))

        check_finite(decoded, "`latents`, `callback_on_step_end`, `energy_weight` and the decoder's weights")
        center = likelihood.mean(decoded)
        answers = likelihood.sample(decoded, generator) if noise_std > 0 else center
        by_measurement = center.unflatten(0, (-1, num_restorations))
        mean, spread = by_measurement.mean(1), by_measurement.var(1, correction=min(1, num_restorations - 1))
        std = (spread + likelihood.variance(by_measurement[:, 0])).sqrt() / 2
        returned = answers.clamp(-1, 1)
        if output_type == "pil":
            returned = (returned * 127.5 + 127.5).round() / 127.5 - 1
        residual = likelihood.relative_residual(answers)
        self.check_answers(likelihood, center, residual.max().item())
        energy = None
        if self.energy_model is not None:
            calls.append("energy model")
            with frozen(self.energy_model):
                energies = compute_energy(self.energy_model, canvas.split(answers), of_tiles)
            energy = energies.unflatten(0, (-1, len(canvas))).mean(1)
        output = ECVAERestorationOutput(
            images=postprocess(answers, self.image_processor, output_type),
            mean=postprocess(mean, self.image_processor, output_type),
            std=std if output_type == "pt" else std.permute(0, 2, 3, 1).cpu().numpy(),
            residual=residual,
            residual_output=likelihood.relative_residual(returned),
            residual_mean=Likelihood(operator, y, noise_std, variance).relative_residual(mean),
            energy=energy,
            num_network_calls=len(calls),
        )
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    @staticmethod
    def check_answers(likelihood: Likelihood, center: torch.Tensor, residual: float) -> None:
        """Warn if answers leave [-1, 1], or disagree with the measurement."""
        excess = (center.abs() - 1).clamp(min=0).square().mean().sqrt().item()
        misfit, noise_std = likelihood.misfit(center).square().mean().sqrt().item(), likelihood.noise_std
        faults = [f"leave [-1, 1] by {excess:.2g}"] if excess > LARGEST_EXCESS else []
        if 0 < LARGEST_MISFIT * noise_std < misfit:
            faults.append(f"differ from `image` by {misfit:.2g}")
        if noise_std == 0 and residual > LARGEST_RESIDUAL:
            faults.append(f"agree with `image` only to {residual:.1g}")
        if faults:
            logger.warning(
                f"Answers {' and '.join(faults)}, but `noise_std` is {noise_std:.2g}. Possible causes: `image` has more noise, is "
                "outside the operator's range (missing pixels of `Inpainting` must be 0), or shows nothing like the training data."
            )
