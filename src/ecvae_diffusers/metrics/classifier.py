# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Features of a classifier that is trained on the data's own classes before it is used."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from .features import FeatureExtractor


NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 2000, 64, 2e-3
NUM_FEATURES, LARGEST_WIDTH = 128, 128
# Augmentation: shifts of up to a sixteenth of the image's size, and noise with this standard deviation in 8-bit levels.
SHIFT, NOISE = 16, 6.0


def build_network(channels: int, size: int) -> nn.Sequential:
    """Build a convolutional network from images (B, C, S, S) to features (B, 128). S is a power of two, at least 8."""
    layers: list[nn.Module] = []
    for level in range(int(math.log2(size)) - 2):
        width = min(32 * 2**level, LARGEST_WIDTH)
        for stride in (1, 2):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, NUM_FEATURES), nn.ReLU())


class ClassifierFeatures(FeatureExtractor):
    """
    Features of a classifier of labelled images, which is trained at construction. Training uses one thread and fixed
    seeds, so machines of the same kind get the same classifier.

    Args:
        images (`torch.Tensor` of shape `(N, C, S, S)`, uint8): Training images. S is a power of two, at least 8.
        labels (`torch.Tensor` of shape `(N,)`): The class of each image, from 0.
        class_names (`list[str]`): The names of the classes.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: if there are fewer than two classes, or S is not a power of two of at least 8.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, class_names: list[str], progress: bool = True):
        channels, size = images.shape[1], images.shape[-1]
        if len(class_names) < 2:
            raise ValueError(f"`class_names` must hold at least two names, but is {class_names}.")
        if size < 8 or size & (size - 1):
            raise ValueError(f"`images` must have a size that is a power of two, at least 8 px, but have {size} px.")
        title = f"{NUM_FEATURES} features of a classifier of {len(class_names)} classes at {size} px"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_network(channels, size)
            super().__init__(network, title, size, mean=0.5, std=0.5, num_channels=channels)
            self.head, self.class_names = nn.Linear(NUM_FEATURES, len(class_names)), class_names
            self.learn(images, labels, progress)
        torch.set_num_threads(threads)
        self.eval().requires_grad_(False)

    def learn(self, images: torch.Tensor, labels: torch.Tensor, progress: bool) -> None:
        self.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
        most = max(1, images.shape[-1] // SHIFT)
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
