# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# diffusers loads it from a folder without the package, with trust_remote_code=True.
"""One-step image generation with an energy-calibrated VAE."""

import functools
import inspect
import json
import math
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils import parametrize


# The code of component classes is saved in separate files. Here their base classes stand in for them.
AutoencoderEC = ModelMixin
EnergyModel = ModelMixin
LangevinScheduler = SchedulerMixin


LARGEST_VALUE = 1e12


def height_and_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width of images from a config's `sample_size`, which is one number for squares."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width


def check_number(name: str, value: float, low: float, high: float = LARGEST_VALUE, whole: bool = False) -> None:
    """Raise `ValueError` if an argument is not from `low` to `high` or, with `whole`, not an integer."""
    if not low <= value <= high or (whole and not isinstance(value, int | np.integer)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} from {low:g} to {high:g}, but is {value}.")


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


def once(normalize: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """
    Return a parametrization, such as spectral norm, that computes its weight at the first call and keeps it. Two threads that call it
    first may both compute it. The weight never belongs to inference mode, since other threads may need gradients through it.
    """

    @functools.cache
    def forward() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return normalize()

    return forward


class Freeze:
    """What a module, without its parts, was before it was frozen, and the number of contexts that need it frozen."""

    def __init__(self, module: nn.Module, keeps_weight: bool):
        self.module, self.users, self.training, self.keeps_weight = module, 0, module.training, keeps_weight
        self.trained = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        self.forward = vars(module).get("forward")  # that of a hook
        for parameter in self.trained:
            parameter.requires_grad_(False)
        if keeps_weight:
            module.forward = once(module.forward)
        module.training = False

    def undo(self) -> None:
        self.module.training = self.training
        for parameter in self.trained:
            parameter.requires_grad_(True)
        if self.keeps_weight:
            del self.module.forward
            if self.forward is not None:
                self.module.forward = self.forward


FREEZES = dict[nn.Module, Freeze]()


FREEZES_LOCK = threading.Lock()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Freeze a module while a chain runs on it: evaluation mode, no parameter gradients, normalized weights computed once. In training
    mode, spectral norm would take a power iteration at every step and so change the energy. The mode and `requires_grad` of every
    part are restored afterwards. If several threads freeze a module, that is when the last of them is done.

    Gradients also pass through a module that diffusers offloads or casts layer by layer. Its hooks swap the data of a parameter
    after the layer's forward pass, so the tensors that backward needs are saved during that pass.
    """
    parts = list(module.modules())
    # A compiled module normalizes its weights in its graph: it would be compiled again for each freeze.
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
    with FREEZES_LOCK:
        for part in parts:
            if part not in FREEZES:
                # Not by `parametrize.cached`: it keeps the weights of all modules in all threads, also those in training.
                FREEZES[part] = Freeze(part, isinstance(part, parametrize.ParametrizationList) and not is_compiled)
            FREEZES[part].users += 1
    is_hooked = any(hasattr(part, "_diffusers_hook") for part in parts)
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    try:
        with kept if is_hooked else nullcontext():
            yield
    finally:
        with FREEZES_LOCK:
            for part in parts:
                FREEZES[part].users -= 1
                if FREEZES[part].users == 0:
                    FREEZES.pop(part).undo()


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


class PosteriorEnergy:
    """
    The energy U of a batch of images, as a function of whitened latents, for `EnergyCalibrator.calibrate(..., energy_model=)`.

    Args:
        decode (`Callable`): The decoder G: latents (B, d, 1, 1) -> images (B, C, H, W).
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        posterior (`DiagonalGaussianDistribution`): q(z|x), whose mean and standard deviation are frozen.
        variance (`float`): s^2 > 0, per pixel.

    Raises:
        ValueError: if `variance` is not above 0.
    """

    def __init__(
        self, decode: Callable, images: torch.Tensor, posterior: DiagonalGaussianDistribution, variance: float
    ):
        if not 0 < variance < math.inf:
            raise ValueError(f"`variance` must be a finite number above 0, but is {variance}.")
        self.decode, self.variance, self.images = decode, variance, out_of_inference_mode(images)
        moments = (posterior.mean, posterior.std)
        self.mean, self.std = (out_of_inference_mode(moment.detach().float()) for moment in moments)

    def whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """Return u = (z - m) / sigma, with gradients to z alone."""
        return (latents - self.mean) / self.std

    def unwhiten(self, whitened: torch.Tensor) -> torch.Tensor:
        """Return z = m + sigma u."""
        return self.mean + self.std * whitened

    def __call__(self, whitened: torch.Tensor) -> torch.Tensor:
        """Return U(m + sigma u), shape (B,)."""
        latents = self.unwhiten(whitened)
        error = (self.decode(latents).float() - self.images.float()).square().flatten(1).sum(1)
        return error / (2 * self.variance) + latents.square().flatten(1).sum(1) / 2


DRIFT_STEP = 0.1


def refine(
    energy: PosteriorEnergy,
    whitened: torch.Tensor,
    steps: Iterable,
    noise: bool,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Return the end of `posterior_chain` from whitened latents or, without noise, the end of gradient descent on U. The steps are
    written out, because a pipeline on the Hub has only the scheduler that it was saved with.

    The step size suits a q near the posterior. For an image unlike the data, q may be far too wide and a step may lead uphill.
    Descent rejects such a step and halves the later steps of that image, so U never rises.

    Args:
        energy ([`PosteriorEnergy`]): U, of a frozen decoder.
        whitened (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0, float32.
        steps (`Iterable`): One item per step, a progress bar for example.
        noise (`bool`): Whether to add noise.
        generator (`torch.Generator` or a list of one per image, *optional*): Draws the noise.
    """
    if noise:
        for _ in steps:
            whitened = whitened - DRIFT_STEP * energy_and_gradient(energy, whitened)[1]
            normal = randn_tensor(whitened.shape, generator=generator, device=whitened.device, dtype=whitened.dtype)
            whitened = whitened + math.sqrt(2 * DRIFT_STEP) * normal
        return whitened
    value, gradient = energy_and_gradient(energy, whitened)
    step = torch.full_like(whitened[:, :1], DRIFT_STEP)
    for _ in steps:
        proposal = whitened - step * gradient
        new_value, new_gradient = energy_and_gradient(energy, proposal)
        lower = new_value < value  # False also if U has become NaN
        value = torch.where(lower, new_value, value)
        lower = lower.view(step.shape)
        whitened, gradient = torch.where(lower, proposal, whitened), torch.where(lower, new_gradient, gradient)
        step = torch.where(lower, step, step / 2)
    return whitened


refine_latents = refine


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


NUM_REFINEMENTS = 3


OUTLIER_SCALE = 16.0  # c


WINDOW = 3


LARGEST_SHARE = 0.05


SCORE = {"residual": 1.0, "largest": 1.0, "energy": 0.25}


MAP = {"pixel_residual": 1.0, "pixel_energy": 0.25}


UNMEASURED = {"quantiles": [0.0], "scale": 1.0}


def local_mean(values: torch.Tensor) -> torch.Tensor:
    """Apply B to values (B, C, H, W): the mean over channels and 3 x 3 pixels, (B, 1, H, W)."""
    margin = (WINDOW // 2,) * 4
    return F.avg_pool2d(F.pad(values.mean(1, keepdim=True), margin, mode="replicate"), WINDOW, stride=1)


def robust_reconstruction(
    reconstruct: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, variance: float
) -> torch.Tensor:
    """
    Return y, the reconstruction that ignores what the model cannot explain.

    Args:
        reconstruct (`Callable`): Encodes and decodes images.
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        variance (`float`): v, above 0.
    """
    found = reconstruct(images)
    for _ in range(NUM_REFINEMENTS):
        residual = images - found
        weight = 1 / (1 + local_mean(residual.square()) / (OUTLIER_SCALE * variance))
        found = reconstruct(found + weight * residual)
    return found


def spectral_error(residual: torch.Tensor, variance: float, spectrum: list[float] | None) -> torch.Tensor:
    """Return the error of residuals (B, C, H, W) in units of the error spectrum, (B,). It is near 1 for normal images."""
    height, width = residual.shape[-2:]
    power = torch.fft.rfft2(residual.float(), norm="ortho").abs().square().mean(1)
    expected = torch.ones(height, width // 2 + 1, dtype=torch.float64)
    if spectrum is not None:
        expected = at_frequencies(torch.tensor(spectrum, dtype=torch.float64), height, width)
        expected = (1 + expected / mean_over_frequencies(expected, width)) / 2
    weights = multiplicity(height, width) / expected
    return (power * weights.to(power)).sum((1, 2)) / (height * width * variance)


def bits(values: torch.Tensor, tail: dict[str, Any]) -> torch.Tensor:
    """Return -log2 of the share of normal values that are at least as large, at least 0, in the shape of `values`, float32."""
    quantiles = torch.tensor(tail["quantiles"], device=values.device, dtype=torch.float32)
    last, values = len(quantiles) - 1, values.float().contiguous()
    beyond = last + (values - quantiles[-1]).clamp(min=0) / (tail["scale"] * math.log(2))
    if last == 0:
        return beyond
    level = torch.searchsorted(quantiles, values, right=True).clamp(1, last)
    low, high = quantiles[level - 1], quantiles[level]
    between = level - 1 + ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return torch.where(values >= quantiles[-1], beyond, between)


def largest(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the largest twentieth of a map (B, H, W) of each image, (B,)."""
    count = max(1, round(LARGEST_SHARE * values[0].numel()))
    return values.flatten(1).topk(count, dim=1).values.mean(1)


def combine(parts: dict[str, torch.Tensor], tails: dict[str, Any] | None, weights: dict[str, float]) -> torch.Tensor:
    """
    Return the weighted sum of parts in bits.

    Args:
        parts (`dict[str, torch.Tensor]`): The parts, in their own units. The energy may be missing.
        tails (`dict`, *optional*): What `measure_tail` found for each part. Without it, the sum is the first part alone.
        weights (`dict[str, float]`): `SCORE` or `MAP`.
    """
    if tails is None:
        return bits(parts[next(iter(weights))], UNMEASURED)
    found = [weight * bits(parts[name], tails[name]) for name, weight in weights.items() if name in parts]
    return torch.stack(found).sum(0)


Images = PIL.Image.Image | np.ndarray | torch.Tensor | list


ClassLabels = str | int | list[str | int | None] | torch.Tensor | None


def known_labels(pipeline: Any, class_labels: ClassLabels, count: int) -> torch.Tensor | None:
    """Return class numbers (B,), with the unknown class where none is given. Return `None` for a model without classes."""
    labels = prepare_labels(class_labels, count, pipeline.vae.config)
    if labels is None:
        return None
    unknown = pipeline.vae.config.num_class_embeds
    numbers = [unknown if label is None else label for label in labels]
    return torch.tensor(numbers, device=pipeline._execution_device)


DETECTED_AT_A_TIME = 256


@dataclass
class AnomalyOutput(BaseOutput):
    """
    Output of `ECVAEPipeline.anomaly`, in bits: n bits mean that a share of 2^-n of normal images, or pixels, is as unusual. Beyond what
    was measured, an exponential tail continues this scale.

    Args:
        score (`torch.Tensor` of shape `(B,)`): How unusual each image is.
        map (`torch.Tensor` of shape `(B, H, W)`): How unusual each pixel is.
        threshold (`float`, *optional*):
            Images with a higher score are anomalous. `None` if none was measured (`ecvae calibrate-threshold`).
    """

    score: torch.Tensor
    map: torch.Tensor
    threshold: float | None = None

    @property
    def is_anomalous(self) -> torch.Tensor:
        """Which images are anomalous, bool (B,). Raises `ValueError` if the model has no threshold."""
        if self.threshold is None:
            raise ValueError(
                "`is_anomalous` requires a threshold, but the model has none: run `ecvae calibrate-threshold`."
            )
        return self.score > self.threshold


class DetectionMixin:
    """Mixin for a pipeline with an autoencoder `vae` and, optionally, an `energy_model`."""

    vae: Any
    energy_model: Any
    config: Any
    maybe_free_model_hooks: Any
    prepare_image: Any

    @torch.no_grad()
    def anomaly(self, image: Images, class_labels: ClassLabels = None) -> AnomalyOutput:
        """
        Return how far images lie from what the model can explain (`anomaly.py` has the equations).

        The unit is bits among normal images, which `ecvae calibrate-threshold` measures and stores in the pipeline's config. Without
        this measurement, score and map hold the error of the reconstruction alone, in the model's own unit.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size, as for `encode`.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes, as for `encode`. With a stored threshold, they must be `None`.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from ecvae_diffusers import ECVAEPipeline

            >>> pipe = ECVAEPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> found = pipe.anomaly(Image.open("part.png"))  # doctest: +SKIP
            >>> found.is_anomalous, found.map.argmax()  # doctest: +SKIP
            ```

        Returns:
            [`AnomalyOutput`]

        Raises:
            ValueError: if an image does not fit the model, or the model has no `reconstruction_variance`.
        """
        measured = self.config.get("anomaly_threshold")
        if measured is not None and ("energy" in measured["tails"]) != (self.energy_model is not None):
            raise ValueError(
                "`energy_model` must be there or not, as when `ecvae calibrate-threshold` measured the threshold."
            )
        if measured is not None and class_labels is not None:
            raise ValueError(
                f"`class_labels` must be None, since the threshold was measured without, but is {class_labels!r}."
            )
        parts = self.anomaly_parts(image, class_labels)
        tails = None if measured is None else measured["tails"]
        return AnomalyOutput(
            score=combine(parts, tails, SCORE),
            map=combine(parts, tails, MAP),
            threshold=None if measured is None else measured["threshold"],
        )

    @torch.no_grad()
    def anomaly_parts(self, image: Images, class_labels: ClassLabels = None) -> dict[str, torch.Tensor]:
        """
        Return the parts of scores, `residual`, `largest` and `energy` (B,), and of maps, `pixel_residual` and `pixel_energy` (B, H, W), in their
        own units. Without an energy model, there are no energies.
        """
        variance, spectrum = (self.vae.config.get(f"reconstruction_{name}") for name in ("variance", "spectrum"))
        if not variance:
            raise ValueError(f"`anomaly` requires a `reconstruction_variance` above 0, but the model's is {variance}.")
        images = self.prepare_image(image)
        labels = known_labels(self, class_labels, len(images))
        found = []
        for start in range(0, len(images), DETECTED_AT_A_TIME):
            batch, own = images[start : start + DETECTED_AT_A_TIME], None
            if labels is not None:
                own = labels[start : start + DETECTED_AT_A_TIME]
            classes = {} if own is None else {"class_labels": own}

            def reconstruct(some: torch.Tensor, classes: dict = classes) -> torch.Tensor:
                latents = self.vae.encode(some, **classes).latent_dist.mode()
                return self.vae.decode(latents, **classes).sample

            residual = batch - robust_reconstruction(reconstruct, batch, variance)
            parts = {"residual": spectral_error(residual, variance, spectrum)}
            parts["pixel_residual"] = local_mean(residual.square())[:, 0] / variance
            parts["largest"] = largest(parts["pixel_residual"])
            if self.energy_model is not None:
                with frozen(self.energy_model):
                    parts["energy"], gradient = energy_and_gradient(self.energy_model, batch.float(), own)
                parts["pixel_energy"] = local_mean(gradient.square())[:, 0]
            found.append(parts)
        self.maybe_free_model_hooks()
        return {name: torch.cat([parts[name].float() for parts in found]) for name in found[0]}


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` if an argument is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, but is {value!r}.")


NUM_FOLDS = 5


def difference_of_means(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the difference (d,) of the means of latents a (N, d) and b (M, d)."""
    return b.mean(0) - a.mean(0)


def classifier_normal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Fisher's discriminant (d,) of latents a (N, d) and b (M, d), as long as its part of the difference of means."""
    difference, centered = difference_of_means(a, b), torch.cat([a - a.mean(0), b - b.mean(0)])
    count, dim = centered.shape
    covariance = (centered.T @ centered + dim * torch.eye(dim).to(centered)) / (count + dim)
    normal = torch.linalg.solve(covariance, difference)
    return normal * (normal @ difference) / (normal @ normal).clamp(min=1e-30)


METHODS = {"means": difference_of_means, "classifier": classifier_normal}


def held_out_accuracy(a: torch.Tensor, b: torch.Tensor, method: str) -> float:
    """
    Return how often a direction from four fifths of latents a (N, d) and b (M, d) tells which set another latent is from: by
    whether it lies beyond the middle of the two means. Every latent is held out once. Both sets count the same.

    Args:
        method (`str`): `"means"` or `"classifier"`.
    """
    right: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for fold in range(NUM_FOLDS):
        held_out = [torch.arange(len(latents), device=latents.device) % NUM_FOLDS == fold for latents in (a, b)]
        rest = a[~held_out[0]], b[~held_out[1]]
        direction, middle = METHODS[method](*rest), (rest[0].mean(0) + rest[1].mean(0)) / 2
        right[0].append((a[held_out[0]] - middle) @ direction < 0)
        right[1].append((b[held_out[1]] - middle) @ direction > 0)
    return sum(torch.cat(found).float().mean().item() for found in right.values()) / 2


def principal_directions(latents: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the mean (d,) of latents (N, d) and their first principal directions (K, d), each as long as its standard deviation. K is at
    most `count`, N and d.
    """
    mean = latents.mean(axis=0)
    _, values, directions = np.linalg.svd(latents - mean, full_matrices=False)
    count = min(count, len(directions))
    return mean, directions[:count] * values[:count, None] / len(latents) ** 0.5


MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(tensor.shape)}.")


def check_finite(images: torch.Tensor, suspects: str) -> None:
    """Raise `ValueError` if decoded images are not finite: they would be displayed as black."""
    if not images.isfinite().all():
        raise ValueError(f"Images are not finite in {images.dtype}. Check {suspects}.")


def check_output_type(output_type: str | None, channels: int, *others: str) -> None:
    """Raise `ValueError` if `output_type` is not one of `others`, or one in which images of so many channels exist."""
    choices = ("pil", "np", "pt", None, *others)
    if channels not in MODES:
        choices = choices[1:]
        if output_type == "pil":
            raise ValueError(
                f"`output_type` must be one of {choices} for images of {channels} channels, but is 'pil', which has 1, 3 or 4."
            )
    check_choice("output_type", output_type, choices)


def postprocess(sample: torch.Tensor, processor: VaeImageProcessor, output_type: str | None) -> Any:
    """Convert images in [-1, 1] to `output_type`. Denormalizes the batch at once, which the processor would do image by image."""
    return processor.postprocess(processor.denormalize(sample), output_type=output_type or "np")


ENCODED_AT_A_TIME = 256


@dataclass
class DirectionOutput(BaseOutput):
    """
    Output of `ECVAEPipeline.direction`.

    Args:
        direction (`torch.Tensor` of shape `(latent_channels, 1, 1)`):
            The direction. An edit of strength 1 moves the mean of `images_a` to the level of the mean of `images_b`.
        accuracy (`float`):
            How often the direction, found without them, tells which set held-out images are from: 0.5 is by chance, 1 is always.
    """

    direction: torch.Tensor
    accuracy: float


class EditingMixin:
    """Mixin for a pipeline with an autoencoder `vae`."""

    vae: Any
    decode: Any
    image_processor: Any
    maybe_free_model_hooks: Any
    prepare_image: Any

    @torch.no_grad()
    def encode(self, image: Images, class_labels: ClassLabels = None) -> torch.Tensor:
        """
        Return the latents of images, the means of their posteriors.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size: arrays (B, H, W, C) and tensors (B, C, H, W) in [0, 1].
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes. `None` is the unknown class. A model without classes accepts only `None`.

        Returns:
            `torch.Tensor` of shape `(B, latent_channels, 1, 1)`.

        Raises:
            ValueError: if `image` or `class_labels` does not fit the model.
        """
        images = self.prepare_image(image)
        labels = known_labels(self, class_labels, len(images))
        return self.encode_prepared(images, labels)

    def encode_prepared(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the posterior means of images in [-1, 1], encoded in parts."""
        parts = images.split(ENCODED_AT_A_TIME)
        classes = (
            [{}] * len(parts) if labels is None else [{"class_labels": x} for x in labels.split(ENCODED_AT_A_TIME)]
        )
        found = [self.vae.encode(part, **own).latent_dist.mode() for part, own in zip(parts, classes)]
        self.maybe_free_model_hooks()
        return torch.cat(found)

    def direction(
        self, images_a: Images, images_b: Images, method: str = "means", class_labels: ClassLabels = None
    ) -> DirectionOutput:
        """
        Return the direction from one set of images to another (`edits.py` has the equations).

        Args:
            images_a, images_b (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                Two sets of at least 5 images each, for example without and with glasses, as for `encode`.
            method (`str`, *optional*, defaults to `"means"`):
                `"means"` is the difference of the means, `"classifier"` the normal of a linear classifier. The classifier leaves alone
                what both sets share, but may need larger strengths for the same effect.
            class_labels (`str`, `int` or `None`, *optional*): The class of all images, as for `encode`.

        Returns:
            [`DirectionOutput`]

        Raises:
            ValueError: if an argument is outside its range, or images do not fit the model.
        """
        check_choice("method", method, tuple(METHODS))
        sets = []
        for name, images in (("images_a", images_a), ("images_b", images_b)):
            latents = self.encode(images, class_labels).float().flatten(1)
            check_number(f"len({name})", len(latents), NUM_FOLDS, whole=True)
            sets.append(latents)
        direction = METHODS[method](sets[0], sets[1])
        return DirectionOutput(direction[:, None, None], held_out_accuracy(sets[0], sets[1], method))

    def principal_directions(self, num_directions: int, image: Images | None = None) -> torch.Tensor:
        """
        Return the directions in which the latents of the data vary most, each as long as one standard deviation.

        Args:
            num_directions (`int`): Number K of directions, from 1 to the number of those that training has saved.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*):
                Images like the training data, as for `encode`, whose directions are returned. If not given, the directions are those
                that training has measured on the training data (`vae.config.posterior_directions`).

        Returns:
            `torch.Tensor` of shape `(K, latent_channels, 1, 1)`, the most variable direction first.

        Raises:
            ValueError: if `num_directions` is outside its range, or `image` is not given and the model has no saved directions.
        """
        saved = self.vae.config.get("posterior_directions")  # configs saved by earlier versions lack it
        if image is not None:
            latents = self.encode(image).flatten(1).double().cpu().numpy()
            saved = principal_directions(latents, self.vae.config.latent_channels)[1].tolist()
        elif saved is None:
            raise ValueError("`image` must be given: the model was saved without `posterior_directions`.")
        check_number("num_directions", num_directions, 1, len(saved), whole=True)
        return torch.tensor(saved[:num_directions])[:, :, None, None]

    @torch.no_grad()
    def edit(
        self,
        image: Images,
        direction: torch.Tensor,
        strength: float | list[float] = 1.0,
        keep_residual: bool = True,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Move images along a direction of the latent space.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): B images, as for `encode`.
            direction (`torch.Tensor` of shape `(latent_channels, 1, 1)` or `(B, latent_channels, 1, 1)`):
                From `direction` or `principal_directions`: one for all images, or one per image.
            strength (`float` or `list[float]`, *optional*, defaults to 1.0):
                How far to move, in lengths of `direction`. Negative strengths move back. A list gives several edits of each image.
            keep_residual (`bool`, *optional*, defaults to `True`):
                Whether to add what the reconstruction lost. Strength 0 then returns the images themselves.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation, except `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*): As for `encode`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with B times `len(strength)` images, image by image.

        Raises:
            ValueError: if an argument is outside its range, or shapes do not fit.
        """
        check_output_type(output_type, self.vae.config.in_channels)
        strengths = torch.as_tensor(strength, dtype=torch.float64).flatten().tolist()
        check_number("len(strength)", len(strengths), 1)
        for one in strengths:
            check_number("strength", one, -1e6, 1e6)
        images = self.prepare_image(image)
        count, num_latents = len(images), self.vae.config.latent_channels
        direction = direction[None] if direction.ndim == 3 else direction
        check_shape("direction", direction, (count if len(direction) > 1 else 1, num_latents, 1, 1))
        labels = known_labels(self, class_labels, count)
        latents = self.encode_prepared(images, labels)
        steps = torch.tensor(strengths).to(latents).view(1, -1, 1, 1, 1) * direction.to(latents).unsqueeze(1)
        moved = (latents.unsqueeze(1) + steps).flatten(0, 1)
        of_moved = None if labels is None else labels.repeat_interleave(len(strengths))
        edited = self.decode(moved, of_moved)
        if keep_residual:
            residual = images - self.decode(latents, labels)
            edited = edited + residual.repeat_interleave(len(strengths), dim=0)
        check_finite(edited, "`direction`, `strength` and the decoder's weights")
        edited = postprocess(edited, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=edited) if return_dict else (edited,)

    @torch.no_grad()
    def mix(
        self,
        image: Images,
        weights: list[float] | torch.Tensor,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Decode weighted means of the latents of images.

        Args:
            image (list of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): B images, as for `encode`.
            weights (`list[float]` or `torch.Tensor` of shape `(B,)` or `(M, B)`):
                The weight of each image, at least 0: one set for one mixture, or M sets. They are divided by their sum.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation, except `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int` or `None`, *optional*): The class of all images, as for `encode`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with M images.

        Raises:
            ValueError: if weights are below 0, not finite or all 0, or their number is not that of the images.
        """
        check_output_type(output_type, self.vae.config.in_channels)
        latents = self.encode(image, class_labels)
        shares = torch.atleast_2d(torch.as_tensor(weights, dtype=torch.float64))
        check_shape("weights", shares, (len(shares), len(latents)))
        sums = shares.sum(1, keepdim=True)
        if not (shares.isfinite().all() and (shares >= 0).all() and (sums > 0).all()):
            raise ValueError(f"`weights` must be finite, at least 0 and not all 0, but are {shares.tolist()}.")
        mixed = (shares / sums).to(latents) @ latents.flatten(1)
        images = self.decode(mixed[:, :, None, None], known_labels(self, class_labels, len(mixed)))
        check_finite(images, "`image` and the decoder's weights")
        images = postprocess(images, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


LARGEST_TEMPERATURE = 100.0


logger = logging.get_logger(__name__)


Generators = torch.Generator | list[torch.Generator] | None


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
    that are not finite. Raises `ValueError` if pictures can't be read, are not floating-point, leave [0, 1], or are PIL images for a
    number of channels that PIL does not have.
    """
    images = as_list(image, "image")
    if isinstance(images[0], PIL.Image.Image):
        if channels not in MODES:
            raise ValueError(
                f"`image` must be an array or a tensor for a model of {channels} channels: PIL has 1, 3 or 4."
            )
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


def check_generator(generator: Generators, count: int) -> None:
    """Raise `ValueError` if `generator` is not one generator, or a list of one for each of `count` images."""
    kinds = [type(one) for one in generator] if isinstance(generator, list) else type(generator)
    if kinds not in (torch.Generator, [torch.Generator] * count, type(None)):
        raise ValueError(f"`generator` must be a torch.Generator or a list of {count}, one per image, but is {kinds}.")


def draw_classes(config: Any, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw class numbers (count,) by the training data's frequencies in a model's config, on the generator's device."""
    weights = torch.tensor(config.class_frequencies or [1.0] * config.num_class_embeds)
    weights = weights if generator is None else weights.to(generator.device)
    return weights.multinomial(count, replacement=True, generator=generator)


def prepare_latents(
    batch_size: int,
    num_latents: int,
    temperature: float,
    generator: Generators,
    latents: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the given latents, or draw them: (batch_size, num_latents, 1, 1). Raises `ValueError` if an argument does not fit."""
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("temperature", temperature, 0, LARGEST_TEMPERATURE)
    if latents is not None and temperature != 1:
        raise ValueError(f"`temperature` must be 1 if `latents` are given, but is {temperature}.")
    if latents is not None and batch_size == 1:
        batch_size = max(1, len(latents))
    check_generator(generator, batch_size)
    shape = (batch_size, num_latents, 1, 1)
    if latents is None:
        return temperature * randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    check_shape("latents", latents, shape)
    return latents.to(device=device, dtype=dtype)


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


# On a CPU, batches are decoded in parts whose widest activations take this many bytes. Larger parts outgrow the cache and are
# slower.
CPU_PART_BYTES = 8 * 2**20


class ECVAEPipeline(SelfContained, EditingMixin, DetectionMixin, DiffusionPipeline):
    r"""
    Pipeline for image generation with an energy-calibrated VAE, optionally conditional on classes: one decoder pass per image.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        vae ([`AutoencoderEC`]): The autoencoder whose decoder maps latents from N(0, I) to images.
        energy_model ([`EnergyModel`], *optional*):
            The energy model that calibrated the VAE. Only `score`, `oversample` and `num_refinement_steps` require it.
        scheduler ([`LangevinScheduler`], *optional*):
            The chain of the calibration. Only `num_refinement_steps` requires it.
        anomaly_threshold (`dict`, *optional*):
            What is normal for the model, measured by `ecvae calibrate-threshold`. Only `anomaly` uses it.
    """

    model_cpu_offload_seq = "vae->energy_model"
    _optional_components = ["energy_model", "scheduler"]
    _interrupt = False
    num_timesteps = 0  # refinement steps of the latest call

    def __init__(
        self,
        vae: AutoencoderEC,
        energy_model: EnergyModel | None = None,
        scheduler: LangevinScheduler | None = None,
        anomaly_threshold: dict[str, Any] | None = None,
    ):
        super().__init__()
        # Only if it is there, so that folders of models without it stay as they are.
        if anomaly_threshold is not None:
            self.register_to_config(anomaly_threshold=anomaly_threshold)
        self.register_modules(vae=vae, energy_model=energy_model, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "ECVAEPipeline":
        """
        Create a pipeline that shares the components of another one. A restoration pipeline has no scheduler, so pass one:
        `from_pipe(restoration, scheduler=scheduler)`, or `None` if `num_refinement_steps` is not needed.
        """
        if "scheduler" not in kwargs and "scheduler" not in pipeline.components:
            raise ValueError(
                "`scheduler` must be given (a LangevinScheduler or None), because the other pipeline has none."
            )
        return super().from_pipe(pipeline, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether refinement stops before its next step. Set `_interrupt` to stop it, from another thread for example."""
        return self._interrupt

    def refinement_steps(self, num_steps: int) -> Iterable[int]:
        self._interrupt, self.num_timesteps = False, num_steps
        return takewhile(lambda step: not self.interrupt, self.progress_bar(range(num_steps)))

    def latents_placement(self) -> tuple[torch.device, torch.dtype]:
        """
        Return the device and dtype of the decoder's latents. diffusers' properties account for hooks that move or cast them, but
        take as long as half a pass of a small decoder. They are used only if there are such hooks.
        """
        conv_in = self.vae.decoder.conv_in
        modules = (self.vae, self.vae.decoder, conv_in)  # where such hooks are placed
        if any(hasattr(module, hook) for module in modules for hook in ("_hf_hook", "_diffusers_hook")):
            return self._execution_device, self.vae.dtype
        return conv_in.weight.device, conv_in.weight.dtype

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Return the numbers of classes.

        Args:
            label (`str` or `list[str]`): Names of classes, from `pipe.vae.config.id2label`.

        Raises:
            ValueError: if the model has no class of that name.
        """
        return label_ids([label] if isinstance(label, str) else label, self.vae.config)

    def draw_labels(self, class_labels: Sequence[str | int | None], generator: Generators) -> torch.Tensor | None:
        """
        Return class numbers (B,). A label that is `None` is drawn by the class frequencies of the training data. Return `None` for a
        model without classes.
        """
        config = self.vae.config
        if (labels := prepare_labels(list(class_labels), len(class_labels), config)) is None:
            return None
        if None in labels:
            generators = generator if isinstance(generator, list) else [generator]
            share = len(labels) // len(generators)
            drawn = torch.cat([draw_classes(config, share, own) for own in generators]).tolist()
            labels = [other if label is None else label for label, other in zip(labels, drawn)]
        return torch.tensor(labels, device=self._execution_device)

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Decode latents to images in [-1, 1]. On a CPU, large batches are decoded in parts."""
        config, part = self.vae.config, len(latents)
        if latents.device.type == "cpu":
            patch = config.get("patch_size", 1)  # configs saved by earlier versions lack it
            num_pixels = math.prod(height_and_width(config.sample_size)) // patch**2
            widest = config.block_out_channels[0] * num_pixels * latents.element_size()
            part = max(1, CPU_PART_BYTES // widest)
        classes = [{}] * len(latents) if labels is None else [{"class_labels": some} for some in labels.split(part)]
        parts = zip(latents.split(part), classes)
        images = [self.vae.decode(some, return_dict=False, **own)[0] for some, own in parts]
        return images[0] if len(images) == 1 else torch.cat(images)

    def prepare_image(self, image: Images) -> torch.Tensor:
        """
        Convert PIL images of any mode, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1] to a tensor in [-1, 1]. Raises
        `ValueError` if the size or channels do not fit the model, or a value is out of range or not finite.
        """
        size, channels = height_and_width(self.vae.config.sample_size), self.vae.config.in_channels
        images = prepare_picture(image, self.image_processor, channels)
        check_shape("image", images, (max(1, len(images)), channels, *size))
        if not images.isfinite().all():
            raise ValueError("`image` must have finite values.")
        images = images.to(device=self._execution_device, dtype=self.vae.dtype).clamp(0, 1)
        return self.image_processor.normalize(images)

    def refine(
        self,
        sample: torch.Tensor,
        num_refinement_steps: int,
        generator: Generators,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run the calibration chain on decoded images, with the energy model frozen.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
            num_refinement_steps (`int`): Steps of the chain.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As for generation.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Class numbers.

        Returns:
            `torch.Tensor` of the shape and dtype of `sample`.
        """
        dtype = sample.dtype
        initial_sample = sample = sample.float()
        # A copy, because the pipeline may share its scheduler with a calibrator that takes another number of steps.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_refinement_steps)
        with frozen(self.energy_model):
            for timestep in self.refinement_steps(num_refinement_steps):
                gradient = energy_and_gradient(self.energy_model, sample, labels)[1]
                sample = scheduler.step(gradient, timestep, sample, initial_sample, generator).prev_sample
        return sample.to(dtype)

    def energies(self, sample: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the energies (B,), float32, of images (B, C, H, W) in [-1, 1], as `score` does."""
        with frozen(self.energy_model):
            return compute_energy(self.energy_model, sample.clamp(-1, 1).to(self.energy_model.dtype), labels)

    def keep_lowest(self, sample: torch.Tensor, oversample: int, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Keep the image of lowest energy of each `oversample` ones in a row: (B * oversample, C, H, W) in [-1, 1] to (B, C, H, W)."""
        energies = self.energies(sample, labels).view(-1, oversample)
        return sample.unflatten(0, energies.shape)[torch.arange(len(energies)), energies.argmin(1)]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
        num_refinement_steps: int = 0,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        oversample: int = 1,
    ) -> ImagePipelineOutput:
        r"""
        The call function to the pipeline for generation. It runs one decoder pass, and by default no other network.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per image, to make generation deterministic.
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, 1, 1)`, *optional*):
                Latents to decode as they are, instead of draws from N(0, I).
            temperature (`float`, *optional*, defaults to 1.0):
                Standard deviation of the drawn latents, from 0 to 100. Below 1, images are more typical and less varied.
            num_refinement_steps (`int`, *optional*, defaults to 0):
                Number of Langevin steps on the energy model after decoding. A calibrated decoder does not need them.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1], or
                `"latent"`, the latents without decoding. `None` means `"np"`. `"pil"` exists for 1, 3 or 4 channels.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a plain tuple of the images.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The classes to generate, as names or numbers: one for all images or one per image. `None` draws a class by its
                frequency in the training data. The number `vae.config.num_class_embeds` is the unknown class. A model without
                classes accepts only `None`.
            oversample (`int`, *optional*, defaults to 1):
                Number of images to draw for each one that is returned, which is the one of lowest energy. Recall falls, since kinds of
                images with high energies are left out. Precision rises if the energy model can still tell samples from data. It takes
                as many passes of the decoder and of the energy model.

        Examples:
            ```py
            >>> import torch
            >>> from ecvae_diffusers import ECVAEPipeline

            >>> pipe = ECVAEPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images  # doctest: +SKIP
            >>> images[0].save("sample.png")  # doctest: +SKIP
            ```

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`

        Raises:
            ValueError: if an argument is outside its range.
        """
        check_output_type(output_type, self.vae.config.in_channels, "latent")
        check_number("num_refinement_steps", num_refinement_steps, 0, whole=True)
        if num_refinement_steps and (output_type == "latent" or self.energy_model is None or self.scheduler is None):
            raise ValueError("`num_refinement_steps` requires an `energy_model`, a `scheduler` and decoded images.")
        check_number("oversample", oversample, 1, whole=True)
        if oversample > 1 and (latents is not None or output_type == "latent" or self.energy_model is None):
            raise ValueError(
                f"`oversample` must be 1 with `latents`, for latents, or without an `energy_model`, but is {oversample}."
            )
        if isinstance(class_labels, (list, tuple, torch.Tensor)) and batch_size == 1 and latents is None:
            batch_size = len(class_labels)
        drawn_by = [one for one in generator for _ in range(oversample)] if isinstance(generator, list) else generator
        num_latents, placement = self.vae.config.latent_channels, self.latents_placement()
        latents = prepare_latents(batch_size * oversample, num_latents, temperature, drawn_by, latents, *placement)
        asked_for = prepare_labels(class_labels, len(latents) // oversample, self.vae.config)
        if output_type == "latent":
            image = latents
        else:
            labels = None if asked_for is None else self.draw_labels(asked_for, generator)
            if oversample == 1:
                image = self.decode(latents, labels)
            else:
                repeated = None if labels is None else labels.repeat_interleave(oversample)
                image = self.keep_lowest(self.decode(latents, repeated), oversample, repeated)
            check_finite(image, "`temperature`, `latents` and the decoder's weights")
            if num_refinement_steps > 0:
                image = self.refine(image, num_refinement_steps, generator, labels)
            image = postprocess(image, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    @torch.no_grad()
    def reconstruct(
        self,
        image: Images,
        sample_posterior: bool = False,
        num_refinement_steps: int = 0,
        variance: float = 0.5,
        generator: Generators = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Encode images and decode them again.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                Images of the model's size: arrays (B, H, W, C) and tensors (B, C, H, W) in [0, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether to decode a draw from the posterior instead of its mean.
            num_refinement_steps (`int`, *optional*, defaults to 0):
                Number of steps on the latents (in generation: on the image). They lead towards the true posterior,
                -log p(z|x) = |x - G(z)|^2 / (2 s^2) + |z|^2 / 2 + constant. A draw (`sample_posterior`) takes Langevin steps, the
                mean descends to the most likely latents. Each step takes a forward and a backward pass of the decoder.
            variance (`float`, *optional*, defaults to 0.5):
                s^2 per pixel, at least 1e-12: half of the KL weight that the autoencoder was trained with.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per image, to make the draws deterministic.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for generation; `"latent"` returns the encoding, of shape `(batch_size, latent_channels, 1, 1)`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes, as for generation. `None` is the unknown class.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`

        Raises:
            ValueError: if `image` does not fit the model, or another argument is outside its range.
        """
        check_output_type(output_type, self.vae.config.in_channels, "latent")
        check_number("num_refinement_steps", num_refinement_steps, 0, whole=True)
        check_number("variance", variance, 1e-12)
        images = self.prepare_image(image)
        check_generator(generator, len(images))
        labels = known_labels(self, class_labels, len(images))
        classes = {} if labels is None else {"class_labels": labels}
        posterior = self.vae.encode(images, **classes).latent_dist
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        if num_refinement_steps > 0:
            dtype, steps = latents.dtype, self.refinement_steps(num_refinement_steps)
            energy = PosteriorEnergy(
                lambda z: self.vae.decode(z.to(dtype), **classes).sample, images, posterior, variance
            )
            with frozen(self.vae):
                whitened = refine_latents(energy, energy.whiten(latents.float()), steps, sample_posterior, generator)
            latents = energy.unwhiten(whitened).to(dtype)
        return self(latents=latents, output_type=output_type, return_dict=return_dict, class_labels=labels)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: Images,
        image_b: Images,
        num_steps: int = 8,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Decode latents on the straight line between the encodings of two images.

        Args:
            image_a, image_b (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images each, as for `reconstruct`. One image is paired with all images of the other argument.
            num_steps (`int`, *optional*, defaults to 8):
                Number of images from a to b, including the reconstructions of both; at least 2.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The classes of both images of each pair, as for `reconstruct`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with B * `num_steps` images, pair by pair.

        Raises:
            ValueError: if there are fewer than 2 steps, or an image does not fit the model.
        """
        check_output_type(output_type, self.vae.config.in_channels, "latent")
        check_number("num_steps", num_steps, 2, whole=True)
        ends = [self.encode(image, class_labels) for image in (image_a, image_b)]
        weights = torch.linspace(0, 1, num_steps, device=ends[0].device, dtype=ends[0].dtype).view(1, -1, 1, 1, 1)
        latents = torch.lerp(ends[0].unsqueeze(1), ends[1].unsqueeze(1), weights).flatten(0, 1)
        labels = known_labels(self, class_labels, len(latents) // num_steps)
        labels = None if labels is None else labels.repeat_interleave(num_steps)
        return self(latents=latents, output_type=output_type, return_dict=return_dict, class_labels=labels)

    @torch.no_grad()
    def score(self, image: Images, class_labels: ClassLabels = None) -> torch.Tensor:
        """
        Return the energies of images. Low energy means like the training data. Only differences between energies are meaningful.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size, as for `reconstruct`.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes, as for `reconstruct`.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32.

        Raises:
            ValueError: if the pipeline has no energy model, or an image does not fit the model.
        """
        if self.energy_model is None:
            raise ValueError("`score` requires an `energy_model`, but the pipeline has none.")
        sample = self.prepare_image(image)
        energy = self.energies(sample, known_labels(self, class_labels, len(sample)))
        self.maybe_free_model_hooks()
        return energy
