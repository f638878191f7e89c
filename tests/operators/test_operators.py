"""What makes an operator: linearity, the adjoint, the pseudo-inverse, gradients; of blurs and combinations that hypothesis makes up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_examples import BATCH, IMAGE_SHAPE, operators, seeded

from ecvae_diffusers.operators import Blur, Compose, Inpainting, LinearOperator, Stack, SuperResolution


EVERY = operators()
# Relative errors of the Moore-Penrose identities.
EXACT = {torch.float64: 1e-6, torch.float32: 1e-4}


def draws(operator: LinearOperator, dtype=torch.float64, seed: int = 0, shape=IMAGE_SHAPE) -> tuple[torch.Tensor, ...]:
    """A random image batch and a random measurement batch, not in the range of A."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *shape, generator=generator, dtype=dtype)
    return x, torch.randn(BATCH, *operator.measurement_shape(shape), generator=generator, dtype=dtype)


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each image, in float64."""
    return (a.double() * b.double()).flatten(1).sum(1)


def assert_near(a: torch.Tensor, b: torch.Tensor, error: float, scale: torch.Tensor) -> None:
    """The distance of a and b is at most `error` times the norm of `scale`."""
    assert (a - b).norm() <= error * scale.norm(), f"{(a - b).norm() / scale.norm():.1e}"


@pytest.fixture(params=EVERY.values(), ids=EVERY)
def operator(request) -> LinearOperator:
    return request.param


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_adjoint_and_shapes(operator, dtype):
    x, y = draws(operator, dtype)
    measured, back = operator.A(x), operator.A_adjoint(y)
    assert measured.shape == y.shape and back.shape == x.shape
    assert measured.dtype == back.dtype == operator.A_dagger(y).dtype == dtype
    assert torch.equal(operator(x), measured)
    error = (inner(measured, y) - inner(x, back)).abs()
    assert (error <= (1e-12 if dtype == torch.float64 else 1e-5) * x.norm() * y.norm()).all()


def check_moore_penrose(
    operator: LinearOperator, dtype: torch.dtype, shape: tuple[int, ...], largest: float, cutoff: float
):
    """What a cutoff leaves out of A x is measured by the largest singular value times x."""
    A, pinv = operator.A, operator.A_dagger
    (x, y), (x2, y2) = draws(operator, dtype, 0, shape), draws(operator, dtype, 1, shape)
    assert (A(pinv(A(x))) - A(x)).norm() <= max(EXACT[dtype] * A(x).norm(), cutoff * largest * x.norm())
    assert_near(pinv(A(pinv(y))), pinv(y), EXACT[dtype], pinv(y))
    for projection, a, b in ((lambda v: A(pinv(v)), y, y2), (lambda v: pinv(A(v)), x, x2)):
        asymmetry = (inner(projection(a), b) - inner(a, projection(b))).abs()
        assert (asymmetry <= EXACT[dtype] * a.norm() * b.norm()).all()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_moore_penrose(operator, dtype):
    cutoff = operator.rcond if isinstance(operator, Blur) else 0.0
    largest = operator.transfer(torch.zeros(1, *IMAGE_SHAPE)).abs().max().item() if cutoff else 1.0
    check_moore_penrose(operator, dtype, IMAGE_SHAPE, largest, cutoff)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.sampled_from((4, 8, 12)), st.sampled_from((4, 8, 12))),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1)),
    st.sampled_from(("circular", "reflect")),
    st.sampled_from((1e-4, 1e-2)),
    st.sampled_from(("blur", "alone", "mask after", "pool after", "blur after", "stack")),
)
def test_blurs_and_combinations_that_take_over_their_cutoff(shape, drawn, padding, rcond, kind):
    height, width, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    blur = Blur(torch.randn(height, width, generator=generator, dtype=torch.float64), padding, rcond)
    pool, mask = SuperResolution(2), Inpainting(torch.rand(shape[1:], generator=generator) < 0.5)
    operator = {
        "blur": lambda: blur,
        "alone": lambda: Compose([blur]),
        "mask after": lambda: Compose([mask, blur]),
        "pool after": lambda: Compose([pool, blur]),
        "blur after": lambda: Compose([blur, mask]),
        "stack": lambda: Stack([blur, pool], shape),
    }[kind]()
    # A reflected border weighs pixels twice: its largest singular value is up to twice that of a circular one.
    largest = 2 * (1 + blur.transfer(torch.zeros(1, *shape, dtype=torch.float64)).abs().max().item())
    assert operator.rcond == rcond
    check_moore_penrose(operator, torch.float64, shape, largest, rcond)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_damped_inverse(operator, damping):
    """(A^T A + s I) x = A^T y, and x is in the range of A^T."""
    _, y = draws(operator)
    x = operator.A_dagger(y, damping)
    back = operator.A_adjoint(y)
    assert_near(operator.A_adjoint(operator.A(x)) + damping * x, back, 1e-8, back)


def test_each_image_by_itself(operator):
    """What one image's measurement is restored to does not hang on the others, where the mask is not one an image."""
    if isinstance(operator, Inpainting) and operator.mask.ndim == 4:
        pytest.skip("has a mask for each image of the batch")
    x, y = draws(operator)
    torch.testing.assert_close(operator.A(x[1:2]), operator.A(x)[1:2])
    together, alone = operator.A_dagger(y)[1:2], operator.A_dagger(y[1:2])
    assert_near(together, alone, 1e-8, alone)


def test_gradients(operator):
    """Of a linear map the gradient of <M a, w> is M^T w, whatever a is: for A, its adjoint and its pseudo-inverse."""
    x, y = draws(operator)
    x2, y2 = draws(operator, seed=1)
    cases = (operator.A, x, y, x2), (operator.A_adjoint, y, x, y2), (operator.A_dagger, y, x, y2)
    for transform, start, weight, direction in cases:
        _, gradient = torch.autograd.functional.vjp(transform, start, weight)
        error = (inner(gradient, direction) - inner(transform(direction), weight)).abs()
        assert (error <= 1e-6 * transform(direction).norm() * weight.norm()).all()


def test_gradients_of_the_solver_by_finite_differences():
    operator = Compose([Inpainting.random(2, 2, 0.7, seeded()), SuperResolution(2)])
    y = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(operator.A_dagger, y)
    assert torch.autograd.gradgradcheck(lambda y: operator.A_dagger(y, 0.1).square(), y)


def test_half_precision_measures(operator):
    """An operator follows the precision of the image, as in a pipeline in bf16."""
    x = torch.randn(BATCH, *IMAGE_SHAPE, generator=seeded())
    measured = operator.A(x.bfloat16())
    assert measured.dtype == torch.bfloat16
    torch.testing.assert_close(measured.float(), operator.A(x), rtol=0.1, atol=0.1)


def test_composition_agrees_with_a_dense_pseudo_inverse():
    """Which is not the product of the parts' pseudo-inverses."""
    blur = Blur(torch.rand(3, 3, generator=seeded()))
    operator = Compose([Inpainting.random(6, 8, 0.5, seeded()), SuperResolution(2), blur])
    x = torch.eye(192, dtype=torch.float64).view(192, 1, 12, 16)
    matrix = operator.A(x).flatten(1).mT
    y = torch.randn(1, 1, 6, 8, dtype=torch.float64, generator=seeded())
    expected = (torch.linalg.pinv(matrix, rtol=1e-8) @ y.flatten()).view(1, 1, 12, 16)
    assert_near(operator.A_dagger(y), expected, 1e-6, expected)


def test_stack_joins_and_splits():
    stack = EVERY["stack"]
    x, _ = draws(stack)
    parts = [part.A(x) for part in stack.parts]
    assert all(torch.equal(a, b) for a, b in zip(stack.split(stack.join(parts)), parts))
    assert torch.equal(stack.A(x), stack.join(parts))
    # Two exposures of a scene: the mean of what each says.
    twice = Stack([SuperResolution(1), SuperResolution(1)], IMAGE_SHAPE)
    torch.testing.assert_close(twice.A_dagger(twice.join([x, 3 * x])), 2 * x)
