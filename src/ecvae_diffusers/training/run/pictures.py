"""Write the pictures of a run and the energies of its images, which `ecvae report` shows."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import nn

from ecvae_diffusers import EnergyCalibrator
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.grid import display_scale, lay_out, magnify, save_atomically
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.run.log import ENERGIES_FILE, RunLog, progress


if TYPE_CHECKING:
    from ecvae_diffusers.training.tasks.base import Task

NUM_GRID_IMAGES = 64
NUM_CHAIN_IMAGES = 8
NUM_ENERGIES, FEWEST_ENERGIES = 256, 32
# Above this resolution, fewer energies: chains on 256 images of 256 px take 15 GiB of memory.
FULL_SIZE = 32


class Observer:
    """
    A writer of pictures and energies on the main process: `samples/`, `reconstructions/`, `chain/` and lines of `energies.jsonl`.
    Latents and noise are the same at each step.

    Args:
        output_dir (`Path`): The folder of the run.
        task ([`Task`]): Draws latents and classes, samples and reconstructs.
        images (`torch.Tensor` of shape `(N, C, H, W)`, uint8): Data to reconstruct, and to compute energies of.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The classes of `images`.
        seed (`int`): Seed of latents, classes and noise.
        device (`torch.device`): The device of the networks.
        batch_size (`int`): Number of images per batch. That of training fits the memory.
    """

    def __init__(
        self,
        output_dir: Path,
        task: "Task",
        images: torch.Tensor,
        labels: torch.Tensor | None,
        seed: int,
        device: torch.device,
        batch_size: int,
    ):
        self.output_dir, self.task, self.seed, self.device = output_dir, task, seed, device
        self.batch_size, self.images, self.labels = batch_size, images, labels
        # The same number of pixels at each resolution.
        count = NUM_ENERGIES * FULL_SIZE**2 // math.prod(images.shape[2:])
        self.num_energies = max(FEWEST_ENERGIES, min(NUM_ENERGIES, count))
        count = max(NUM_GRID_IMAGES, self.num_energies)
        self.latents, self.sample_labels = task.latents(count, seed).to(device), task.labels(count, seed)
        if self.sample_labels is not None:
            # Sorted, so that the rows of the sheet show one class after another.
            shown, others = self.sample_labels[:NUM_GRID_IMAGES], self.sample_labels[NUM_GRID_IMAGES:]
            self.sample_labels = torch.cat([shown.sort().values, others])

    @torch.no_grad()
    def observe(
        self, step: int, exported: nn.Module, generator: nn.Module, calibrator: EnergyCalibrator | None, energies: bool
    ) -> None:
        """
        Write the pictures and, if asked to, the energies of a step.

        Args:
            step (`int`): The number of the step.
            exported (`nn.Module`): The generator that would be saved now, for samples and reconstructions.
            generator (`nn.Module`): The generator in training, for the chains.
            calibrator ([`EnergyCalibrator`], *optional*): Runs the chains. Without it there are neither chains nor energies.
            energies (`bool`): Whether to write energies, whose chains cost many times as much as the pictures.
        """
        latents = self.latents[:NUM_GRID_IMAGES]
        samples = self.in_batches(
            "Samples", lambda z, c: self.task.sample(exported, z, c), latents, self.sample_labels
        )
        self.save("samples", step, image_grid(samples, num_columns=8))
        images = to_range(self.images[: NUM_GRID_IMAGES // 2].to(self.device))
        reconstructions = self.in_batches(
            "Reconstructions", lambda x, c: self.task.reconstruct(exported, x, c), images, self.labels
        )
        self.save("reconstructions", step, pairs_grid(images, reconstructions))
        if calibrator is None:
            return
        noise = torch.Generator(device=self.device).manual_seed(self.seed)

        def run_chain(latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            samples = self.task.sample(generator, latents, labels)
            return calibrator.run_chain(samples, noise, return_trajectory=True, condition=labels).transpose(0, 1)

        # Whole batches even without energies, because the noise of a picture depends on the size of its batch.
        count = self.num_energies if energies else -(-NUM_CHAIN_IMAGES // self.batch_size) * self.batch_size
        latents = self.latents[: min(count, self.num_energies)]
        states = self.in_batches("Chains", run_chain, latents, self.sample_labels).transpose(0, 1)
        self.save("chain", step, chain_strip(states[:, :NUM_CHAIN_IMAGES]))
        if not energies:
            return
        model: Any = calibrator.energy_model  # a callable to users of the calibrator, but a module here
        whole = {"data": to_range(self.images[: self.num_energies].to(self.device))}
        whole |= {"samples": states[0], "targets": states[-1]}
        values = {}
        with frozen(model):
            for name, some in whole.items():
                labels = self.labels if name == "data" else self.sample_labels
                values[name] = self.in_batches("Energies", lambda x, c: compute_energy(model, x, c), some, labels)
        rounded = {name: [round(e, 5) for e in taken.tolist()] for name, taken in values.items()}
        RunLog(self.output_dir / ENERGIES_FILE).write(step=step, **rounded)

    def in_batches(
        self, what: str, function: Callable, whole: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply a function to batches and their labels (`None` without classes), and concatenate the results."""
        parts, classes = whole.split(self.batch_size), itertools.repeat(None)
        if labels is not None:
            classes = labels[: len(whole)].to(self.device).split(self.batch_size)
        return torch.cat([function(part, some) for part, some in zip(progress(what, parts), classes)])

    def save(self, kind: str, step: int, picture: PIL.Image.Image) -> None:
        """Write a picture, magnified if its images are small."""
        picture = magnify(picture, display_scale(*self.images.shape[-2:]))
        save_atomically(picture, step_file(self.output_dir, kind, step))


def pairs_grid(images: torch.Tensor, reconstructions: torch.Tensor, num_columns: int = 8) -> PIL.Image.Image:
    """Lay out rows of images, each above its reconstruction."""
    rows = zip(images.split(num_columns), reconstructions.split(num_columns))
    whole = [row for row in rows if len(row[0]) == num_columns] or [(images, reconstructions)]
    return image_grid(torch.cat([part for row in whole for part in row]), num_columns=len(whole[0][0]))


def chain_strip(states: torch.Tensor) -> PIL.Image.Image:
    """
    Lay out one row per image: G(z), the image after each step of the chain, and the change from start to end. The change is gray
    where it is 0, and scaled so that the largest one is black or white.

    Args:
        states (`torch.Tensor` of shape `(K + 1, B, C, H, W)`): In [-1, 1].
    """
    difference = states[-1] - states[0]
    difference = difference / difference.abs().max().clamp(min=1e-8)
    if difference.shape[1] == 4:
        difference[:, 3] = 1.0  # opaque, or the change would be invisible
    columns = torch.cat([states, difference[None]])
    return image_grid(columns.transpose(0, 1).flatten(0, 1), num_columns=len(columns))


def image_grid(images: torch.Tensor, num_columns: int, scale: int = 1) -> PIL.Image.Image:
    """
    Lay images out in rows, with a line of one pixel between them.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            In [-1, 1]. Of 2 channels the first is shown as gray, and of more than 4 the first three as RGB.
        num_columns (`int`): Images per row.
        scale (`int`, *optional*, defaults to 1): Whole-number magnification, without smoothing.
    """
    return lay_out(to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy(), num_columns, scale)


def step_file(output_dir: Path, kind: str, step: int) -> Path:
    return output_dir / kind / f"step-{step:06d}.png"
