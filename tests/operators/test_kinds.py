"""What each kind of operator measures, against PIL and scipy; saving; wrong arguments."""

import math
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch
from operator_examples import BATCH, IMAGE_SHAPE, kernels, operators, seeded

from ecvae_diffusers.operators import (
    Blur,
    Colorization,
    Compose,
    CompressedSensing,
    FunctionOperator,
    Inpainting,
    LinearOperator,
    Stack,
    SuperResolution,
    as_operator,
    gaussian_kernel,
    motion_kernel,
    uniform_kernel,
)
from ecvae_diffusers.operators.solvers import cgls


EVERY = operators()


def image(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(1, 1, 12, 16, generator=seeded(), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("scale", [2, 4])
def test_bicubic_is_pils(scale):
    x = image(torch.float32)
    small = PIL.Image.fromarray(x[0, 0].numpy()).resize((16 // scale, 12 // scale), PIL.Image.BICUBIC)
    np.testing.assert_allclose(SuperResolution(scale, "bicubic").A(x)[0, 0], np.asarray(small), atol=1e-5)


def test_gray_is_pils():
    pixels = torch.randint(256, (1, 3, 12, 16), generator=seeded()).double()
    gray = PIL.Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy()).convert("L")
    np.testing.assert_allclose(Colorization().A(pixels)[0, 0], np.asarray(gray), atol=1.0)


@pytest.mark.parametrize("padding, mode", [("circular", "wrap"), ("reflect", "mirror")])
@pytest.mark.parametrize("name", kernels())
def test_blur_is_scipys_convolution(name, padding, mode):
    kernel, x = kernels()[name].double(), image()
    expected = scipy.ndimage.convolve(x[0, 0].numpy(), kernel.numpy(), mode=mode)
    np.testing.assert_allclose(Blur(kernel, padding).A(x)[0, 0], expected, atol=1e-12)


def test_kernels():
    for kernel in (gaussian_kernel(1.3), gaussian_kernel((1, 2), 40), uniform_kernel(5), motion_kernel(7, 35)):
        assert kernel.sum().item() == pytest.approx(1, abs=1e-6) and kernel.min() >= 0
        torch.testing.assert_close(kernel, kernel.flip(0, 1))  # no shift
    assert motion_kernel(5).shape == (1, 5)
    torch.testing.assert_close(motion_kernel(5, 90), motion_kernel(5).T)
    # Counter-clockwise: up on the right, where rows count downwards.
    rising = motion_kernel(9, 45)
    middle = len(rising) // 2
    assert rising[:middle, middle + 1 :].sum() > 0.3 and rising[:middle, :middle].sum() == 0
    # Wide along its own columns, turned to stand upright.
    wide, upright = gaussian_kernel((1, 2), size=13), gaussian_kernel((1, 2), angle=90, size=13)
    assert wide[6, 10] > wide[10, 6]
    torch.testing.assert_close(upright, wide.T)
    variance = (wide * (torch.arange(13) - 6.0).square()).sum()
    assert variance.item() == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("padding", ["circular", "reflect"])
def test_the_cutoff_of_a_blur(padding):
    """On a picture in 8 bits the uncut pseudo-inverse restores nothing, the cut one something near the picture."""
    x = torch.nn.functional.interpolate(torch.rand(1, 1, 8, 8, generator=seeded()), (32, 32), mode="bicubic")
    blur = Blur(gaussian_kernel(1.5), padding)
    picture = (blur.A(x) * 255).round() / 255
    assert (Blur(gaussian_kernel(1.5), padding, rcond=0.0).A_dagger(picture) - x).abs().max() > 100
    assert (Blur(gaussian_kernel(1.5), padding, rcond=0.05).A_dagger(picture) - x).abs().mean() < 0.05
    assert (blur.A_dagger(picture, damping=1e-3) - x).abs().mean() < 0.05


def test_large_mirrored_blur_is_solved():
    """Beyond 1,024 pixels, with a kernel that is no product: by CGLS, for A_s as well as ever."""
    blur = Blur(motion_kernel(7, 30), "reflect")
    back = blur.A_adjoint(y := blur.A(torch.rand(1, 1, 40, 48, generator=seeded(), dtype=torch.float64)))
    damped = blur.A_dagger(y, 1e-2)
    assert (blur.A_adjoint(blur.A(damped)) + 1e-2 * damped - back).norm() < 1e-8 * back.norm()


def test_random_masks_and_matrices():
    for make in (CompressedSensing.hadamard, CompressedSensing.orthonormal):
        one, same, other = (make(0.25, 8, torch.Generator().manual_seed(seed)).matrix for seed in (0, 0, 1))
        assert one.shape == (16, 64) and torch.equal(one, same) and not torch.equal(one, other)
    assert CompressedSensing.hadamard(generator=seeded()).matrix.abs().unique().numel() == 1
    mask = Inpainting.random(64, 64, 0.3, seeded(), num_masks=4).mask
    assert mask.shape == (4, 1, 64, 64) and not torch.equal(mask[0], mask[1])
    assert mask.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / mask.numel()))
    box = Inpainting.box(8, 9, 1, 2, 3, 4).mask
    assert (~box).sum() == 12 and not box[1:4, 2:6].any()


def test_other_peoples_operators():
    """Those of deepinv's LinearPhysics take further keywords. Its `A_dagger` is approximate, so it is not asked."""

    def A_adjoint(y, **kwargs):
        return torch.stack([y * 3, 0 * y], -2).flatten(-3, -2)

    x = image()
    physics = SimpleNamespace(A=lambda x, **kwargs: x[..., ::2, :] * 3, A_adjoint=A_adjoint, A_dagger=None)
    for given in (physics, (physics.A, physics.A_adjoint), [physics.A, physics.A_adjoint]):
        operator = as_operator(given)
        assert isinstance(operator, FunctionOperator) and operator.measurement_shape((1, 12, 16)) == (1, 6, 16)
        expected = torch.zeros_like(x)
        expected[..., ::2, :] = x[..., ::2, :]
        torch.testing.assert_close(operator.A_dagger(operator.A(x)), expected)
    mixed = Compose([Inpainting.random(6, 16, 0.5, seeded()), physics])
    y = mixed.A(x)
    torch.testing.assert_close(mixed.A(mixed.A_dagger(y)), y)
    for wrong in (torch.eye(3), (physics.A,), None, "inpainting"):
        with pytest.raises(ValueError, match="`operator`"):
            as_operator(wrong)


MASKS = Inpainting(torch.rand(12, 16, generator=seeded()) < 0.5)
GRAY = Colorization(np.array([0.5, 0.25, 0.25], dtype=np.float32))
SAVED = {name: operator for name, operator in EVERY.items() if name != "functions"}
SAVED["parts that share a tensor"] = Stack([Compose([MASKS, GRAY]), MASKS], IMAGE_SHAPE)


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded(name, tmp_path):
    operator = SAVED[name]
    operator.save_pretrained(tmp_path)
    loaded = LinearOperator.from_pretrained(tmp_path)
    assert type(loaded) is type(operator)
    x = torch.randn(BATCH, *IMAGE_SHAPE, generator=seeded(), dtype=torch.float64)
    y = operator.A(x)
    assert torch.equal(loaded.A(x), y) and torch.equal(loaded.A_dagger(y), operator.A_dagger(y))


def test_stack_of_functions_that_ask_for_their_own_batch():
    """Where the functions' measurement is told, they are called with the caller's batch and dtype only."""
    seen, matrix = set(), torch.randn(5, 192, dtype=torch.float64, generator=seeded())

    def A(x):
        seen.add((len(x), x.dtype))
        return x.flatten(1) @ matrix.T

    functions = (A, lambda y: (y @ matrix).view(-1, 1, 12, 16))
    operator = Stack([functions, SuperResolution(2)], (1, 12, 16), [(5,), (1, 6, 8)])
    x = image().expand(3, -1, -1, -1)
    torch.testing.assert_close(operator.A(operator.A_dagger(operator.A(x))), operator.A(x))
    assert seen == {(3, torch.float64)}


WRONG = [
    ("mask", lambda: Inpainting(torch.full((4, 4), 0.5))),
    ("mask", lambda: Inpainting(torch.ones(4, 4)).A(image())),
    ("mask", lambda: Inpainting(torch.ones(2, 1, 12, 16)).A(image())),
    ("box_height", lambda: Inpainting.box(8, 8, 5, 0, 4, 4)),
    ("observed", lambda: Inpainting.random(8, 8, 30)),
    ("scale", lambda: SuperResolution(0)),
    ("scale", lambda: SuperResolution(5).A(image())),
    ("mode", lambda: SuperResolution(2, "lanczos")),
    ("weights", lambda: Colorization().A(image())),
    ("weights", lambda: Colorization((math.nan, 1.0, 1.0))),
    ("kernel", lambda: Blur(torch.ones(1, 3, 3))),
    ("kernel", lambda: Blur(motion_kernel(3, angle=math.nan))),
    ("kernel", lambda: Blur(gaussian_kernel(8), "reflect").A(image())),
    ("padding", lambda: Blur(torch.ones(3, 3), "zeros")),
    ("rcond", lambda: Blur(torch.ones(3, 3), rcond=1.0)),
    ("size", lambda: gaussian_kernel(1.0, size=4)),
    ("std", lambda: gaussian_kernel(0.0)),
    ("length", lambda: motion_kernel(0.5)),
    ("ratio", lambda: CompressedSensing.orthonormal(25)),
    ("block_size", lambda: CompressedSensing.hadamard(0.5, 6)),
    ("block_size", lambda: CompressedSensing.hadamard().A(image())),
    ("matrix", lambda: CompressedSensing(torch.ones(2, 4))),
    ("operator", lambda: Compose([SuperResolution(2), "blur"])),
    ("measurements", lambda: EVERY["stack"].join(EVERY["stack"].split(torch.ones(1, 804))[::-1])),
    ("FunctionOperator", lambda: EVERY["functions"].save_pretrained("never made")),
    ("_class_name", lambda: LinearOperator.from_config({"_class_name": "gaussian_kernel"})),
]


@pytest.mark.parametrize("name, make", WRONG)
def test_wrong_arguments(name, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


def test_cgls_says_when_it_stops(recwarn):
    """After its iterations; not where all entries are done, at different times; in float32 where it comes no nearer."""
    hard = torch.diag(torch.logspace(0, -6, 20, dtype=torch.float64))
    y = torch.ones(2, 20, dtype=torch.float64)
    y[1, 1:] = 0  # done in one step
    cgls(lambda x: x @ hard, lambda y: y @ hard, y[1:], max_iterations=3)
    matrix, calls = torch.diag(torch.logspace(0, -2, 20)), []
    x = cgls(lambda x: calls.append(1) or x @ matrix, lambda y: y @ matrix, torch.ones(2, 20), tolerance=1e-12)
    torch.testing.assert_close(x @ matrix, torch.ones(2, 20), rtol=0, atol=1e-4)
    assert len(calls) < 300 and not recwarn.list
    with pytest.warns(UserWarning, match="3 iterations"):
        x = cgls(lambda x: x @ hard, lambda y: y @ hard, y, max_iterations=3)
    torch.testing.assert_close(x[1], y[1])


@pytest.mark.parametrize(
    "operator",
    [
        SuperResolution(2, "bicubic"),
        Blur(motion_kernel(5, 30), "reflect"),
        Blur(gaussian_kernel(1.0), "reflect"),
        Compose([SuperResolution(2), Blur(gaussian_kernel(0.6), "reflect")]),
    ],
)
def test_matrices_are_decomposed_once_and_serve_gradients(operator, monkeypatch):
    """Even if they are made in inference mode."""
    x = torch.rand(1, 1, 20, 20, generator=seeded())
    with torch.inference_mode():
        y = operator.A(x)
        expected = operator.A_dagger(y).clone()
    monkeypatch.setattr("ecvae_diffusers.operators.linear_operator.factorize", lambda matrix: 1 / 0)
    y = operator.A(x).requires_grad_()
    found = operator.A_dagger(y)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())
    assert y.grad.abs().sum() > 0
