"""The identities of test_operators.py for operators that hypothesis makes up: shapes, masks, scales, kernels, borders."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecvae_diffusers.operators import (
    Blur,
    Colorization,
    Compose,
    CompressedSensing,
    Denoising,
    Inpainting,
    LinearOperator,
    Stack,
    SuperResolution,
    gaussian_kernel,
    motion_kernel,
    uniform_kernel,
)


sizes = st.integers(1, 4).map(lambda n: 4 * n)
shapes = st.tuples(st.integers(1, 3), sizes, sizes)
seeds = st.integers(0, 2**32 - 1)
# Blurs whose inverse is in no need of its cutoff, for combinations: their pseudo-inverse is solved for without one.
MILD_STD = 0.55


def tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def kernels(draw, largest: int) -> torch.Tensor:
    kind = draw(st.sampled_from(("user's", "gaussian", "anisotropic", "uniform", "motion")))
    if kind == "gaussian":
        return gaussian_kernel(draw(st.floats(0.3, 2.0)), size=3)
    if kind == "anisotropic":
        return gaussian_kernel((draw(st.floats(0.3, 2)), draw(st.floats(0.3, 2))), draw(st.floats(0, 180)), size=3)
    if kind == "uniform":
        return uniform_kernel(draw(st.integers(1, min(largest, 4))))
    if kind == "motion":
        return motion_kernel(draw(st.floats(1, 2)), draw(st.floats(0, 180)))[:largest, :largest]
    return tensor((draw(st.integers(1, largest)), draw(st.integers(1, largest))), draw(seeds))


@st.composite
def simple(draw, shape: tuple[int, int, int]) -> LinearOperator:
    """An operator of one kind for images of `shape`, whose height and width 4 divides."""
    channels, height, width = shape
    kind = draw(st.sampled_from((Denoising, Inpainting, SuperResolution, Colorization, CompressedSensing)))
    if kind is Inpainting:
        mask_shape = draw(
            st.sampled_from(((height, width), (1, height, width), shape, (2, 1, height, width), (2, *shape)))
        )
        return Inpainting(tensor(mask_shape, draw(seeds)) < draw(st.floats(-3, 3)))
    if kind is SuperResolution:
        return SuperResolution(
            draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from(("average", "bicubic", "decimation")))
        )
    if kind is Colorization:
        weights = draw(st.lists(st.floats(0.1, 1), min_size=channels, max_size=channels))
        return Colorization(tuple(weights))
    if kind is CompressedSensing:
        make = draw(st.sampled_from((CompressedSensing.hadamard, CompressedSensing.orthonormal)))
        generator = torch.Generator().manual_seed(draw(seeds))
        return make(draw(st.floats(0.01, 1)), draw(st.sampled_from((1, 2, 4))), generator)
    return Denoising()


@st.composite
def combined(draw, shape: tuple[int, int, int]) -> LinearOperator:
    first = draw(simple(shape))
    if draw(st.booleans()):
        blur = Blur(gaussian_kernel(MILD_STD, size=3), draw(st.sampled_from(("circular", "reflect"))))
        return draw(st.sampled_from((Compose([first, blur]), Stack([first, blur], shape))))
    if draw(st.booleans()):
        return Stack([first, draw(simple(shape)), draw(simple(shape))], shape)
    inner = SuperResolution(draw(st.sampled_from((1, 2))), draw(st.sampled_from(("average", "bicubic", "decimation"))))
    small = inner.measurement_shape(shape)
    mask = Inpainting(tensor(small[1:], draw(seeds)) < draw(st.floats(-1, 3)))
    return Compose([mask, inner])


def check(operator: LinearOperator, shape: tuple[int, ...], seed: int, cutoff: float = 0.0) -> None:
    A, pinv = operator.A, operator.A_dagger
    x, x2 = tensor((2, *shape), seed), tensor((2, *shape), seed + 1)
    measured = tuple(operator.measurement_shape(shape))
    y, y2 = tensor((2, *measured), seed + 2), tensor((2, *measured), seed + 3)
    norm_x, norm_y = x.norm() * x2.norm(), y.norm() * y2.norm()
    size = operator.transfer(x).abs().max() if isinstance(operator, Blur) else 1.0

    def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum()

    assert A(x).shape == y.shape and operator.A_adjoint(y).shape == x.shape
    assert abs(inner(A(x), y) - inner(x, operator.A_adjoint(y))) <= 1e-10 * (1 + A(x).norm()) * y.norm()
    # A reflected border weighs pixels twice: its largest singular value is up to twice that of a circular one.
    assert (A(pinv(A(x))) - A(x)).norm() <= max(1e-6 * A(x).norm(), 2 * cutoff * size * x.norm())
    assert (pinv(A(pinv(y))) - pinv(y)).norm() <= 1e-6 * pinv(y).norm()
    assert abs(inner(A(pinv(y)), y2) - inner(y, A(pinv(y2)))) <= 1e-6 * norm_y
    assert abs(inner(pinv(A(x)), x2) - inner(x, pinv(A(x2)))) <= 1e-6 * norm_x


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), shapes, seeds)
def test_simple_operators(data, shape, seed):
    check(data.draw(simple(shape)), shape, seed)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data(), shapes, seeds, st.sampled_from(("circular", "reflect")), st.sampled_from((1e-4, 1e-3, 1e-2)))
def test_blurs(data, shape, seed, padding, rcond):
    kernel = data.draw(kernels(min(shape[1:])))
    check(Blur(kernel, padding, rcond), shape, seed, cutoff=rcond)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), shapes, seeds)
def test_combinations(data, shape, seed):
    check(data.draw(combined(shape)), shape, seed)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), shapes, seeds, st.sampled_from(("circular", "reflect")), st.sampled_from((1e-4, 1e-2)))
def test_combinations_with_a_cutoff(data, shape, seed, padding, rcond):
    """Wide blurs, whose inverse has no bound: the combination takes over their cutoff."""
    blur = Blur(data.draw(kernels(min(shape[1:]))), padding, rcond)
    pool = SuperResolution(data.draw(st.sampled_from((1, 2, 4))))
    mask = Inpainting(tensor(shape[1:], seed) < 0.5)
    kind = data.draw(st.sampled_from(("blur alone", "mask after", "pool after", "blur after", "stack")))
    operator = {
        "blur alone": lambda: Compose([blur]),
        "mask after": lambda: Compose([mask, blur]),
        "pool after": lambda: Compose([pool, blur]),
        "blur after": lambda: Compose([blur, mask]),
        "stack": lambda: Stack([blur, pool], shape),
    }[kind]()
    assert operator.rcond == rcond
    size = 1 + blur.transfer(torch.zeros(1, *shape, dtype=torch.float64)).abs().max()
    check(operator, shape, seed, cutoff=rcond * size)
