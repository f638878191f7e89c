"""Operators of every kind, for images of (3, 12, 16), that the tests of this folder share."""

import torch

from ecvae_diffusers.operators import (
    Blur,
    Colorization,
    Compose,
    CompressedSensing,
    Denoising,
    FunctionOperator,
    Inpainting,
    LinearOperator,
    Stack,
    SuperResolution,
    gaussian_kernel,
    motion_kernel,
    uniform_kernel,
)


IMAGE_SHAPE = (3, 12, 16)
BATCH = 3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def kernels() -> dict[str, torch.Tensor]:
    return {
        "gaussian": gaussian_kernel(1.0),
        "anisotropic": gaussian_kernel((0.7, 1.6), angle=30, size=7),
        "uniform": uniform_kernel(4),
        "motion": motion_kernel(5, angle=20),
        "user's": torch.rand(3, 4, generator=seeded()),
        "user's, of one row": torch.rand(1, 5, generator=seeded()),
    }


def operators() -> dict[str, LinearOperator]:
    channels, height, width = IMAGE_SHAPE
    half = Inpainting.random(height // 2, width // 2, 0.5, seeded())
    narrow = Blur(gaussian_kernel(0.6), "reflect")
    found = {
        "denoising": Denoising(),
        "box": Inpainting.box(height, width, 2, 3, 5, 6),
        "random mask": Inpainting.random(height, width, 0.4, seeded()),
        "a mask an image": Inpainting.random(height, width, 0.4, seeded(), num_masks=BATCH),
        "a mask a channel": Inpainting(torch.rand(IMAGE_SHAPE, generator=seeded()) < 0.5),
        "nothing observed": Inpainting(torch.zeros(height, width)),
        "colorization": Colorization(),
        "hadamard": CompressedSensing.hadamard(0.25, 4, seeded()),
        "orthonormal": CompressedSensing.orthonormal(0.4, 2, seeded()),
        "mask after pooling": Compose([half, SuperResolution(2)]),
        "pooling after blur": Compose([SuperResolution(2), Blur(gaussian_kernel(0.8))]),
        "gray, blurred, small": Compose([SuperResolution(2, "bicubic"), narrow, Colorization()]),
        "stack": Stack(
            [SuperResolution(4), Inpainting.random(height, width, 0.3, seeded()), Colorization()], IMAGE_SHAPE
        ),
        "functions": FunctionOperator(
            lambda x: 2 * x.flip(1)[:, :2], lambda y: 2 * torch.cat([0 * y[:, :1], y.flip(1)], 1)
        ),
    }
    found |= {
        f"x{scale}, {mode}": SuperResolution(scale, mode)
        for scale in (2, 4)
        for mode in ("average", "bicubic", "decimation")
    }
    found |= {
        f"{name}, {padding}": Blur(kernel, padding)
        for name, kernel in kernels().items()
        for padding in ("circular", "reflect")
    }
    return found
