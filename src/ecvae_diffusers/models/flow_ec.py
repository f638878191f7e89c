# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""A normalizing flow for images: an invertible map of images to standard normal latents, and its density.

.. math::
    \log p(x) = \log \mathcal N(F(x); 0, I) + \log \left| \det \tfrac{\partial F}{\partial x} \right|

F is multi-scale (Dinh et al. 2017, arXiv 1605.08803, section 3.6) and made of Glow's steps (Kingma and Dhariwal 2018, arXiv
1807.03039): activation normalization, an invertible 1x1 convolution, an affine coupling. Each transform returns its output and the
log-determinant of its Jacobian per image; with `inverse=True`, those of its inverse. Both directions go through `forward`, because
diffusers and Accelerate hook into it to move, cast and compile weights.

This file imports only torch and diffusers, so that it can be on the Hub next to its config.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor


# Bound on the log-scale of a coupling. Without it, couplings can't be inverted in float32.
MAX_LOG_SCALE = 2.0
MAX_IN_CHANNELS = 16
# Bounds far above any practical use, so that a downloaded config can't exhaust the memory.
MAX_SAMPLE_SIZE, MAX_LEVELS, MAX_STEPS_PER_LEVEL, MAX_HIDDEN_CHANNELS = 8192, 13, 512, 8192


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32 or more, for sums over an image and inverses of matrices."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class FlowECOutput(BaseOutput):
    """
    Output of [`FlowEC`].

    Args:
        log_prob (`torch.Tensor` of shape `(batch_size,)`): Log-density of the images in nats, float32.
        latents (`torch.Tensor` of shape `(batch_size, num_latents, 1, 1)`): F(x).
        prior_sample (`torch.Tensor` of shape `(num_prior_samples, in_channels, height, width)`, *optional*):
            Images decoded from `prior_latents`.
    """

    # All fields but the first have defaults, because Accelerate rebuilds outputs from a single mapping under mixed precision.
    log_prob: torch.Tensor
    latents: torch.Tensor | None = None
    prior_sample: torch.Tensor | None = None


def height_and_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width of images from a config's `sample_size`, which is one number for squares."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width


def check_sample_size(sample_size: int | Sequence[int], multiple: int, least: int) -> None:
    """Raise `ValueError` if a `sample_size` is neither an int nor a pair of ints, or a side is not an allowed multiple."""
    sides = [*sample_size] if isinstance(sample_size, list | tuple) else [sample_size, sample_size]
    allowed_sides = range(least, MAX_SAMPLE_SIZE + 1, multiple)
    if len(sides) != 2 or not all(isinstance(side, int) and side in allowed_sides for side in sides):
        allowed = f"an int or (height, width), each a multiple of {multiple} from {least} to {MAX_SAMPLE_SIZE}"
        raise ValueError(f"`sample_size` must be {allowed} for these `num_levels`, but is {sample_size}.")


class ActNorm(nn.Module):
    """Activation normalization y = (x + bias) e^log_scale per channel, whose parameters are initialized once from data."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def initialize(self, x: torch.Tensor) -> None:
        """Set the parameters so that each channel of the output for `x` has mean 0 and variance 1."""
        self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
        self.log_scale.copy_(-x.std((0, 2, 3), correction=0, keepdim=True).clamp(min=1e-3).log())

    def forward(self, x: torch.Tensor, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        log_det = (at_least_float32(self.log_scale).sum() * x.shape[2] * x.shape[3]).expand(len(x))
        # Layerwise casting does not convert these two parameters to the precision of the input.
        bias, log_scale = self.bias.to(x.dtype), self.log_scale.to(x.dtype)
        if inverse:
            return x * (-log_scale).exp() - bias, -log_det
        return (x + bias) * log_scale.exp(), log_det


class InvertibleConv(nn.Module):
    """
    A 1x1 convolution with W = P L (U + diag(s)) (Kingma and Dhariwal 2018, section 3.2). |det W| is the product of |s|, and the
    inverse takes two triangular solves. W starts as a random rotation.

    Autocast is disabled here: W and its inverse, both rounded to bfloat16, would not be inverse to each other. The networks of
    couplings may run in lower precision, since they have the same input in both directions.
    """

    def __init__(self, channels: int):
        super().__init__()
        # float32 even for a model in half precision, which has no matrix decompositions.
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float32))[0]
        permutation, lower, upper = (m.to(torch.get_default_dtype()) for m in torch.linalg.lu(rotation))
        # Constants, but not buffers, because diffusers' `EMAModel` keeps only parameters.
        self.permutation = nn.Parameter(permutation, requires_grad=False)
        self.sign = nn.Parameter(upper.diagonal().sign(), requires_grad=False)
        self.log_scale = nn.Parameter(upper.diagonal().abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    def triangles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return L and U + diag(s)."""
        lower, upper, log_scale = map(at_least_float32, (self.lower, self.upper, self.log_scale))
        identity = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
        return lower.tril(-1) + identity, upper.triu(1) + torch.diag(self.sign.detach() * log_scale.exp())

    def forward(self, x: torch.Tensor, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self.triangles()
            log_det = (at_least_float32(self.log_scale).sum() * x.shape[2] * x.shape[3]).expand(len(x))
            permutation = self.permutation.detach().to(lower.dtype)
            if inverse:
                weight = torch.linalg.solve_triangular(lower, permutation.T, upper=False, unitriangular=True)
                weight, log_det = torch.linalg.solve_triangular(upper, weight, upper=True), -log_det
            else:
                weight = permutation @ lower @ upper
            return F.conv2d(x, weight[..., None, None].to(x.dtype)), log_det


class AffineCoupling(nn.Module):
    """
    An affine coupling. The first channels x_a stay unchanged, and a network of them shifts and scales the rest:
    y_b = (x_b + t(x_a)) e^s(x_a), |s| <= 2. It starts as the identity.
    """

    def __init__(self, kept_channels: int, changed_channels: int, hidden_channels: int):
        super().__init__()
        self.kept_channels = kept_channels
        first = nn.Conv2d(kept_channels, hidden_channels, 3, padding=1)
        second = nn.Conv2d(hidden_channels, hidden_channels, 1)
        last = nn.Conv2d(hidden_channels, 2 * changed_channels, 3, padding=1)
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def shift_and_log_scale(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, raw = self.net(kept).to(kept.dtype).chunk(2, dim=1)
        return shift, MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)

    def forward(self, x: torch.Tensor, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        kept, changed = x[:, : self.kept_channels], x[:, self.kept_channels :]
        shift, log_scale = self.shift_and_log_scale(kept)
        log_det = at_least_float32(log_scale).flatten(1).sum(1)
        if inverse:
            return torch.cat([kept, changed * (-log_scale).exp() - shift], dim=1), -log_det
        return torch.cat([kept, (changed + shift) * log_scale.exp()], dim=1), log_det


class FlowStep(nn.Module):
    """Activation normalization, an invertible 1x1 convolution, and an affine coupling of one half of the channels by the other."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        kept = channels // 2
        self.norm = ActNorm(channels)
        self.conv = InvertibleConv(channels)
        self.coupling = AffineCoupling(kept, channels - kept, hidden_channels)

    def forward(self, x: torch.Tensor, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        transforms = (self.norm, self.conv, self.coupling)
        total = x.new_zeros(())
        for transform in reversed(transforms) if inverse else transforms:
            x, log_det = transform(x, inverse)
            total = total + log_det
        return x, total


class FlowLevel(nn.Module):
    """
    A level that squeezes 2x2 pixels into channels and transforms them. The first half of the channels (`kept_channels`) is the
    input of the next level. The second half is latents, normalized by a last coupling given the first half. The last level has
    only latents.
    """

    _gradient_checkpointing_func: Callable

    def __init__(self, in_channels: int, num_steps: int, hidden_channels: int, is_last: bool):
        super().__init__()
        channels = 4 * in_channels
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(FlowStep(channels, hidden_channels) for _ in range(num_steps))
        self.kept_channels = 0 if is_last else channels // 2
        self.split = None if is_last else AffineCoupling(channels // 2, channels - channels // 2, hidden_channels)

    def forward(self, x: torch.Tensor, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        transforms = [*self.blocks] if self.split is None else [*self.blocks, self.split]
        x, total = x if inverse else F.pixel_unshuffle(x, 2), x.new_zeros(())
        for transform in reversed(transforms) if inverse else transforms:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, log_det = self._gradient_checkpointing_func(transform, x, inverse)
            else:
                x, log_det = transform(x, inverse)
            total = total + log_det
        return F.pixel_shuffle(x, 2) if inverse else x, total


class FlowEC(ModelMixin, ConfigMixin):
    r"""
    A multi-scale normalizing flow for images. Energy calibration can improve its samples (EC-NF, Luo et al., ECCV 2024, arXiv
    2311.04071).

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods implemented for all
    models (such as downloading or saving). Construct it with keyword arguments only, because
    `from_config` loses positional ones.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to `32`):
            Height and width of the images, in pixels: one number for squares, or `(height, width)`. Each is a multiple of
            2^`num_levels`.
        in_channels (`int`, *optional*, defaults to `3`):
            Number of image channels, from 1 to 16: 1 is gray, 3 RGB and 4 RGBA.
        num_levels (`int`, *optional*, defaults to `3`):
            Number of scales L, from 1 to 13. Each halves the resolution.
        steps_per_level (`int`, *optional*, defaults to `8`): Steps at each scale, from 1 to 512.
        hidden_channels (`int`, *optional*, defaults to `128`):
            Hidden channels of the couplings' networks, from 1 to 8192.

    Raises:
        ValueError: if an argument is outside the range given above.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FlowStep"]
    _repeated_blocks = ["FlowStep"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        num_levels: int = 3,
        steps_per_level: int = 8,
        hidden_channels: int = 128,
    ):
        super().__init__()
        for name, value, limit in (
            ("in_channels", in_channels, MAX_IN_CHANNELS),
            ("num_levels", num_levels, MAX_LEVELS),
            ("steps_per_level", steps_per_level, MAX_STEPS_PER_LEVEL),
            ("hidden_channels", hidden_channels, MAX_HIDDEN_CHANNELS),
        ):
            if not 1 <= value <= limit:
                raise ValueError(f"`{name}` must be from 1 to {limit}, but is {value}.")
        check_sample_size(sample_size, 2**num_levels, 2**num_levels)
        height, width = height_and_width(sample_size)
        # As JSON stores it: squares stay one number, as in configs of earlier versions.
        self.register_to_config(sample_size=height if height == width else [height, width])
        self.levels = nn.ModuleList()
        self.latent_shapes: list[tuple[int, int, int]] = []  # per level
        channels = in_channels
        for i in range(num_levels):
            level = FlowLevel(channels, steps_per_level, hidden_channels, is_last=i == num_levels - 1)
            height, width = height // 2, width // 2
            self.levels.append(level)
            self.latent_shapes.append((4 * channels - level.kept_channels, height, width))
            channels = level.kept_channels

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Load a model as [`ModelMixin.from_pretrained`] does, but only from safetensors: a pickle can run code when it is read.

        Raises:
            ValueError: if weights are missing or not finite.
        """
        loading = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, **loading)
        # Weights offloaded to disk have no values here, and `isfinite` does not support all 8-bit dtypes.
        weights = {name: weight for name, weight in model.state_dict().items() if not weight.is_meta}
        broken = [name for name, weight in weights.items() if not weight.float().isfinite().all()]
        if broken := sorted(info["missing_keys"] or broken):
            raise ValueError(f"Weights in {pretrained_model_name_or_path} are missing or not finite: {broken[:3]}.")
        return (model, info) if kwargs.get("output_loading_info") else model

    @property
    def num_latents(self) -> int:
        """The number D of latents, equal to the number of entries of an image."""
        return self.config.in_channels * math.prod(height_and_width(self.config.sample_size))

    @torch.no_grad()
    def initialize(self, sample: torch.Tensor) -> None:
        """
        Set each activation normalization so that its output on `sample` has mean 0 and variance 1 per channel (Kingma and Dhariwal
        2018, section 3.1). Call it once, before training.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                Dequantized data in [-1, 1).
        """
        norms = [module for module in self.modules() if isinstance(module, ActNorm)]
        hooks = [norm.register_forward_pre_hook(lambda norm, inputs: norm.initialize(inputs[0])) for norm in norms]
        try:
            self.encode(sample)
        finally:
            for hook in hooks:
                hook.remove()

    @apply_forward_hook
    def encode(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Map images to latents.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].

        Returns:
            The latents F(x) of shape `(batch_size, num_latents, 1, 1)`, and log |det dF/dx| of shape `(batch_size,)` in
            nats, float32.

        Raises:
            ValueError: if the number of channels, height or width of `sample` does not fit, or it holds integers.
        """
        expected = (self.config.in_channels, *height_and_width(self.config.sample_size))
        if not sample.is_floating_point():
            raise ValueError(f"`sample` must have a floating-point dtype, in [-1, 1], but has {sample.dtype}.")
        if sample.shape[1:] != expected:
            raise ValueError(f"Images of `sample` must have shape {expected}, but `sample` has {tuple(sample.shape)}.")
        latents, kept, total = [], sample, sample.new_zeros(())
        for level in self.levels:
            x, log_det = level(kept)
            kept, gone = x[:, : level.kept_channels], x[:, level.kept_channels :]
            latents.append(gone.flatten(1))
            total = total + log_det
        return torch.cat(latents, dim=1)[..., None, None], total

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Map latents to images: the inverse of `encode`.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latents, 1, 1)`): Draws from N(0, I) give new images.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, height, width)`: images. Most entries lie in [-1, 1], but
            a flow is unbounded.

        Raises:
            ValueError: if `latents` has the wrong shape.
        """
        expected = (self.num_latents, 1, 1)
        if latents.shape[1:] != expected:
            raise ValueError(
                f"Each of `latents` must have shape {expected}, but `latents` has {tuple(latents.shape)}."
            )
        parts = latents.flatten(1).split([math.prod(shape) for shape in self.latent_shapes], dim=1)
        kept = latents.new_empty(len(latents), 0, *self.latent_shapes[-1][1:])
        for level, part, shape in zip(reversed(self.levels), reversed(parts), reversed(self.latent_shapes)):
            kept, _ = level(torch.cat([kept, part.unflatten(1, shape)], dim=1), inverse=True)
        return kept

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """
        Generate images: draw latents from N(0, `temperature`^2 I) and decode them, with gradients to the parameters.

        Args:
            batch_size (`int`): The number of images.
            generator (`torch.Generator` or a list of one per image, *optional*): Draws the latents.
            temperature (`float`, *optional*, defaults to 1.0): Standard deviation of the latents.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, height, width)`, see `decode`.
        """
        shape = (batch_size, self.num_latents, 1, 1)
        return self.decode(temperature * randn_tensor(shape, generator, self.device, self.dtype))

    def log_prob(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Return the log-density of images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                In [-1, 1). Dequantize 8-bit images first, see `dequantize`.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, nats, float32.
        """
        return self.forward(sample, return_dict=False)[0]

    def save_pretrained(
        self, save_directory, is_main_process=True, save_function=None, safe_serialization=True, variant=None,
        max_shard_size="10GB", **kwargs,
    ):  # fmt: skip
        """Save a model as [`ModelMixin.save_pretrained`] does, but only as safetensors: `from_pretrained` loads nothing else."""
        if not safe_serialization:
            raise ValueError(
                "`safe_serialization` must not be False: weights are saved and loaded as safetensors only."
            )
        super().save_pretrained(
            save_directory, is_main_process, save_function, True, variant, max_shard_size, **kwargs
        )

    def forward(
        self, sample: torch.Tensor, prior_latents: torch.Tensor | None = None, return_dict: bool = True
    ) -> FlowECOutput | tuple:
        """
        Return the density of images, and generate new ones in the same pass. A training step then needs only `forward`, the one
        method whose gradients distributed wrappers synchronize.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1).
            prior_latents (`torch.Tensor` of shape `(num_prior_samples, num_latents, 1, 1)`, *optional*):
                Draws from N(0, I) to decode.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`FlowECOutput`] instead of a plain tuple.

        Returns:
            [`FlowECOutput`], or a tuple `(log_prob, latents)`, followed by `prior_sample` if `prior_latents` were given.
        """
        latents, log_det = self.encode(sample)
        squares = at_least_float32(latents).square().flatten(1).sum(1)
        log_prob = log_det - 0.5 * (squares + self.num_latents * math.log(2 * math.pi))
        prior_sample = None if prior_latents is None else self.decode(prior_latents.to(latents.dtype))
        if not return_dict:
            return (log_prob, latents) + (() if prior_sample is None else (prior_sample,))
        return FlowECOutput(log_prob=log_prob, latents=latents, prior_sample=prior_sample)
