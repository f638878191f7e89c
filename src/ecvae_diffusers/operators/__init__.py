"""Linear measurements of images: A, its adjoint and its pseudo-inverse."""

from .blur import Blur, gaussian_kernel, motion_kernel, uniform_kernel
from .combinations import Compose, Stack
from .compressed_sensing import CompressedSensing
from .linear_operator import FunctionOperator, LinearOperator, as_operator
from .pixelwise import Colorization, Denoising, Inpainting
from .super_resolution import SuperResolution


__all__ = [
    "Blur",
    "Colorization",
    "Compose",
    "CompressedSensing",
    "Denoising",
    "FunctionOperator",
    "Inpainting",
    "LinearOperator",
    "Stack",
    "SuperResolution",
    "as_operator",
    "gaussian_kernel",
    "motion_kernel",
    "uniform_kernel",
]
