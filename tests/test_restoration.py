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
from ecvae_diffusers.restoration import LEAST_SEEN, Canvas, Likelihood, draw, neural_transport


SHAPE = (1, 8, 8)
VARIANCE, NOISE = 0.02, 0.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operators() -> dict:
    mask = Inpainting.random(8, 8, 0.5, seeded())
    return {
        "mask": mask,
        "pooling": SuperResolution(2),
        "blur": Blur(gaussian_kernel(0.7), "reflect"),
        "mask after pooling": Compose([Inpainting.random(4, 4, 0.6, seeded()), SuperResolution(2)]),
        "stack": Stack([SuperResolution(4), mask], SHAPE),
    }


@pytest.fixture(params=operators(), name="operator")
def _operator(request):
    return operators()[request.param]


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=seeded(seed), dtype=torch.float64)


def likelihood_of(operator, noise_std: float = NOISE, num_answers: int = 1, count: int = 2) -> Likelihood:
    return Likelihood(operator, operator.A(images(count)), noise_std, VARIANCE, num_answers)


def dense(operator) -> torch.Tensor:
    """The operator's matrix."""
    pixels = torch.eye(64, dtype=torch.float64).view(64, *SHAPE)
    return operator.A(pixels).flatten(1).mT


def covariance(operator, noise_std: float) -> torch.Tensor:
    """Of y given z: v A A^T + sigma^2 I."""
    matrix = dense(operator)
    return VARIANCE * matrix @ matrix.mT + noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)


def test_gradient_is_that_of_the_log_likelihood(operator):
    likelihood, x = likelihood_of(operator), images(2, seed=2).requires_grad_()
    y = likelihood.y.flatten(1)
    density = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance(operator, NOISE))
    (expected,) = torch.autograd.grad(-density.log_prob(y - operator.A(x).flatten(1)).sum(), x)
    torch.testing.assert_close(likelihood.gradient(x.detach()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise_std", [NOISE, 0.0])
def test_curvature_probes_have_the_curvature_for_covariance(operator, noise_std):
    likelihood = likelihood_of(operator, noise_std, count=1)
    matrix = dense(operator)
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
    if isinstance(operator, Inpainting):  # it has a say in no pixel's own variance
        torch.testing.assert_close(variance, of_white)
    # Smooth errors are largely seen by an operator that averages, so that less of them is left open.
    if isinstance(operator, SuperResolution):
        assert variance.mean() < 0.9 * of_white.mean()


def test_projection_is_the_derivative_of_the_restored_image(operator):
    likelihood, x = likelihood_of(operator), images(2, seed=2)
    direction = images(2, seed=4)
    moved = (likelihood.mean(x + direction) - likelihood.mean(x)).flatten(1)
    torch.testing.assert_close(likelihood.project(direction).flatten(1), moved, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_noise_the_restored_image_agrees_with_the_measurement(operator, dtype):
    y = operator.A(images(2).to(dtype))
    likelihood = Likelihood(operator, y, 0.0, VARIANCE, 3)
    restored = likelihood.mean(images(6, seed=5).to(dtype))
    assert likelihood.relative_residual(restored).max() < 1e-6
    # In the null space it is the decoder's image.
    rest = restored - images(6, seed=5).to(dtype)
    null = rest - likelihood.A_dagger(likelihood.A(rest))
    assert null.norm() < 1e-5 * rest.norm()


def test_what_a_cutoff_leaves_out_is_restored():
    """A wide blur's A^+ leaves out half of the spectrum; the certificate does not. Where nothing is measured it is 0."""
    blur = Blur(gaussian_kernel(1.5), "reflect", rcond=1e-2)
    x = torch.randn(2, 1, 16, 16, generator=seeded())
    likelihood = Likelihood(blur, blur.A(x), 0.0, VARIANCE)
    assert likelihood.relative_residual(blur.A_dagger(likelihood.y)).max() > 1e-4
    assert likelihood.relative_residual(likelihood.mean(x.flip(0))).max() < 1e-6
    nothing = Likelihood(Inpainting(torch.zeros(16, 16)), torch.zeros(2, 1, 16, 16), 0.0, VARIANCE)
    assert torch.equal(nothing.relative_residual(x), torch.zeros(2))


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


# Tiles


@pytest.mark.parametrize("height, width, overlap", [(8, 8, 2), (16, 8, 0), (20, 13, 3), (9, 30, 4), (24, 24, 7)])
def test_canvas(height, width, overlap):
    canvas = Canvas(height, width, 8, overlap)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=seeded())
    tiles = torch.randn(2 * len(canvas), 3, 8, 8, dtype=torch.float64, generator=seeded(1))
    torch.testing.assert_close(canvas.join(canvas.split(x)), x, rtol=1e-6, atol=1e-6)
    inner = [(canvas.join(tiles) * x).sum(), (tiles * canvas.join_adjoint(x)).sum()]
    torch.testing.assert_close(*inner, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((canvas.split_adjoint(tiles) * x).sum(), (tiles * canvas.split(x)).sum())
    tops = sorted({top for top, _ in canvas.corners})
    assert tops[0] == 0 and tops[-1] == height - 8
    assert all(8 - (b - a) >= overlap for a, b in zip(tops, tops[1:]))
    if (height, width) == (8, 8):
        assert len(canvas) == 1 and torch.equal(canvas.weights, torch.ones(1, 1, 8, 8))


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
        fit = 0.5 * (operator.A_dagger(misfit, likelihood.damping) * operator.A_adjoint(misfit)).sum() / variance
        # A pixel that was seen has variance v + sigma^2; one that was not, no misfit.
        torch.testing.assert_close(fit, 0.5 * misfit.square().sum() / (variance + NOISE**2))
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


# The sampler


class LinearDecoder:
    """G(z) = W z + c, of which everything is known."""

    def __init__(self, num_latents: int = 4):
        self.weight = torch.randn(64, num_latents, generator=seeded(7), dtype=torch.float64) / 2
        self.bias = torch.randn(64, generator=seeded(8), dtype=torch.float64)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents.flatten(1) @ self.weight.mT + self.bias).view(-1, *SHAPE)

    def posterior(self, operator, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = dense(operator) @ self.weight
        gain = matrix.mT @ torch.linalg.inv(covariance(operator, NOISE))
        precision = gain @ matrix + torch.eye(matrix.shape[1], dtype=torch.float64)
        misfit = y.flatten() - dense(operator) @ self.bias
        return torch.linalg.solve(precision, gain @ misfit), torch.linalg.inv(precision)


def transported(
    operator, method: str, num_steps: int, count: int, num_latents: int = 4, **kwargs
) -> tuple[torch.Tensor, ...]:
    decoder = LinearDecoder(num_latents)
    y = operator.A(decoder(torch.randn(1, num_latents, generator=seeded(9), dtype=torch.float64)))
    likelihood = Likelihood(operator, y.expand(count, *y.shape[1:]), NOISE, VARIANCE)
    start = torch.randn(count, num_latents, 1, 1, generator=seeded(10), dtype=torch.float64)
    canvas = Canvas(8, 8, 8, 0)
    found = neural_transport(decoder, likelihood, canvas, start, num_steps, method, generator=seeded(11), **kwargs)
    return found.flatten(1), *decoder.posterior(operator, y)


def test_map_finds_the_lowest_point(operator):
    found, mean, _ = transported(operator, "map", 300, 3)
    torch.testing.assert_close(found, mean.expand_as(found), rtol=0.02, atol=0.02)


def test_langevin_draws_from_the_posterior():
    """Where it is Gaussian: its mean and its spread, up to what four probes of the curvature and a finite step leave."""
    found, mean, expected = transported(operators()["pooling"], "langevin", 200, 1000)
    assert (found.mean(0) - mean).abs().max() < 0.1 * expected.diagonal().sqrt().max()
    ratio = found.var(0) / expected.diagonal()
    assert 0.9 < ratio.min() and ratio.max() < 1.35


def test_nothing_measured_gives_the_prior():
    found, mean, expected = transported(Inpainting(torch.zeros(8, 8)), "langevin", 100, 2000)
    assert mean.norm() == 0
    assert found.mean(0).abs().max() < 0.1 and (found.var(0) - 1).abs().max() < 0.15


def test_energy_pulls_answers():
    """With f(x) = mean (x - 2)^2 and a large weight the free half comes nearer to 2; the measured half can't."""
    half, distances = Inpainting.box(8, 8, 0, 0, 8, 4), []
    for weight in (0.0, 2000.0):
        kwargs = {"energy_gradient": lambda x: 2 * (x - 2) / 64, "energy_weight": weight}
        found, *_ = transported(half, "map", 200, 1, num_latents=32, **kwargs)
        distances.append((LinearDecoder(32)(found) - 2)[..., :4].square().mean())
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("method", ["langevin", "map"])
def test_number_of_decoder_passes(method, num_steps):
    steps, passes, decoder = [], [], LinearDecoder()

    def decode(latents):
        passes.append(len(latents))
        return decoder(latents)

    def on_step(step, latents):
        steps.append(step)
        return latents

    likelihood, start = likelihood_of(SuperResolution(2), num_answers=3), torch.zeros(6, 4, 1, 1, dtype=torch.float64)
    neural_transport(
        decode, likelihood, Canvas(8, 8, 8, 0), start, num_steps, method, generator=seeded(), on_step=on_step
    )
    assert passes == [6] * num_steps and steps == list(range(num_steps))


def test_a_list_of_generators_draws_each_answer_by_itself():
    like = torch.zeros(1)
    both = draw((4, 3), [seeded(1), seeded(2)], like)
    assert torch.equal(both, torch.cat([draw((2, 3), seeded(seed), like) for seed in (1, 2)]))
