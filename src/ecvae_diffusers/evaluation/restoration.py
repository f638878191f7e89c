# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Defines restoration tasks and measures answers to them: PSNR, SSIM, feature distance, residual and uncertainty."""

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
# Coverage leaves out pixels with a smaller standard deviation over the clean images, such as those of an empty border.
LEAST_VARIED = 0.05
# A pixel is unknown if the measurement leaves open more than this share of its variance.
LEFT_OPEN = 0.01


def make_operator(name: str, image_shape: tuple[int, ...]) -> LinearOperator:
    """Return a task's operator for images of shape (C, H, W), the same on each call. Raises `ValueError` if none fits."""
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
    raise ValueError(f"--tasks {name} does not exist for images with {channels} channel(s).")


@dataclass
class Task:
    """Clean images (N, C, H, W) in [-1, 1] and their measurements, with Gaussian noise of standard deviation `noise_std`."""

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
        Return the answers that need no model: A^+ y, and with noise also A_s y. Its damping s is sigma^2 over the mean
        square of the clean images, the best choice for independent pixels with mean 0.
        """
        answers = {"A^+ y": self.operator.A_dagger(self.measured)}
        if self.noise_std > 0:
            damping = self.noise_std**2 / self.clean.square().mean().item()
            answers["A_s y"] = self.operator.A_dagger(self.measured, damping)
        return {name: images.clamp(-1, 1) for name, images in answers.items()}

    def shown(self) -> torch.Tensor:
        """Return the measurements as images (N, C, H, W). One that is not a picture is shown as A^T y."""
        size = tuple(self.clean.shape[2:])
        picture = self.measured
        if picture.ndim != 4 or picture.shape[1] not in (1, self.clean.shape[1]) or self.name == "compressed_sensing":
            picture = self.operator.A_adjoint(self.measured)
        return F.interpolate(picture, size, mode="nearest").expand(-1, self.clean.shape[1], -1, -1).clamp(-1, 1)


@dataclass
class Answers:
    """
    A method's answers to all measurements of a task, as images (N, C, H, W) in [-1, 1].

    Args:
        single (`torch.Tensor`): The first answer to each measurement.
        mean, std (`torch.Tensor`): Mean and standard deviation over the answers to each measurement.
        figures (`dict`): `residual` and `residual_of_mean` (root mean square of A x - y per entry of y, of single
            answers and of the mean), `largest_relative_residual` over all answers, `num_network_calls` per answer, and
            `seconds` per image for all its answers. Residuals are of float images, before they are clamped.
    """

    single: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)


def restore(
    pipeline: ECVAERestorationPipeline, task: Task, num_restorations: int, batch_size: int, seed: int, **kwargs
) -> Answers:
    """Return the pipeline's answers to all measurements of a task. `kwargs` are passed to the pipeline."""
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
    Return the measures of answers: PSNR in dB of the mean and of single answers (infinite without any error), SSIM of the
    mean, distances between single answers and the clean images, `answers.figures`, and the coverage of the uncertainty.
    `metrics` must have seen the clean images as real; without it the distances are `None`.
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
    """Return a mask (C, H, W) of the pixels that vary over the clean images and that the measurement leaves open."""
    varied = task.clean.std(dim=0, correction=0) > LEAST_VARIED
    signs = torch.randint(2, (64, *task.clean.shape[1:]), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    # An estimate of the diagonal of I - A^+ A: 1 where nothing is known of a pixel, 0 where its value is known.
    left_open = (signs * (signs - task.operator.A_dagger(task.operator.A(signs)))).mean(0)
    unknown = varied & (left_open > LEFT_OPEN)
    # If every pixel was measured, the noise leaves it open.
    return unknown if task.noise_std == 0 or unknown.any() else varied


def coverage(task: Task, answers: Answers, factors: tuple[float, ...]) -> list[float]:
    """Return, per factor, the share of unknown pixels whose error is at most `factor` times its standard deviation."""
    assert answers.std is not None
    unknown = unknown_pixels(task)
    error, std = (answers.mean - task.clean).abs()[:, unknown], answers.std[:, unknown]
    return [(error <= factor * std).float().mean().item() for factor in factors]


def classical(task: Task) -> tuple[str, Answers] | None:
    """
    Return the name and the answers of scikit-image's method for a task, or `None` if it has none. The weight of TV and
    the balance of Wiener are those with the highest PSNR on these images.
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
