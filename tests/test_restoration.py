# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The mathematics of restoration: gradients, curvature, draws, tiles, and the sampler where the answer is known."""

import math

import pytest
import torch

from ecvae_diffusers.model_error import colored
from ecvae_diffusers.operators import (
    Blur,
    Compose,
    FunctionOperator,
    Inpainting,
    Stack,
    SuperResolution,
    gaussian_kernel,
)
from ecvae_diffusers.restoration import LEAST_SEEN, Canvas, Likelihood, neural_transport


SHAPE = (1, 8, 8)
VARIANCE, NOISE = 0.02, 0.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MASK, POOLING = Inpainting.random(8, 8, 0.5, seeded()), SuperResolution(2)
OPERATORS = {
    "mask": MASK,
    "pooling": POOLING,
    "blur": Blur(gaussian_kernel(0.7), "reflect"),
    "mask after pooling": Compose([Inpainting.random(4, 4, 0.6, seeded()), POOLING]),
    "stack": Stack([SuperResolution(4), MASK], SHAPE),
}


@pytest.fixture(params=OPERATORS.values(), ids=OPERATORS)
def operator(request):
    return request.param


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=seeded(seed), dtype=torch.float64)


def dense(operator) -> torch.Tensor:
    """The operator's matrix."""
    pixels = torch.eye(64, dtype=torch.float64).view(64, *SHAPE)
    return operator.A(pixels).flatten(1).mT


def covariance(operator, noise_std: float) -> torch.Tensor:
    """Of y given z: v A A^T + sigma^2 I."""
    matrix = dense(operator)
    return VARIANCE * matrix @ matrix.mT + noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)


def test_gradient_is_that_of_the_log_likelihood(operator):
    """And the projection is the derivative of the restored image."""
    likelihood, x = Likelihood(operator, operator.A(images(2)), NOISE, VARIANCE), images(2, seed=2).requires_grad_()
    y = likelihood.y.flatten(1)
    density = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance(operator, NOISE))
    (expected,) = torch.autograd.grad(-density.log_prob(y - operator.A(x).flatten(1)).sum(), x)
    torch.testing.assert_close(likelihood.gradient(x.detach()), expected, rtol=1e-6, atol=1e-6)
    direction = images(2, seed=4)
    moved = likelihood.mean(x + direction) - likelihood.mean(x)
    torch.testing.assert_close(likelihood.project(direction), moved, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("noise_std", [NOISE, 0.0])
def test_curvature_probes_have_the_curvature_for_covariance(operator, noise_std):
    likelihood, matrix = Likelihood(operator, operator.A(images(1)), noise_std, VARIANCE), dense(operator)
    # Without noise A A^T may be singular: what is never measured, such as a missing pixel's row, has no say.
    expected = matrix.mT @ torch.linalg.pinv(covariance(operator, noise_std), rtol=1e-8) @ matrix
    draws = likelihood.curvature_probe(torch.zeros(8_000, *SHAPE, dtype=torch.float64), seeded()).flatten(1)
    error = (draws.mT @ draws / len(draws) - expected).norm() / expected.norm()
    assert error < 0.1


def test_draws_have_the_conditional_mean_and_covariance(operator):
    """Of x given z and y in the range of A; what is measured less well than noise is left as the decoder has it."""
    count = 8_000
    y, x = operator.A(images(1)), images(1, seed=3).expand(count, *SHAPE)
    likelihood = Likelihood(operator, y.expand(count, *y.shape[1:]), NOISE, VARIANCE)
    draws = likelihood.sample(x, seeded()).flatten(1)
    matrix, identity = dense(operator), torch.eye(64, dtype=torch.float64)
    gain = VARIANCE * matrix.mT @ torch.linalg.inv(covariance(operator, NOISE))
    mean = x[0].flatten() + gain @ (y.flatten() - matrix @ x[0].flatten())
    torch.testing.assert_close(likelihood.mean(x)[0].flatten(), mean)
    least = LEAST_SEEN * likelihood.damping * torch.eye(len(matrix), dtype=torch.float64)
    seen = matrix.mT @ torch.linalg.inv(matrix @ matrix.mT + least) @ matrix
    left, noise = identity - gain @ matrix, NOISE * gain
    expected = VARIANCE * left @ seen @ seen.mT @ left.mT + noise @ noise.mT
    assert (draws.mean(0) - mean).norm() < 5 * expected.trace().sqrt() / math.sqrt(count)
    found = (draws - mean).mT @ (draws - mean) / count
    assert (found - expected).norm() < 0.1 * expected.norm()
    # Each pixel's variance, with that of the null space; exact where I - A_s A is diagonal.
    variance = Likelihood(operator, y, NOISE, VARIANCE).variance(x[:1]).flatten()
    error, exact = variance - (VARIANCE * left).diagonal(), isinstance(operator, Inpainting)
    assert error.abs().max() < (1e-12 if exact else 0.5 * VARIANCE)
    assert error.mean().abs() < (1e-12 if exact else 0.1 * VARIANCE)


def test_the_variance_knows_the_spectrum_of_the_model_s_error(operator):
    """It is that of the error of x^, for images whose distance from the decoder's is drawn of that spectrum."""
    count, spectrum = 8_000, [8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.1]
    clean = images(1, seed=3).expand(count, *SHAPE)
    white = torch.randn(count, *SHAPE, generator=seeded(), dtype=torch.float64)
    decoded, y = clean + math.sqrt(VARIANCE) * colored(white, spectrum), operator.A(clean)
    y = y + NOISE * torch.randn(y.shape, generator=seeded(1), dtype=torch.float64)
    error = (Likelihood(operator, y, NOISE, VARIANCE).mean(decoded) - clean).square().mean(0)
    variance, of_white = (
        Likelihood(operator, y[:1], NOISE, VARIANCE, 1, one).variance(clean[:1])[0] for one in (spectrum, None)
    )
    assert variance.mean().item() == pytest.approx(error.mean().item(), rel=0.1)
    assert (variance - error).abs().max() < 0.6 * VARIANCE
    # Smooth errors are largely seen by an operator that averages, so that less of them is left open.
    if isinstance(operator, SuperResolution):
        assert variance.mean() < 0.9 * of_white.mean()


def test_without_noise_the_null_space_is_the_decoder_s(operator):
    likelihood, decoded = Likelihood(operator, operator.A(images(2)), 0.0, VARIANCE, 3), images(6, seed=5)
    rest = likelihood.mean(decoded) - decoded
    null = rest - likelihood.A_dagger(likelihood.A(rest))
    assert null.norm() < 1e-5 * rest.norm()


def test_operator_is_called_with_the_callers_batch():
    sizes = []

    def A(x):
        sizes.append(len(x))
        return x * torch.arange(1, 4).view(3, 1, 1, 1)

    likelihood = Likelihood(FunctionOperator(A, A), A(images(3)), NOISE, VARIANCE, num_answers=5)
    sizes.clear()
    x = images(15, seed=2)
    gradient = likelihood.gradient(x)
    assert gradient.shape == x.shape and set(sizes) == {3}
    # Measurement-major: answers 5 to 9 are the second measurement's, and so A doubles them.
    torch.testing.assert_close(likelihood.A(x), x * torch.arange(1, 4).repeat_interleave(5).view(-1, 1, 1, 1))


@pytest.mark.parametrize("tile_width", [8, 13])
@pytest.mark.parametrize("height, width, overlap", [(8, 13, 2), (16, 13, 0), (20, 13, 3), (9, 30, 4), (24, 24, 7)])
def test_canvas(height, width, overlap, tile_width):
    canvas = Canvas(height, width, 8 if tile_width == 8 else (8, tile_width), overlap)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=seeded())
    tiles = torch.randn(2 * len(canvas), 3, 8, tile_width, dtype=torch.float64, generator=seeded(1))
    torch.testing.assert_close(canvas.join(canvas.split(x)), x, rtol=1e-6, atol=1e-6)
    inner = [(canvas.join(tiles) * x).sum(), (tiles * canvas.join_adjoint(x)).sum()]
    torch.testing.assert_close(*inner, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((canvas.split_adjoint(tiles) * x).sum(), (tiles * canvas.split(x)).sum())
    for starts, side, of_tile in zip(map(set, zip(*canvas.corners)), (height, width), (8, tile_width)):
        starts = sorted(starts)
        assert starts[0] == 0 and starts[-1] == side - of_tile
        assert all(of_tile - (b - a) >= overlap for a, b in zip(starts, starts[1:]))
    if (height, width) == (8, tile_width):
        assert len(canvas) == 1 and torch.equal(canvas.weights, torch.ones(1, 1, 8, tile_width))


def test_drift_of_tiles_is_a_gradient():
    """What the sampler follows where tiles overlap is the derivative of U by the tiles, all terms together."""
    canvas, variance = Canvas(13, 8, 8, 3), 0.1
    operator = Inpainting.random(13, 8, 0.5, seeded())
    y = operator.A(torch.randn(1, 1, 13, 8, dtype=torch.float64, generator=seeded()))
    likelihood = Likelihood(operator, y, NOISE, variance)
    weight, points = 0.7, torch.randn(8, 8, dtype=torch.float64, generator=seeded(3))

    def energy(tiles):
        return (tiles * points).sin().flatten(1).sum(1)

    def negative_log_density(tiles):
        x = canvas.join(tiles)
        misfit = likelihood.misfit(x)
        # A pixel that was seen has variance v + sigma^2; one that was not, no misfit.
        fit = 0.5 * misfit.square().sum() / (variance + NOISE**2)
        apart = 0.5 * (canvas.weigh(tiles - canvas.split(x)) * (tiles - canvas.split(x))).sum() / variance
        return fit + apart + weight * energy(canvas.split(likelihood.mean(x))).sum()

    def energy_gradient(tiles):
        return points * (tiles * points).cos()

    tiles = torch.randn(len(canvas), 1, 8, 8, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    (expected,) = torch.autograd.grad(negative_log_density(tiles), tiles)
    # Adam's first step has the gradient's sign only, so the gradient is taken where the decoder, here none, is asked for it.
    found = []

    def decode(latents):
        tiles = latents.clone()
        tiles.register_hook(found.append)
        return tiles

    neural_transport(decode, likelihood, canvas, tiles.detach(), 1, "map", energy_gradient, weight)
    torch.testing.assert_close(found[0], expected)


# A decoder W z + c, of which everything is known.
WEIGHT = torch.randn(64, 4, generator=seeded(7), dtype=torch.float64) / 2
BIAS = torch.randn(64, generator=seeded(8), dtype=torch.float64)


def decode_linearly(latents: torch.Tensor) -> torch.Tensor:
    return (latents.flatten(1) @ WEIGHT.mT + BIAS).view(-1, *SHAPE)


def transported(operator, method: str, num_steps: int, count: int) -> tuple[torch.Tensor, ...]:
    """Return latents of `neural_transport`, and mean and covariance of the posterior."""
    y = operator.A(decode_linearly(torch.randn(1, 4, generator=seeded(9), dtype=torch.float64)))
    likelihood = Likelihood(operator, y.expand(count, *y.shape[1:]), NOISE, VARIANCE)
    start = torch.randn(count, 4, 1, 1, generator=seeded(10), dtype=torch.float64)
    canvas = Canvas(8, 8, 8, 0)
    found = neural_transport(decode_linearly, likelihood, canvas, start, num_steps, method, generator=seeded(11))
    matrix = dense(operator) @ WEIGHT
    gain = matrix.mT @ torch.linalg.inv(covariance(operator, NOISE))
    precision = gain @ matrix + torch.eye(4, dtype=torch.float64)
    mean = torch.linalg.solve(precision, gain @ (y.flatten() - dense(operator) @ BIAS))
    return found.flatten(1), mean, torch.linalg.inv(precision)


def test_map_finds_the_lowest_point(operator):
    found, mean, _ = transported(operator, "map", 300, 3)
    torch.testing.assert_close(found, mean.expand_as(found), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("operator", [POOLING, Inpainting(torch.zeros(8, 8))], ids=["pooling", "nothing: the prior"])
def test_langevin_draws_from_the_posterior(operator):
    """Where it is Gaussian: its mean and its spread, up to what four probes of the curvature and a finite step leave."""
    found, mean, expected = transported(operator, "langevin", 200, 1000)
    assert (found.mean(0) - mean).abs().max() < 0.1 * expected.diagonal().sqrt().max()
    ratio = found.var(0) / expected.diagonal()
    assert 0.9 < ratio.min() and ratio.max() < 1.35
