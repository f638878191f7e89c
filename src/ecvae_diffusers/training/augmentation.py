r"""
Adaptive augmentation of the images that an energy model sees.

With few images, an energy model memorizes them: held-out images then get higher energies than training images. Overfitting is measured by

.. math:: r = \frac{\mathbb E f(x_{\text{held out}}) - \mathbb E f(x_{\text{data}})}{\mathbb E f(G(z)) - \mathbb E f(x_{\text{data}})}

from the mean energies of held-out images, training images and samples. r is 0 without overfitting, and 1 if held-out images get the
energies of samples (r_v of Karras et al. 2020, arXiv 2006.06676). The probability p of augmentations starts at 0, rises while r is above
its target, and falls while r is below it.

The augmentations T are differentiable, and the same for data, samples and each step of a chain (Zhao et al. 2020, arXiv 2006.10738).
The chain follows the gradient of f(T(x)) with respect to x.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator

from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.randomness import StepNoise


# Target of the overfitting measure r.
TARGET = 0.5
# Number of training images over which p rises from 0 to 1, if r stays above its target.
RAMP = 100_000
# Steps between two measurements on held-out images, and the weight of the newest measurement in the running averages.
MEASURED_EVERY, LATEST = 8, 0.05
# The largest changes: brightness for images in [-1, 1]; translation and hole size as fractions of the image's sides.
BRIGHTNESS, TRANSLATION, CUTOUT = 0.5, 1 / 8, 1 / 2


@dataclass
class Augmentation:
    """
    Random changes for each image of a batch, in shapes that broadcast over images (B, C, H, W). Groups of changes that an image does not
    get have neutral values.
    """

    brightness: torch.Tensor
    saturation: torch.Tensor
    contrast: torch.Tensor
    translation: torch.Tensor  # (B, 2), in pixels
    hole: torch.Tensor  # (B, 2): the first row and column of the hole
    has_hole: torch.Tensor

    @classmethod
    def draw(cls, probability: float, images: torch.Tensor, noise: StepNoise) -> "Augmentation":
        """Draw changes for a batch of images. An image gets each group (colour, translation, hole) with `probability`."""
        count, sides = len(images), images.shape[2:]
        draws = noise.uniform(count, 10)
        colour, moved, cut = ((draws[:, i] < probability).float() for i in range(3))
        number = (count, 1, 1, 1)
        moves, holes = [], []
        for i, side in enumerate(sides):
            most = round(TRANSLATION * side)
            moves.append((draws[:, 6 + i] * (2 * most + 1)).floor() - most)
            # The center of the hole is uniform over the image, so a part of the hole may lie outside.
            holes.append((draws[:, 8 + i] * side).long() - round(CUTOUT * side) // 2)
        return cls(
            brightness=(2 * BRIGHTNESS * colour * (draws[:, 3] - 0.5)).view(number),
            saturation=(1 + colour * (2 * draws[:, 4] - 1)).view(number),
            contrast=(1 + colour * (draws[:, 5] - 0.5)).view(number),
            translation=(torch.stack(moves, dim=1) * moved[:, None]).long(),
            hole=torch.stack(holes, dim=1),
            has_hole=cut.bool(),
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Change images (B, C, H, W) in [-1, 1]. If several batches are concatenated, each gets the same changes."""
        return torch.cat([self.change(part) for part in images.split(len(self.has_hole))])

    def change(self, images: torch.Tensor) -> torch.Tensor:
        images = images + self.brightness
        gray = images.mean(1, keepdim=True)
        images = gray + self.saturation * (images - gray)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + self.contrast * (images - mean)
        count, _, height, width = images.shape
        rows = torch.arange(height, device=images.device) - self.translation[:, :1]
        columns = torch.arange(width, device=images.device) - self.translation[:, 1:]
        kept = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        index = torch.arange(count, device=images.device)[:, None, None]
        rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
        moved = images.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2)
        inside = []
        for start, side in zip(self.hole.unbind(1), (height, width)):
            place = torch.arange(side, device=images.device)
            inside.append((place >= start[:, None]) & (place < start[:, None] + round(CUTOUT * side)))
        hole = inside[0][:, :, None] & inside[1][:, None, :] & self.has_hole[:, None, None]
        return moved * (kept & ~hole)[:, None]


class AugmentedEnergy(nn.Module):
    """An energy model of augmented images, f(T(x))."""

    def __init__(self, energy_model: nn.Module, augmentation: Augmentation):
        super().__init__()
        self.energy_model, self.augmentation = energy_model, augmentation

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None):
        sample = self.augmentation(sample)
        return self.energy_model(sample) if condition is None else self.energy_model(sample, condition)


class AdaptiveAugmentation:
    """
    The probability p of augmentations, adapted to the overfitting r of the energy model.

    Args:
        is_adaptive (`bool`): Whether p follows r. If not, p stays 0 and r is only measured.
    """

    def __init__(self, is_adaptive: bool):
        self.is_adaptive, self.probability, self.num_looks = is_adaptive, 0.0, 0
        self.averages = torch.zeros(3)

    def draw(self, images: torch.Tensor, noise: StepNoise) -> Augmentation | None:
        """Draw the augmentations of a batch, or return `None` while p is 0."""
        return Augmentation.draw(self.probability, images, noise) if self.probability > 0 else None

    def update(self, energies: torch.Tensor, num_images: int) -> None:
        """
        Update r and p with one measurement.

        Args:
            energies (`torch.Tensor` of shape `(3,)`): Mean energies of training images, held-out images and samples. They must be
                the same in every process.
            num_images (`int`): Number of training images since the previous measurement.
        """
        self.num_looks += 1
        # The first measurements get equal weights.
        self.averages += max(LATEST, 1 / self.num_looks) * (energies.cpu() - self.averages)
        if self.is_adaptive:
            step = num_images / RAMP
            self.probability = min(max(self.probability + (step if self.overfitting > TARGET else -step), 0.0), 1.0)

    @property
    def overfitting(self) -> float:
        """The overfitting r. It is 0 if samples do not have higher energies than training images."""
        data, held_out, samples = self.averages.tolist()
        return (held_out - data) / (samples - data) if samples > data else 0.0

    def scalars(self) -> dict[str, float]:
        """Return the scalars to log."""
        found = {"overfitting": self.overfitting, "energy_held_out": self.averages[1].item()}
        return found | {"augmentation_probability": self.probability}

    def state_dict(self) -> dict:
        return {"probability": self.probability, "num_looks": self.num_looks, "averages": self.averages.clone()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.probability, self.num_looks = state_dict["probability"], state_dict["num_looks"]
        self.averages = state_dict["averages"].clone()


def augmented(
    adaptive: AdaptiveAugmentation | None, images: torch.Tensor, noise: StepNoise, *energy_models: Any
) -> tuple[Any, ...]:
    """Return the energy models, all with the same augmentations of a batch, or unchanged if the batch gets none."""
    augmentation = adaptive.draw(images, noise) if adaptive is not None else None
    if augmentation is None:
        return energy_models
    return tuple(AugmentedEnergy(energy_model, augmentation) for energy_model in energy_models)


@torch.no_grad()
def compare_with_held_out(
    accelerator: Accelerator,
    feed: Any,
    number: int,
    energy_model: nn.Module,
    data: torch.Tensor,
    samples: torch.Tensor,
) -> torch.Tensor:
    """
    Return the mean energies of data, of held-out images and of samples, averaged over processes.

    Args:
        number (`int`): Number of the held-out batch.
        data (`torch.Tensor` of shape `(B,)`), samples (`torch.Tensor` of shape `(B,)`): Energies of training images and of samples.
    """
    images, labels = feed.held_out_batch(number)
    with frozen(energy_model), accelerator.autocast():
        held_out = compute_energy(energy_model, to_range(images), labels)
    means = torch.stack([energies.float().mean() for energies in (data, held_out, samples)])
    return accelerator.reduce(means, reduction="mean")
