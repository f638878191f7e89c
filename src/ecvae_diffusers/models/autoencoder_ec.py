# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""The variational autoencoder of EC-VAE: a convolutional encoder, and a decoder that generates an image in one pass.

.. math::
    q(z \mid x) = \mathcal N(\mu(x), \operatorname{diag} \sigma^2(x)), \qquad x = G(z), \quad z \sim \mathcal N(0, I)

This file imports only torch and diffusers, so that it can be on the Hub next to its weights.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils._pytree as pytree
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook


# Below this longer side, the receptive field of a decoder block covers the image, and excitation adds nothing.
SKIP_EXCITATION_MIN_SIZE = 128
MAX_IN_CHANNELS = 16
# Bounds far above any practical use, so that a downloaded config can't exhaust the memory.
MAX_SAMPLE_SIZE, MAX_CHANNELS, MAX_LAYERS_PER_BLOCK = 8192, 8192, 128


def unflatten_posterior(values: Iterable, names: list[str]) -> DiagonalGaussianDistribution:
    posterior = object.__new__(DiagonalGaussianDistribution)
    vars(posterior).update(zip(names, values))
    return posterior


# `torch.export` flattens outputs into tensors. diffusers registers its output classes for that, but not this distribution.
if DiagonalGaussianDistribution not in pytree.SUPPORTED_NODES:
    pytree.register_pytree_node(
        DiagonalGaussianDistribution,
        lambda posterior: (list(vars(posterior).values()), list(vars(posterior))),
        unflatten_posterior,
        serialized_type_name="diffusers.models.autoencoders.vae.DiagonalGaussianDistribution",
    )


@dataclass
class AutoencoderECOutput(BaseOutput):
    """
    Output of [`AutoencoderEC`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The reconstruction, in [-1, 1].
        latent_dist (`DiagonalGaussianDistribution`):
            The posterior q(z|x), whose mean and log-variance have shape `(batch_size, latent_channels, 1, 1)`.
        prior_sample (`torch.Tensor` of shape `(num_prior_samples, num_channels, height, width)`, *optional*):
            The images decoded from `prior_latents`, in [-1, 1]. `None` if none were given.
        extra_latent_dist (`DiagonalGaussianDistribution`, *optional*):
            The posterior of `extra_sample`. `None` if none was given.
    """

    # All fields but the first have defaults, because Accelerate rebuilds outputs from a single mapping under mixed precision.
    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution | None = None
    prior_sample: torch.Tensor | None = None
    extra_latent_dist: DiagonalGaussianDistribution | None = None


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


class ClassNorm(nn.Module):
    """A normalization whose output is scaled and shifted by class: norm(x) (1 + scale_c) + shift_c. Scale and shift start at 0."""

    def __init__(self, channels: int, config: FrozenDict):
        super().__init__()
        self.norm = get_norm(channels, config)
        self.embedding = nn.Embedding(config.num_class_embeds + 1, 2 * channels)
        nn.init.zeros_(self.embedding.weight)

    def forward(self, hidden_states: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        scale, shift = self.embedding(class_labels)[:, :, None, None].chunk(2, dim=1)
        return self.norm(hidden_states) * (1 + scale) + shift


def get_class_norm(channels: int, config: FrozenDict) -> nn.Module:
    return get_norm(channels, config) if config.num_class_embeds is None else ClassNorm(channels, config)


def normalize(norm: nn.Module, hidden_states: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
    return norm(hidden_states, class_labels) if isinstance(norm, ClassNorm) else norm(hidden_states)


def get_norm(channels: int, config: FrozenDict) -> nn.Module:
    if config.norm_type == "batch":
        return nn.BatchNorm2d(channels)
    # At least four channels per group: with one, group normalization would be instance normalization.
    return nn.GroupNorm(math.gcd(config.norm_num_groups, channels, max(channels // 4, 1)), channels)


class ResidualBlock(nn.Module):
    """Two pre-activated 3x3 convolutions with a shortcut, at one resolution."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict, get_norm: Callable = get_norm):
        super().__init__()
        self.norm1 = get_norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = get_norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = get_activation(config.act_fn)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        residual = self.conv1(self.act(normalize(self.norm1, hidden_states, class_labels)))
        residual = self.conv2(self.act(normalize(self.norm2, residual, class_labels)))
        return self.shortcut(hidden_states) + residual


class GatedUpsample(nn.Module):
    """A gated convolution (the second half of its channels gates the first) with a shortcut, then upsampling by 2.

    Upsampling is bilinear and comes last, where it costs least. Nearest-neighbour upsampling gives neighbouring pixels the same
    inputs, and a transposed convolution gives them different numbers of inputs. Both leave a grid. The energy model would detect
    it first, and the decoder would spend its training on it.
    """

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        self.norm = get_class_norm(in_channels, config)
        self.act = get_activation(config.act_fn)
        self.conv = nn.Conv2d(in_channels, 2 * out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        residual = F.glu(self.conv(self.act(normalize(self.norm, hidden_states, class_labels))), dim=1)
        return F.interpolate(self.shortcut(hidden_states) + residual, scale_factor=2.0, mode="bilinear")


class SkipLayerExcitation(nn.Module):
    """Channel gates for a high resolution, computed from a low one (Liu et al. 2021, arXiv 2101.04775, section 3.1)."""

    def __init__(self, low_channels: int, high_channels: int, act_fn: str):
        super().__init__()
        self.conv1 = nn.Conv2d(low_channels, high_channels, 4)
        self.act = get_activation(act_fn)
        self.conv2 = nn.Conv2d(high_channels, high_channels, 1)

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        gate = self.conv2(self.act(self.conv1(F.adaptive_avg_pool2d(low, 4))))
        return high * torch.sigmoid(gate)


class DecoderBlock(nn.Sequential):
    """The layers of one resolution of the decoder."""

    def forward(self, hidden_states: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self:
            hidden_states = layer(hidden_states, class_labels)
        return hidden_states


class ECEncoder(nn.Module):
    """The encoder. Maps images (B, C, H, W) and class labels (B,) to moments (B, 2d, 1, 1)."""

    _gradient_checkpointing_func: Callable

    def __init__(self, config: FrozenDict):
        super().__init__()
        self.gradient_checkpointing = False
        channels, patch = config.block_out_channels[0], config.patch_size
        self.unshuffle = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.conv_in = nn.Conv2d(config.in_channels * patch**2, channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        for i, out_channels in enumerate(config.block_out_channels):
            layers: list[nn.Module] = [nn.Conv2d(channels, channels, 4, stride=2, padding=1)] if i > 0 else []
            for _ in range(config.layers_per_block):
                layers.append(ResidualBlock(channels, out_channels, config))
                channels = out_channels
            self.blocks.append(nn.Sequential(*layers))
        self.class_embedding = None
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds + 1, channels)
            nn.init.zeros_(self.class_embedding.weight)
        self.norm_out = get_norm(channels, config)
        self.act_out = get_activation(config.act_fn)
        # The kernel covers the last feature map, so this is a linear layer with a 4-D output.
        height, width = (side // patch >> len(self.blocks) - 1 for side in height_and_width(config.sample_size))
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, (height, width))

    def forward(self, sample: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.conv_in(self.unshuffle(sample))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        if self.class_embedding is not None:
            hidden_states = hidden_states + self.class_embedding(class_labels)[:, :, None, None]
        return self.conv_out(self.act_out(self.norm_out(hidden_states)))


class ECDecoder(nn.Module):
    """The decoder. Maps latents (B, d, 1, 1) and class labels (B,) to images (B, C, H, W) in [-1, 1]."""

    _gradient_checkpointing_func: Callable

    def __init__(self, config: FrozenDict):
        super().__init__()
        self.gradient_checkpointing = False
        channels, patch = config.block_out_channels[-1], config.patch_size
        num_levels = len(config.block_out_channels)
        height, width = (side // patch >> num_levels - 1 for side in height_and_width(config.sample_size))
        self.conv_in = nn.ConvTranspose2d(config.latent_channels, channels, (height, width))
        self.blocks = nn.ModuleList()
        self.excitations = nn.ModuleDict()
        channels_at: list[int] = []  # per level
        for i, out_channels in enumerate(reversed(config.block_out_channels)):
            layers: list[nn.Module] = [GatedUpsample(channels, out_channels, config)] if i > 0 else []
            for _ in range(config.layers_per_block):
                layers.append(ResidualBlock(out_channels, out_channels, config, get_class_norm))
            self.blocks.append(DecoderBlock(*layers))
            channels = out_channels
            channels_at.append(channels)
            if i >= 4 and max(height, width) << i >= SKIP_EXCITATION_MIN_SIZE:
                self.excitations[str(i)] = SkipLayerExcitation(channels_at[i - 4], channels, config.act_fn)
        self.norm_out = get_class_norm(channels, config)
        self.act_out = get_activation(config.act_fn)
        self.conv_out = nn.Conv2d(channels, config.in_channels * patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch) if patch > 1 else nn.Identity()

    def forward(self, latents: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.conv_in(latents)
        outputs: list[torch.Tensor | None] = []
        for i, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, class_labels)
            else:
                hidden_states = block(hidden_states, class_labels)
            if str(i) in self.excitations:
                # The output of four blocks earlier, at 1/16 of this resolution.
                hidden_states = self.excitations[str(i)](outputs[i - 4], hidden_states)
            outputs.append(hidden_states if self.excitations else None)
        hidden_states = self.conv_out(self.act_out(normalize(self.norm_out, hidden_states, class_labels)))
        return torch.tanh(self.shuffle(hidden_states))


class AutoencoderEC(ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    The variational autoencoder of EC-VAE (Luo et al., ECCV 2024, arXiv 2311.04071). Its decoder is also the generator: it maps a
    latent vector from N(0, I) to an image in one pass.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods implemented for
    all models (such as downloading or saving). Construct it with keyword arguments only, because
    `from_config` loses positional ones.

    Parameters:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to `32`):
            Height and width of the images, in pixels: one number for squares, or `(height, width)`. Each is a multiple of
            `patch_size` * 2^(L - 1), with L the length of `block_out_channels`, and at least 4 px remain at the last resolution.
        in_channels (`int`, *optional*, defaults to `3`):
            Number of image channels, from 1 to 16: 1 is gray, 3 RGB and 4 RGBA. Others, such as bands of a satellite, have no
            pictures of PIL.
        latent_channels (`int`, *optional*, defaults to `128`):
            The dimension d of the latent vector, from 1 to 8192. Latents have shape `(batch_size, latent_channels, 1, 1)`.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 128, 256, 256)`):
            Channels at each resolution, from 1 to 8192: the first entry at `sample_size / patch_size`, each further one at half
            the size. A linear layer connects the last resolution to the latents.
        layers_per_block (`int`, *optional*, defaults to `1`):
            Number of residual blocks at each resolution, from 1 to 128.
        norm_type (`str`, *optional*, defaults to `"group"`):
            `"group"` or `"batch"`. Batch normalization sees posterior and prior batches in turn, so its running statistics fit
            neither, and diffusers' `EMAModel` does not keep them.
        norm_num_groups (`int`, *optional*, defaults to `8`):
            Upper bound on the number of groups of group normalization. Fewer are used if a group would have fewer than four
            channels, or groups would differ in size.
        act_fn (`str`, *optional*, defaults to `"silu"`):
            Activation function: `"silu"`, `"gelu"`, `"relu"` or `"mish"`.
        reconstruction_variance (`float`, *optional*):
            Mean squared error per pixel of the reconstructions, for images in [-1, 1]. Training measures it and writes it here;
            restoration uses it as the variance of the model's error.
        reconstruction_spectrum (`list[float]`, *optional*):
            How that error spreads over frequencies, with mean 1 (see `model_error.py`). Training measures it too; restoration needs
            it for its uncertainty. By default, all frequencies have the same error.
        posterior_directions (`list[list[float]]`, *optional*):
            The first principal directions of the training images' posterior means, each as long as its standard deviation. Training
            measures them; `ECVAEPipeline.principal_directions` returns them.
        num_class_embeds (`int`, *optional*):
            Number of classes, from 1 to 8192. The decoder scales and shifts its normalizations by class, and the encoder adds
            an embedding to its last feature map. One more embedding, of label `num_class_embeds`, stands for an unknown class.
            By default, the model has no classes.
        id2label (`dict[str, str]`, *optional*):
            The name of each class. The keys are the class numbers as strings.
        class_frequencies (`list[float]`, *optional*):
            The share of each class in the training data. Pipelines draw classes by it. By default, all are equally frequent.
        patch_size (`int`, *optional*, defaults to `1`):
            1, 2 or 4. The networks treat squares of this many pixels per side as the channels of one pixel (`nn.PixelUnshuffle`).
            2 cuts the time spent at the highest resolution to a quarter.

    Raises:
        ValueError: if an argument is outside the range given above.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "GatedUpsample", "SkipLayerExcitation"]
    _repeated_blocks = ["ResidualBlock", "GatedUpsample"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        latent_channels: int = 128,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256),
        layers_per_block: int = 1,
        norm_type: str = "group",
        norm_num_groups: int = 8,
        act_fn: str = "silu",
        reconstruction_variance: float | None = None,
        reconstruction_spectrum: list[float] | None = None,
        num_class_embeds: int | None = None,
        id2label: dict[str, str] | None = None,
        class_frequencies: list[float] | None = None,
        patch_size: int = 1,
        posterior_directions: list[list[float]] | None = None,
    ):
        super().__init__()
        for name, values, limit in (
            ("in_channels", [in_channels], MAX_IN_CHANNELS),
            ("latent_channels", [latent_channels], MAX_CHANNELS),
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
        if norm_type not in ("group", "batch"):
            raise ValueError(f"`norm_type` must be 'group' or 'batch', but is {norm_type!r}.")
        spectrum = reconstruction_spectrum
        if spectrum is not None and not (spectrum and min(spectrum) >= 0 and 0 < sum(spectrum) < math.inf):
            raise ValueError(f"`reconstruction_spectrum` must be finite, at least 0 and not all 0, but is {spectrum}.")
        if id2label is not None and sorted(id2label) != sorted(map(str, range(num_class_embeds or 0))):
            raise ValueError(
                f"`id2label` must have the keys '0' to '{(num_class_embeds or 0) - 1}', but is {id2label}."
            )
        shares = class_frequencies
        if shares is not None and not (
            len(shares) == num_class_embeds and min(shares) >= 0 and 0 < sum(shares) < math.inf
        ):
            allowed = f"{num_class_embeds or 0} finite numbers of at least 0, not all 0"
            raise ValueError(f"`class_frequencies` must be {allowed}, but is {shares}.")
        self.encoder, self.decoder = ECEncoder(self.config), ECDecoder(self.config)
        self.use_slicing = False

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

    def prepare_labels(self, class_labels: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor | None:
        """
        Return one label per item of `sample`, shape (B,), int64: those given, or the unknown class. Return `None` for a model without
        classes. Raises `ValueError` if labels have the wrong shape or dtype, or are given to a model without classes.
        """
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

    def join_labels(self, *parts: tuple[torch.Tensor | None, torch.Tensor]) -> torch.Tensor | None:
        labels = [label for pair in parts if (label := self.prepare_labels(*pair)) is not None]
        return torch.cat(labels) if labels else None

    def apply_in_slices(
        self, network: nn.Module, sample: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        labels = self.prepare_labels(class_labels, sample)
        if not self.use_slicing:
            return network(sample) if labels is None else network(sample, labels)
        parts = [[part] for part in sample.split(1)]
        if labels is not None:
            parts = [[*part, label] for part, label in zip(parts, labels.split(1))]
        return torch.cat([network(*part) for part in parts])

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True, class_labels: torch.Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """
        Encode images into their posterior.

        Args:
            x (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`AutoencoderKLOutput`] instead of a plain tuple.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, integers, *optional*):
                Class labels from 0 to `num_class_embeds`. The last one is the unknown class, and the default.

        Returns:
            [`AutoencoderKLOutput`] whose `latent_dist` has moments of shape `(batch_size, latent_channels, 1, 1)`.

        Raises:
            ValueError: if the shape of `x`, or the shape or dtype of `class_labels`, does not fit the model.
        """
        expected = (self.config.in_channels, *height_and_width(self.config.sample_size))
        if x.shape[1:] != expected:
            raise ValueError(f"Each image of `x` must have shape {expected}, but `x` has {tuple(x.shape)}.")
        moments = self.apply_in_slices(self.encoder, x, class_labels)
        if torch.is_autocast_enabled(x.device.type):
            moments = moments.float()  # the KL divergence sums small differences
        posterior = DiagonalGaussianDistribution(moments)
        if not return_dict:
            return (posterior,)
        return AutoencoderKLOutput(latent_dist=posterior)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, class_labels: torch.Tensor | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode latents into images, in one pass.

        Args:
            z (`torch.Tensor` of shape `(batch_size, latent_channels, 1, 1)`): Latents. Draws from N(0, I) give new images.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`DecoderOutput`] instead of a plain tuple.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, integers, *optional*): As for `encode`.

        Returns:
            [`DecoderOutput`] whose `sample` has shape `(batch_size, in_channels, height, width)`, in
            [-1, 1].

        Raises:
            ValueError: if the shape of `z`, or the shape or dtype of `class_labels`, does not fit the model.
        """
        expected = (self.config.latent_channels, 1, 1)
        if z.shape[1:] != expected:
            raise ValueError(f"Each latent of `z` must have shape {expected}, but `z` has {tuple(z.shape)}.")
        sample = self.apply_in_slices(self.decoder, z, class_labels)
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

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
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        prior_latents: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        extra_sample: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        prior_class_labels: torch.Tensor | None = None,
        extra_class_labels: torch.Tensor | None = None,
    ) -> AutoencoderECOutput | tuple:
        """
        Reconstruct images, and generate new ones in the same pass. A training step then needs only `forward`, the one method whose
        gradients distributed wrappers synchronize.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether to draw z from q(z|x) (reparameterised) instead of taking its mean.
            prior_latents (`torch.Tensor` of shape `(num_prior_samples, latent_channels, 1, 1)`, *optional*):
                Draws from N(0, I) to decode.
            posterior_noise (`torch.Tensor` of shape `(batch_size, latent_channels, 1, 1)`, *optional*):
                Standard normal draws for sampling the posterior. Drawn from `generator` if not given.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`AutoencoderECOutput`] instead of a plain tuple.
            generator (`torch.Generator`, *optional*): Makes the posterior's draws deterministic.
            extra_sample (`torch.Tensor` of shape `(num_extra, in_channels, height, width)`, *optional*):
                Further images in [-1, 1], which are encoded but not reconstructed.
            class_labels, prior_class_labels, extra_class_labels (`torch.Tensor`, integers, *optional*):
                The classes of `sample`, of `prior_latents` and of `extra_sample`, as for `encode`.

        Returns:
            [`AutoencoderECOutput`], or a tuple `(sample, latent_dist)`, followed by `prior_sample` and `extra_latent_dist` if
            `prior_latents` and `extra_sample` were given.
        """
        # One pass over both halves of a batch needs half the kernel launches, and uses every parameter exactly once.
        extra_posterior = prior_sample = None
        if extra_sample is None:
            posterior = self.encode(sample, class_labels=class_labels).latent_dist
        else:
            both = torch.cat([sample, extra_sample.to(sample)])
            labels = self.join_labels((class_labels, sample), (extra_class_labels, extra_sample))
            moments = self.encode(both, class_labels=labels).latent_dist.parameters
            parts = moments.split([len(sample), len(extra_sample)])
            posterior, extra_posterior = map(DiagonalGaussianDistribution, parts)
        if not sample_posterior:
            z = posterior.mode()
        elif posterior_noise is not None:
            z = posterior.mean + posterior.std * posterior_noise.to(posterior.mean)
        else:
            z = posterior.sample(generator=generator)
        if prior_latents is None:
            reconstruction = self.decode(z, class_labels=class_labels).sample
        else:
            labels = self.join_labels((class_labels, z), (prior_class_labels, prior_latents))
            images = self.decode(torch.cat([z, prior_latents.to(z)]), class_labels=labels).sample
            reconstruction, prior_sample = images.split([len(z), len(prior_latents)])
        if not return_dict:
            asked_for = tuple(part for part in (prior_sample, extra_posterior) if part is not None)
            return (reconstruction, posterior) + asked_for
        return AutoencoderECOutput(reconstruction, posterior, prior_sample, extra_posterior)
