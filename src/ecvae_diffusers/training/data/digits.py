"""Write scikit-learn's handwritten digits as image folders, and measure samples with a classifier trained on them.

The 1,797 gray images are part of the scikit-learn wheel: real data without a download. They are resized from 8x8 to 16x16 px
(bicubic); 1,500 are for training, 297 are held out.
"""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from ecvae_diffusers.metrics import GenerationMetrics
from ecvae_diffusers.training.data.transforms import to_range


NUM_TRAIN = 1500
SIZE = 16


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all digits in a seeded order, uint8 (1797, 1, 16, 16), and their labels (1797,). The first 1,500 are for training."""
    from sklearn.datasets import load_digits as sklearn_digits

    pixels, labels = sklearn_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    images = [
        np.asarray(PIL.Image.fromarray(digit).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC))
        for digit in (pixels[order].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    ]
    return torch.from_numpy(np.stack(images)).unsqueeze(1), torch.from_numpy(labels[order])


def write_digits(folder: Path) -> None:
    """Write `train/` (1,500 images) and `test/` (297) as PNG files, with a sub-folder per class."""
    images, labels = load_digits()
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / ("train" if i < NUM_TRAIN else "test") / str(int(label)) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image[0].numpy()).save(path)


class DigitFeatures(nn.Module):
    """A small convolutional classifier that maps uint8 images (B, 1, 16, 16) to features (B, 64)."""

    num_features = 64

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * (SIZE // 4) ** 2, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(to_range(images.to(self.head.weight.device)))


def train_digit_features() -> tuple[DigitFeatures, float]:
    """
    Train the classifier on the 1,500 training digits with a little noise, on one thread: sums in another order would give another
    classifier with other distances.

    Returns:
        `tuple`: The classifier, and its accuracy on the 297 held-out digits.
    """
    images, labels = load_digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = DigitFeatures()
        optimizer = torch.optim.Adam(features.parameters(), lr=1e-3)
        for _ in tqdm(range(1000), desc="Training the classifier"):
            chosen = torch.randint(NUM_TRAIN, (64,))
            noisy = images[chosen] + 6.0 * torch.randn(64, 1, SIZE, SIZE)
            loss = F.cross_entropy(features.head(features(noisy)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    features.eval().requires_grad_(False)
    predicted = features.head(features(images[NUM_TRAIN:])).argmax(1)
    return features, (predicted == labels[NUM_TRAIN:]).float().mean().item()


def measure(features: DigitFeatures, real: torch.Tensor, generated: torch.Tensor) -> dict[str, float | None]:
    """Return Frechet and kernel distance, precision, recall, density and coverage of uint8 images (N, 1, 16, 16)."""
    metrics = GenerationMetrics(features)
    for images, is_real in ((real, True), (generated, False)):
        for batch in images.split(500):
            metrics.update(batch, real=is_real)
    return metrics.compute()


@torch.no_grad()
def sample_images(pipeline, num_images: int, seed: int, batch_size: int = 500) -> torch.Tensor:
    """Generate images with a pipeline, as uint8 (N, C, H, W), rounded as in PNG files."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in tqdm(range(0, num_images, batch_size), desc="Sampling"):
        images = pipeline(min(batch_size, num_images - start), generator=generator, output_type="pt").images
        batches.append((images * 255).round().to(torch.uint8).cpu())
    return torch.cat(batches)
