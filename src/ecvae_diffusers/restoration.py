# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Zero-shot restoration of images from a measurement y = A x + n, n ~ N(0, sigma^2 I), with the decoder G as the prior.

Given its latents, an image is :math:`x \sim N(G(z), v I)`, where v is the mean squared reconstruction error per pixel. Hence

.. math:: y \mid z \sim N(A G(z),\; v A A^T + \sigma^2 I).

**Neural transport** samples latents instead of pixels from :math:`e^{-U}` with

.. math:: U(z) = \tfrac12 r^T (v A A^T + \sigma^2 I)^{-1} r + w f(\hat x(z)) + \tfrac12 \|z\|^2, \qquad r = y - A G(z).

With :math:`A_s = A^T (A A^T + s I)^{-1}`, s = sigma^2 / v, the gradient of the first term with respect to G is
:math:`-A_s r / v`. For every operator, it takes one application of A and one of its damped inverse.

An image x larger than the model's size is the mean of overlapping tiles G(z_i), weighted by :math:`\omega_i`. Then f is summed
over tiles. With x_i the part of x under tile i, U has the further term
:math:`\tfrac1{2v} \sum_i \|\sqrt{\omega_i} (G(z_i) - x_i)\|^2`.

**Range and null space**: given the latents and y, the mean of x is :math:`\hat x = G + A_s r`. Without noise, it is
:math:`A^+ y + (I - A^+ A) G`, which agrees with y up to rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from .checks import height_and_width
from .model_error import colored
from .operators.linear_operator import LinearOperator


Generators = torch.Generator | list[torch.Generator] | None

# Relative residual that a restoration without noise must reach, and the dampings, relative to A, that are tried until it does.
ENOUGH_RESIDUAL = 1e-6
CUTOFF_LEVELS = (1e-4, 1e-5, 1e-6, 1e-7)
# Share of the Langevin method's steps that first descend towards likely latents, by Adam.
DESCENT_SHARE = 0.4
DESCENT_RATE, DESCENT_BETAS = 0.4, (0.8, 0.9)
# Number of decoder passes that estimate the curvature of U; at most a fifth of all passes.
NUM_CURVATURE_PROBES = 6
# First and last Langevin step, in units of the inverse curvature: long steps explore, short ones are accurate.
FIRST_LANGEVIN_STEP, LAST_LANGEVIN_STEP = 0.6, 0.1
# The curvature is taken to be at least the running mean of squared gradients, with this decay, divided by this limit.
SQUARE_LIMIT, SQUARE_DECAY = 4.0, 0.9
# Number of draws that estimate the variance of pixels. They call only the operator.
NUM_VARIANCE_PROBES = 64
# A draw leaves out the decoder's error in directions whose squared singular value is below this share of the damping.
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
    """
    A division of images into tiles of the model's size. Neighbouring tiles share at least `overlap` pixels. `tile_size` is one number
    for squares, or (height, width).
    """

    def __init__(self, height: int, width: int, tile_size: int | Sequence[int], overlap: int):
        self.height, self.width, self.tile_shape = height, width, height_and_width(tile_size)
        sides = zip((height, width), self.tile_shape)
        tops, lefts = (self.starts(size, of_tile, overlap) for size, of_tile in sides)
        self.corners = [(top, left) for top in tops for left in lefts]
        # A tile has less weight near its border.
        ramps = [torch.arange(of_tile) + 0.5 for of_tile in self.tile_shape]
        ramps = [ramp.minimum(ramp.flip(0)).clamp(max=max(overlap, 1)) for ramp in ramps]
        weight = torch.outer(*ramps).expand(len(self.corners), 1, -1, -1)
        self.weights = weight / self.split(self.split_adjoint(weight))

    @staticmethod
    def starts(size: int, tile_size: int, overlap: int) -> list[int]:
        """Return the first pixel of each tile along one side, evenly spread."""
        count = 1 + math.ceil((size - tile_size) / max(1, tile_size - overlap))
        return [round(i * (size - tile_size) / max(1, count - 1)) for i in range(count)]

    def __len__(self) -> int:
        return len(self.corners)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Cut images (N, C, H, W) into tiles (N * T, C, h, w)."""
        height, width = self.tile_shape
        tiles = [x[..., top : top + height, left : left + width] for top, left in self.corners]
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def split_adjoint(self, tiles: torch.Tensor) -> torch.Tensor:
        """Apply the adjoint of `split`: sum tiles where they overlap."""
        (height, width), tiles = self.tile_shape, tiles.unflatten(0, (-1, len(self)))
        x = tiles.new_zeros(tiles.shape[0], tiles.shape[2], self.height, self.width)
        for index, (top, left) in enumerate(self.corners):
            x[..., top : top + height, left : left + width] += tiles[:, index]
        return x

    def join(self, tiles: torch.Tensor) -> torch.Tensor:
        """Join tiles (N * T, C, h, w) to images (N, C, H, W): their weighted mean where they overlap."""
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
    z <- z - t / h grad U + sqrt((2 t - t^2) / h) n, with standard normal n and a step size t that falls from 0.6 to 0.1. `"map"`
    only descends, with a rate that falls to 0 along a cosine.

    Args:
        decode (`Callable`): The differentiable decoder G, from latents (N, ...) to tiles (N, C, h, w) in float32.
        likelihood ([`Likelihood`]), canvas ([`Canvas`]): The measurements, and the division of their images into tiles.
        latents (`torch.Tensor` of shape `(B * M * T, ...)`): Initial latents of B measurements, M answers and T tiles.
        num_steps (`int`): Total number of decoder passes.
        method (`str`, *optional*, defaults to `"langevin"`): `"langevin"` draws from e^{-U}, `"map"` finds a minimum.
        energy_gradient (`Callable`, *optional*): The gradient of f with respect to tiles, in their shape.
        energy_weight (`float`, *optional*, defaults to 1.0): w.
        generator (`torch.Generator` or a list of them, *optional*): Draws the noise, as for `draw`.
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
