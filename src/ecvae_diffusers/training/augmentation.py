r"""
Augmentations of all that an energy model sees, and how often they are needed.

With few pictures, an energy model learns them by heart: held-out pictures then get higher energies than those that it is trained on. Of
the average energies of training images, of held-out ones and of samples,

.. math:: r = \frac{\mathbb E f(x_{\text{held out}}) - \mathbb E f(x_{\text{data}})}{\mathbb E f(G(z)) - \mathbb E f(x_{\text{data}})}

is 0 without overfitting, and 1 where held-out images look to the energy model as samples do (r_v of Karras et al. 2020, arXiv
2006.06676). The probability p of augmentations starts at 0, rises while r is above its target, and falls while it is below.

The augmentations are differentiable, and the same ones for data, samples and each step of a chain (Zhao et al. 2020, arXiv 2006.10738):
the chain follows the gradient of f(T(x)) with respect to x.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator

from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.randomness import StepNoise


# The share r of overfitting that is aimed at.
TARGET = 0.5
# Images of training after which p has gone from 0 to 1, if r stays above its target.
RAMP = 100_000
# Steps between two looks at held-out images, and the weight of the latest look in the averages.
MEASURED_EVERY, LATEST = 8, 0.05
# The largest changes: brightness, in the range of images [-1, 1]; translation and cut-out, in parts of the image's side.
BRIGHTNESS, TRANSLATION, CUTOUT = 0.5, 1 / 8, 1 / 2


@dataclass
class Augmentation:
    """
    One draw of changes for each image of a batch, with shapes that broadcast over images (B, C, H, W). Groups of changes that an image
    does not get are neutral.
    """

    brightness: torch.Tensor
    saturation: torch.Tensor
    contrast: torch.Tensor
    translation: torch.Tensor  # (B, 2), in pixels
    hole: torch.Tensor  # (B, 2): the first row and column of the hole
    has_hole: torch.Tensor

    @classmethod
    def draw(cls, probability: float, images: torch.Tensor, noise: StepNoise) -> "Augmentation":
        """Draw changes for a batch of images. Each group (colour, translation, hole) comes with the probability."""
        count, size = len(images), images.shape[-1]
        draws = noise.uniform(count, 10)
        colour, moved, cut = ((draws[:, i] < probability).float() for i in range(3))
        number = (count, 1, 1, 1)
        most = round(TRANSLATION * size)
        moves = (draws[:, 6:8] * (2 * most + 1)).floor() - most
        return cls(
            brightness=(2 * BRIGHTNESS * colour * (draws[:, 3] - 0.5)).view(number),
            saturation=(1 + colour * (2 * draws[:, 4] - 1)).view(number),
            contrast=(1 + colour * (draws[:, 5] - 0.5)).view(number),
            translation=(moves * moved[:, None]).long(),
            # The middle of the hole is anywhere in the image.
            hole=(draws[:, 8:10] * size).long() - round(CUTOUT * size) // 2,
            has_hole=cut.bool(),
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Change images (B, C, H, W) in [-1, 1]. A second batch behind the first gets the same changes."""
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
        place, side = torch.arange(height, device=images.device), round(CUTOUT * height)
        inside = (place >= self.hole[..., None]) & (place < self.hole[..., None] + side)
        hole = inside[:, 0, :, None] & inside[:, 1, None, :] & self.has_hole[:, None, None]
        return moved * (kept & ~hole)[:, None]


class AugmentedEnergy(nn.Module):
    """f(T(x)): an energy model that sees augmented images."""

    def __init__(self, energy_model: nn.Module, augmentation: Augmentation):
        super().__init__()
        self.energy_model, self.augmentation = energy_model, augmentation

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None):
        sample = self.augmentation(sample)
        return self.energy_model(sample) if condition is None else self.energy_model(sample, condition)


class AdaptiveAugmentation:
    """
    The probability p of augmentations, by how far the energy model overfits.

    Args:
        is_adaptive (`bool`): Whether p follows r. If not, it stays 0, and r is only measured.
    """

    def __init__(self, is_adaptive: bool):
        self.is_adaptive, self.probability, self.num_looks = is_adaptive, 0.0, 0
        self.averages = torch.zeros(3)

    def draw(self, images: torch.Tensor, noise: StepNoise) -> Augmentation | None:
        """Draw the augmentations of a batch, `None` while p is 0."""
        return Augmentation.draw(self.probability, images, noise) if self.probability > 0 else None

    def update(self, energies: torch.Tensor, num_images: int) -> None:
        """
        Move p by one look.

        Args:
            energies (`torch.Tensor` of shape `(3,)`): Mean energies of training images, of held-out images and of samples, the
                same in every process.
            num_images (`int`): Images of training since the look before.
        """
        self.num_looks += 1
        # The first looks are averaged evenly.
        self.averages += max(LATEST, 1 / self.num_looks) * (energies.cpu() - self.averages)
        if self.is_adaptive:
            step = num_images / RAMP
            self.probability = min(max(self.probability + (step if self.overfitting > TARGET else -step), 0.0), 1.0)

    @property
    def overfitting(self) -> float:
        """r; 0 where samples do not have higher energies than the training images."""
        data, held_out, samples = self.averages.tolist()
        return (held_out - data) / (samples - data) if samples > data else 0.0

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
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
    """Return energy models that see a batch's augmentations, all the same ones, or as they are if it gets none."""
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
    """Return the mean energies of data, of the held-out batch of this number and of samples, the same in every process."""
    images, labels = feed.held_out_batch(number)
    with frozen(energy_model), accelerator.autocast():
        held_out = compute_energy(energy_model, to_range(images), labels)
    means = torch.stack([energies.float().mean() for energies in (data, held_out, samples)])
    return accelerator.reduce(means, reduction="mean")
