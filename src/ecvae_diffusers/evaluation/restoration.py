# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Restoration tasks, and the quality of an answer: PSNR, SSIM, feature distance, residual, calibrated uncertainty."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.figures import DISTANCES
from ecvae_diffusers.metrics import GenerationMetrics, reconstruction_metrics
from ecvae_diffusers.operators import (
    Blur,
    Colorization,
    CompressedSensing,
    Denoising,
    Inpainting,
    LinearOperator,
    SuperResolution,
    gaussian_kernel,
)
from ecvae_diffusers.training.data.transforms import to_uint8


# Share of the pixels that "random_inpainting" observes.
OBSERVED = 0.3
# Pixels of images in [-1, 1] that vary less over the test set, such as an empty border, are left out of the coverage.
LEAST_VARIED = 0.05
# The answer's own share of a pixel's variance from which on the measurement leaves it open.
LEFT_OPEN = 0.01


def make_operator(name: str, image_shape: tuple[int, ...]) -> LinearOperator:
    """Return a task's operator, the same for the same shape (C, H, W). Raises `ValueError` if it has none for it."""
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(0)
    if name == "box_inpainting":
        return Inpainting.box(height, width, height // 4, width // 4, height // 2, width // 2)
    if name == "random_inpainting":
        return Inpainting.random(height, width, OBSERVED, generator)
    if name in ("super_resolution_x2", "super_resolution_x4"):
        return SuperResolution(int(name[-1]))
    if name == "deblurring":
        return Blur(gaussian_kernel(min(height, width) / 16), "reflect")
    if name == "denoising":
        return Denoising()
    if name == "compressed_sensing":
        return CompressedSensing.hadamard(0.25, 8, generator)
    if name == "colorization" and channels == 3:
        return Colorization()
    raise ValueError(f"--tasks {name} is not a task of images with {channels} channel(s).")


@dataclass
class Task:
    """Clean images (N, C, H, W) in [-1, 1], and what was measured of them with noise of `noise_std` in each entry."""

    name: str
    clean: torch.Tensor
    noise_std: float
    seed: int = 0

    def __post_init__(self):
        self.operator = make_operator(self.name, tuple(self.clean.shape[1:]))
        self.measured = self.operator.A(self.clean)
        noise = torch.randn(self.measured.shape, generator=torch.Generator().manual_seed(self.seed))
        self.measured = self.measured + self.noise_std * noise

    def linear_answers(self) -> dict[str, torch.Tensor]:
        """
        Return what linear algebra alone gives: A^+ y, and with noise also A_s y with the best damping for images of
        independent pixels around 0, sigma^2 over the mean square of the clean ones.
        """
        answers = {"A^+ y": self.operator.A_dagger(self.measured)}
        if self.noise_std > 0:
            damping = self.noise_std**2 / self.clean.square().mean().item()
            answers["A_s y"] = self.operator.A_dagger(self.measured, damping)
        return {name: images.clamp(-1, 1) for name, images in answers.items()}

    def shown(self) -> torch.Tensor:
        """Return the measurement as a picture of the image's size; one that is no picture is shown as its adjoint."""
        size = tuple(self.clean.shape[2:])
        picture = self.measured
        if picture.ndim != 4 or picture.shape[1] not in (1, self.clean.shape[1]) or self.name == "compressed_sensing":
            picture = self.operator.A_adjoint(self.measured)
        return F.interpolate(picture, size, mode="nearest").expand(-1, self.clean.shape[1], -1, -1).clamp(-1, 1)


@dataclass
class Answers:
    """
    A method's answers to all measurements of a task, in [-1, 1], each of shape (N, C, H, W).

    Args:
        single (`torch.Tensor`): The first answer to each measurement.
        mean, std (`torch.Tensor`): Mean and standard deviation of its answers.
        figures (`dict`): `residual` (||A x - y|| per entry of y, root mean square over single answers),
            `residual_of_mean`, `largest_relative_residual` (of any answer; all of float images, before they are
            clamped), `num_network_calls` per answer, and `seconds` per image for all its answers.
    """

    single: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)


def restore(
    pipeline: ECVAERestorationPipeline, task: Task, num_restorations: int, batch_size: int, seed: int, **kwargs
) -> Answers:
    """Return the pipeline's answers to all measurements; `kwargs` are the pipeline's arguments."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for y in task.measured.split(batch_size):
        output = pipeline(
            y, operator=task.operator, noise_std=task.noise_std, num_restorations=num_restorations, generator=generator,
            output_type="pt", **kwargs,
        )  # fmt: skip
        outputs.append(
            (output.images[::num_restorations], output.mean, output.std, output.residual, output.residual_mean)
        )
    single, mean, std, residual, residual_of_mean = (torch.cat(part).cpu() for part in zip(*outputs))
    norm = task.measured.flatten(1).norm(dim=1)
    squares = [(one * norm).square().sum().item() for one in (residual[::num_restorations], residual_of_mean)]
    figures = {
        "residual": (squares[0] / task.measured.numel()) ** 0.5,
        "residual_of_mean": (squares[1] / task.measured.numel()) ** 0.5,
        "largest_relative_residual": residual.max().item(),
        "num_network_calls": output.num_network_calls,
        "seconds": (time.perf_counter() - started) / len(task.clean),
    }
    return Answers(single * 2 - 1, mean * 2 - 1, 2 * std, figures)


def measures(task: Task, answers: Answers, metrics: GenerationMetrics | None) -> dict[str, float | None]:
    """
    Return PSNR (dB, infinite for an answer without any error) of the mean and of single answers, SSIM of the mean, the
    distances between single answers and the clean images, which `metrics` has seen as real (`None` without `metrics`),
    the figures of `answers`, and their coverage.
    """
    of_mean, of_single = (
        reconstruction_metrics((images + 1) / 2, (task.clean + 1) / 2) for images in (answers.mean, answers.single)
    )
    distances: dict[str, float | None] = dict.fromkeys(DISTANCES)
    if metrics is not None:
        for images in to_uint8(answers.single).split(250):
            metrics.update(images, real=False)
        distances = metrics.compute()
        metrics.reset(keep_real=True)
    found = {
        "psnr": of_mean["psnr"].mean().item(),
        "psnr_single": of_single["psnr"].mean().item(),
        "ssim": of_mean["ssim"].mean().item(),
        **{name: distances[name] for name in DISTANCES},
        **answers.figures,
    }
    if answers.std is not None and unknown_pixels(task).any():
        found["coverage"] = coverage(task, answers, (2.0,))[0]
    return found


def unknown_pixels(task: Task) -> torch.Tensor:
    """Return which pixels (C, H, W) vary over the clean images and are left open by the measurement."""
    varied = task.clean.std(dim=0, correction=0) > LEAST_VARIED
    signs = torch.randint(2, (64, *task.clean.shape[1:]), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    # The diagonal of I - A^+ A: 1 where nothing was measured, 0 where all was.
    left_open = (signs * (signs - task.operator.A_dagger(task.operator.A(signs)))).mean(0)
    unknown = varied & (left_open > LEFT_OPEN)
    # Where all pixels were measured, with noise, it is the noise that leaves them open.
    return unknown if task.noise_std == 0 or unknown.any() else varied


def coverage(task: Task, answers: Answers, factors: tuple[float, ...]) -> list[float]:
    """Return the share of unknown pixels (at least one) whose true error lies within `factors` standard deviations."""
    assert answers.std is not None
    unknown = unknown_pixels(task)
    error, std = (answers.mean - task.clean).abs()[:, unknown], answers.std[:, unknown]
    return [(error <= factor * std).float().mean().item() for factor in factors]


def classical(task: Task) -> tuple[str, Answers] | None:
    """
    Return the name and the answers of scikit-image's method for a task, `None` if it has none. TV's weight and
    Wiener's balance are chosen for the highest PSNR on these very images.
    """
    import numpy as np
    from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic, wiener
    from skimage.transform import resize

    def each(images: torch.Tensor, function: Callable) -> torch.Tensor:
        arrays = images.permute(0, 2, 3, 1).double().numpy()
        restored = np.stack([function(array) for array in arrays])
        return torch.from_numpy(restored).permute(0, 3, 1, 2).float().clamp(-1, 1)

    def best(candidates: list[torch.Tensor]) -> torch.Tensor:
        return min(candidates, key=lambda images: (images - task.clean).square().flatten(1).mean(1).log().mean())

    def denoised(images: torch.Tensor) -> torch.Tensor:
        if task.noise_std == 0:
            return images
        weights = (0.01, 0.02, 0.05, 0.1, 0.2)
        smoothed = [each(images, lambda a: denoise_tv_chambolle(a, weight=w, channel_axis=-1)) for w in weights]
        return best([images, *smoothed])

    if task.name.endswith("inpainting"):
        missing = (~task.operator.mask).expand(task.clean.shape[2:]).numpy()
        name, images = "biharmonic", each(task.measured, lambda a: inpaint_biharmonic(a, missing, channel_axis=-1))
    elif task.name.startswith("super_resolution"):
        size = tuple(task.clean.shape[2:])
        name, images = "bicubic", each(task.measured, lambda a: resize(a, size, order=3, mode="edge"))
    elif task.name == "deblurring":
        psf, gray = task.operator.kernel.numpy(), task.measured.flatten(0, 1)[:, None]
        found = [each(gray, lambda a: wiener(a[..., 0], psf, 10.0**b, clip=False)[..., None]) for b in range(-6, 0)]
        return "Wiener", as_answers(best([images.view_as(task.clean) for images in found]))
    elif task.name == "denoising":
        name, images = "", task.measured.clamp(-1, 1)
    else:
        return None
    if task.noise_std == 0:
        return (name, as_answers(images)) if name else None
    return " + ".join(part for part in (name, "TV") if part), as_answers(denoised(images))


def as_answers(images: torch.Tensor) -> Answers:
    return Answers(single=images, mean=images)
