# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""The energy-based model of EC-VAE: one scalar per image, low if the image is like the data.

.. math::
    p(x) \propto \exp(-f(x) / \tau)

The network returns the raw energy f. The temperature tau is part of the Langevin drift step (see [`LangevinScheduler`]), because
f / tau overflows in half precision.

This file imports only torch and diffusers, so that it can be on the Hub next to its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch.nn.utils import parametrize


# Bounds far above any practical use, so that a downloaded config can't exhaust the memory.
MAX_SAMPLE_SIZE, MAX_CHANNELS, MAX_LAYERS_PER_BLOCK = 8192, 8192, 128


@dataclass
class EnergyModelOutput(BaseOutput):
    """
    Output of [`EnergyModel`].

    Args:
        energy (`torch.Tensor` of shape `(batch_size,)`, float32):
            The energy f(x) of each image; low means like the data. Only differences between energies are meaningful.
    """

    energy: torch.Tensor


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
        raise ValueError(
            f"`sample_size` must be {allowed} for these `block_out_channels` and `patch_size`, but is {sample_size}."
        )


def get_energy_activation(act_fn: str) -> nn.Module:
    return nn.LeakyReLU(0.2) if act_fn == "leaky_relu" else get_activation(act_fn)


class SpectralNorm(nn.Module):
    """
    Division of a weight by its largest singular value (Miyato et al. 2018, arXiv 1802.05957, algorithm 1), with one power
    iteration per pass in training mode. Values and names match `torch.nn.utils.parametrizations.spectral_norm`, except that
    the singular vectors are parameters without gradients instead of buffers: diffusers' `EMAModel` keeps only parameters.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        matrix = weight.detach().flatten(1)
        u, v = (F.normalize(matrix.new_empty(size).normal_(0, 1), dim=0) for size in matrix.shape)
        self._u, self._v = nn.Parameter(u, requires_grad=False), nn.Parameter(v, requires_grad=False)
        for _ in range(0 if weight.is_meta else 15):
            self.iterate(matrix)

    @torch.no_grad()
    def iterate(self, matrix: torch.Tensor) -> None:
        self._u.copy_(F.normalize(torch.mv(matrix, self._v), dim=0))
        self._v.copy_(F.normalize(torch.mv(matrix.mT, self._u), dim=0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.flatten(1)
        if self.training:
            self.iterate(matrix)
        # Copies, because backward needs the vectors of this pass even after a later one.
        u, v = self._u.detach().clone(), self._v.detach().clone()
        return weight / torch.vdot(u, torch.mv(matrix, v))

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class EnergyConv2d(nn.Conv2d):
    """A convolution that can be pickled, including its spectral norm."""

    def apply_spectral_norm(self) -> nn.Module:
        return parametrize.register_parametrization(self, "weight", SpectralNorm(self.weight))

    def __reduce_ex__(self, protocol):
        if not parametrize.is_parametrized(self):
            return super().__reduce_ex__(protocol)
        # The class of a parametrized module is created at runtime, so torch refuses to pickle it.
        return parametrized_conv, (parametrize.type_before_parametrizations(self),), self.__dict__


def parametrized_conv(conv_class: type[EnergyConv2d]) -> nn.Module:
    """Return a convolution of the given class for unpickling to fill."""
    return conv_class(1, 1, 1, device="meta").apply_spectral_norm()


class PooledConv2d(EnergyConv2d):
    """
    `F.avg_pool2d(conv(sample), 2)` of a 3x3 convolution with padding 1, computed as a 4x4 convolution of stride 2: each of the four
    pooled positions shifts the kernel by one pixel. It takes 16 multiplications instead of 36.
    """

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        shifted = [F.pad(weight, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]
        return F.conv2d(sample, sum(shifted[1:], shifted[0]) / 4, self.bias, stride=2, padding=1)


class EnergyResidualBlock(nn.Module):
    """Two convolutions with a shortcut, then average pooling to half the resolution.

    Activations are not normalized. Batch normalization would make the energy of an image, and the gradient that its chain follows,
    depend on the other images of the batch.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool, act_fn: str):
        super().__init__()
        conv_class = PooledConv2d if downsample else EnergyConv2d
        self.conv1 = EnergyConv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = conv_class(out_channels, out_channels, 3, padding=1)
        self.act = get_energy_activation(act_fn)
        self.shortcut = EnergyConv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.downsample = downsample

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv2(self.act(self.conv1(self.act(hidden_states))))
        if self.downsample:
            # Pooling commutes with the 1x1 shortcut, which then costs a quarter.
            hidden_states = F.avg_pool2d(hidden_states, 2)
        return self.shortcut(hidden_states) + residual


def recomputable(block: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Wrap a block for one pass under gradient checkpointing. In training mode, spectral norm takes a power iteration at each call, so
    the second call (in backward) would use other weights than the first. The second call therefore runs in evaluation mode.
    """
    called = False

    def call(hidden_states: torch.Tensor) -> torch.Tensor:
        nonlocal called
        training = block.training
        block.train(training and not called)
        called = True
        try:
            return block(hidden_states)
        finally:
            block.train(training)

    return call


class EnergyNetwork(nn.Module):
    """The energy at one scale. Maps images (B, C, H / 2^scale, W / 2^scale) and class labels (B,) to energies (B,)."""

    _gradient_checkpointing_func: Callable

    def __init__(self, config: FrozenDict, scale: int):
        super().__init__()
        self.gradient_checkpointing = False
        block_out_channels = config.block_out_channels[scale:]
        channels, patch = block_out_channels[0], config.patch_size
        self.unshuffle = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.conv_in = EnergyConv2d(config.in_channels * patch**2, channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        for i, out_channels in enumerate(block_out_channels):
            for j in range(config.layers_per_block):
                downsample = j == config.layers_per_block - 1 and i < len(block_out_channels) - 1
                self.blocks.append(EnergyResidualBlock(channels, out_channels, downsample, config.act_fn))
                channels = out_channels
        self.act_out = get_energy_activation(config.act_fn)
        num_levels = len(config.block_out_channels)
        height, width = (side // patch >> num_levels - 1 for side in height_and_width(config.sample_size))
        self.conv_out = EnergyConv2d(channels, 1, (height, width))
        self.class_out = None
        if config.num_class_embeds is not None:
            self.class_out = EnergyConv2d(channels, config.num_class_embeds + 1, 1, bias=False)

    def forward(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.conv_in(self.unshuffle(sample))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(recomputable(block), hidden_states)
            else:
                hidden_states = block(hidden_states)
        hidden_states = self.act_out(hidden_states)
        energy = self.conv_out(hidden_states).flatten()
        if self.class_out is not None and class_labels is not None:
            of_classes = self.class_out(hidden_states.mean((2, 3), keepdim=True)).flatten(1)
            energy = energy + of_classes.gather(1, class_labels[:, None]).flatten()
        return energy


class EnergyModel(ModelMixin, ConfigMixin):
    r"""
    A residual convolutional network f(x) that returns one energy per image.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods implemented for
    all models (such as downloading or saving). Construct it with keyword arguments only.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to `32`):
            Height and width of the images, in pixels: one number for squares, or `(height, width)`. Each is a multiple of
            `patch_size` * 2^(L - 1), with L the length of `block_out_channels`, and at least 4 px remain at the last resolution.
        in_channels (`int`, *optional*, defaults to `3`): Number of image channels, from 1 to 8192.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256, 256)`):
            Channels at each resolution, from 1 to 8192: from `sample_size / patch_size` down by halves.
        layers_per_block (`int`, *optional*, defaults to `1`):
            Number of residual blocks at each resolution, from 1 to 128.
        num_scales (`int`, *optional*, defaults to `1`):
            Number of networks, at most the length of `block_out_channels`. The energy is the sum of networks that see the image at
            full, half, quarter ... size. Each smaller scale drops one more leading entry of `block_out_channels`.
        act_fn (`str`, *optional*, defaults to `"leaky_relu"`):
            Activation function: `"leaky_relu"` (slope 0.2), `"silu"`, `"gelu"`, `"relu"` or `"mish"`. Under spectral norm, a slope
            near 1 preserves the energy's gradient through the layers.
        spectral_norm (`bool`, *optional*, defaults to `True`):
            Whether to divide each weight by its largest singular value (Miyato et al. 2018), which bounds the slope of the energy
            and the drift of the chain.
        num_class_embeds (`int`, *optional*):
            Number of classes, from 1 to 8192. The energy is f(x) + <e_c, h(x)>, with an embedding e_c per class and the mean h(x) of
            the last features (projection, Miyato and Koyama 2018, arXiv 1802.05637). One more embedding, of label
            `num_class_embeds`, stands for an unknown class. By default, the model has no classes.
        patch_size (`int`, *optional*, defaults to `1`):
            1, 2 or 4. Squares of this many pixels per side become the channels of one pixel (`nn.PixelUnshuffle`).

    Raises:
        ValueError: if an argument is outside the range given above.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EnergyResidualBlock"]
    _repeated_blocks = ["EnergyResidualBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256),
        layers_per_block: int = 1,
        num_scales: int = 1,
        act_fn: str = "leaky_relu",
        spectral_norm: bool = True,
        num_class_embeds: int | None = None,
        patch_size: int = 1,
    ):
        super().__init__()
        for name, values, limit in (
            ("in_channels", [in_channels], MAX_CHANNELS),
            ("block_out_channels", block_out_channels, MAX_CHANNELS),
            ("layers_per_block", [layers_per_block], MAX_LAYERS_PER_BLOCK),
            ("num_class_embeds", [1 if num_class_embeds is None else num_class_embeds], MAX_CHANNELS),
        ):
            if not all(1 <= value <= limit for value in values):
                raise ValueError(f"`{name}` must be from 1 to {limit}, but is {values}.")
        if patch_size not in (1, 2, 4):
            raise ValueError(f"`patch_size` must be 1, 2 or 4, but is {patch_size}.")
        if not block_out_channels:
            raise ValueError(f"`block_out_channels` must have at least one entry, but is {block_out_channels}.")
        multiple = patch_size * 2 ** (len(block_out_channels) - 1)
        check_sample_size(sample_size, multiple, 4 * multiple)
        height, width = height_and_width(sample_size)
        # As JSON stores it: squares stay one number, as in configs of earlier versions.
        self.register_to_config(sample_size=height if height == width else [height, width])
        if not 1 <= num_scales <= len(block_out_channels):
            raise ValueError(f"`num_scales` must be from 1 to {len(block_out_channels)}, but is {num_scales}.")
        self.networks = nn.ModuleList(EnergyNetwork(self.config, scale) for scale in range(num_scales))
        if spectral_norm:
            for module in self.networks.modules():
                if isinstance(module, EnergyConv2d):
                    module.apply_spectral_norm()

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

    def prepare_labels(self, class_labels: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor | None:
        """Return one label per image, as [`AutoencoderEC.prepare_labels`] does."""
        if self.config.num_class_embeds is None:
            if class_labels is not None:
                raise ValueError("`class_labels` must be None: the model has no classes (`num_class_embeds` is None).")
            return None
        if class_labels is None:
            return torch.full((len(sample),), self.config.num_class_embeds, device=sample.device)
        if class_labels.shape != sample.shape[:1] or class_labels.is_floating_point():
            found = f"{class_labels.dtype} of shape {tuple(class_labels.shape)}"
            raise ValueError(f"`class_labels` must be integers of shape ({len(sample)},), but are {found}.")
        return class_labels.to(sample.device, torch.int64)

    def forward(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> EnergyModelOutput | tuple[torch.Tensor]:
        """
        Return the energy of images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            class_labels (`torch.Tensor` of shape `(batch_size,)`, integers, *optional*):
                Class labels from 0 to `num_class_embeds`. The last one is the unknown class, and the default.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`EnergyModelOutput`] instead of a plain tuple.

        Returns:
            [`EnergyModelOutput`] with one float32 energy per image, shape `(batch_size,)`.

        Raises:
            ValueError: if the shape of `sample`, or the shape or dtype of `class_labels`, does not fit the model.
        """
        expected = (self.config.in_channels, *height_and_width(self.config.sample_size))
        if sample.shape[1:] != expected:
            raise ValueError(f"Images of `sample` must have shape {expected}, but `sample` has {tuple(sample.shape)}.")
        labels = self.prepare_labels(class_labels, sample)
        given = () if labels is None else (labels,)
        energy = self.networks[0](sample, *given).float()
        for scale in range(1, len(self.networks)):
            energy = energy + self.networks[scale](F.avg_pool2d(sample, 2**scale), *given).float()
        if not return_dict:
            return (energy,)
        return EnergyModelOutput(energy=energy)
