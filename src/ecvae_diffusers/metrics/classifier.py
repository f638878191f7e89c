# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Features of a classifier that is trained on the data's own classes before it is used."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from ..checks import as_sample_size, size_as_text
from .features import FeatureExtractor


NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 2000, 64, 2e-3
NUM_FEATURES, LARGEST_WIDTH = 128, 128
# Augmentation: shifts of up to a sixteenth of the image's size, and noise with this standard deviation in 8-bit levels.
SHIFT, NOISE = 16, 6.0


def build_network(channels: int, height: int, width: int) -> nn.Sequential:
    """Build a convolutional network from images (B, C, H, W) to features (B, 128). H and W are at least 8."""
    layers: list[nn.Module] = []
    num_levels = int(math.log2(min(height, width))) - 2
    num_pixels = math.ceil(height / 2**num_levels) * math.ceil(width / 2**num_levels)
    for level in range(num_levels):
        wide = min(32 * 2**level, LARGEST_WIDTH)
        for stride in (1, 2):
            layers += [nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            channels = wide
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * num_pixels, NUM_FEATURES), nn.ReLU())


class ClassifierFeatures(FeatureExtractor):
    """
    Features of a classifier of labelled images, which is trained at construction. Training uses one thread and fixed
    seeds, so machines of the same kind get the same classifier.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`, uint8): Training images. H and W are at least 8.
        labels (`torch.Tensor` of shape `(N,)`): The class of each image, from 0.
        class_names (`list[str]`): The names of the classes.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: if there are fewer than two classes, or a side of the images is below 8 px.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, class_names: list[str], progress: bool = True):
        channels, height, width = images.shape[1:]
        if len(class_names) < 2:
            raise ValueError(f"`class_names` must hold at least two names, but is {class_names}.")
        if min(height, width) < 8:
            raise ValueError(f"`images` must have a height and width of at least 8 px, but have {height}x{width} px.")
        size = size_as_text(as_sample_size([height, width]))
        title = f"{NUM_FEATURES} features of a classifier of {len(class_names)} classes at {size}"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_network(channels, height, width)
            super().__init__(network, title, mean=0.5, std=0.5, num_channels=channels)
            self.head, self.class_names = nn.Linear(NUM_FEATURES, len(class_names)), class_names
            self.learn(images, labels, progress)
        torch.set_num_threads(threads)
        self.eval().requires_grad_(False)

    def learn(self, images: torch.Tensor, labels: torch.Tensor, progress: bool) -> None:
        self.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
        most = max(1, min(images.shape[2:]) // SHIFT)
        for _ in tqdm(range(NUM_STEPS), desc="Training the classifier", disable=not progress):
            chosen = torch.randint(len(images), (BATCH_SIZE,))
            down, right = torch.randint(-most, most + 1, (2,)).tolist()
            batch = images[chosen].float().roll((down, right), (2, 3))
            batch = (batch + NOISE * torch.randn_like(batch)) / 127.5 - 1
            loss = F.cross_entropy(self.head(self.network(batch)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return the likeliest class (N,) of each row of features (N, 128)."""
        return self.head(features.to(self.head.weight)).argmax(1)
