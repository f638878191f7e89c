"""The interface between the training loop and the model that it trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ecvae_diffusers import LangevinScheduler
from ecvae_diffusers.hub.upload import INDEX
from ecvae_diffusers.training.randomness import StepNoise


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """A context in which `module` is in evaluation mode, without gradients."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


class Task(ABC):
    """A generator to train, whose samples can be calibrated, and its energy model (`None` without calibration)."""

    generator: torch.nn.Module
    energy_model: torch.nn.Module | None
    latent_shape: tuple[int, ...]  # of one sample
    component: str  # the generator's name in the pipeline
    headline: str  # the scalar of `loss` that the progress bar shows
    saved_class: str  # the class that loads the saved folder
    published = INDEX  # the file that identifies a saved folder
    samples_change = True  # whether training changes the samples, so that the best evaluation can be chosen
    state: Any = None  # further state for checkpoints: an object with `state_dict` and `load_state_dict`

    def prepare(self, accelerator: Accelerator) -> None:
        """Prepare the task for training with `accelerator`. Called once, before the first step."""
        self.accelerator = accelerator

    def launch(self) -> dict:
        """Return properties, other than arguments and data, that must be the same when the run is resumed."""
        return {}

    @abstractmethod
    def loss(
        self,
        network: torch.nn.Module,
        real: torch.Tensor,
        noise: StepNoise,
        step: int,
        with_samples: bool,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Compute the generator's own loss and new samples, in one pass through `network`.

        Args:
            network (`torch.nn.Module`): The generator, wrapped by Accelerate.
            real (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
            noise ([`StepNoise`]): The source of random draws.
            step (`int`): The number of the training step.
            with_samples (`bool`): Whether to make samples.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Classes of `real`, which the samples get too.

        Returns:
            `tuple`: The loss, samples (B, C, H, W) with gradients (or `None`), and scalars to log, which include `headline`.
        """

    def draw(self, real: torch.Tensor, noise: StepNoise) -> torch.Tensor:
        """Draw latents for as many new samples as there are images in `real`. Each call draws anew."""
        return noise.normal(len(real), *self.latent_shape)

    def latents(self, count: int, seed: int) -> torch.Tensor:
        """Return latents for at most `count` samples, always the same for a seed."""
        return torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(seed))

    def labels(self, count: int, seed: int) -> torch.Tensor | None:
        """Return classes (count,) drawn by their frequencies, always the same for a seed. `None` without classes."""
        return None

    @abstractmethod
    def sample(
        self, generator: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1] from latents, without gradients."""

    @abstractmethod
    def reconstruct(
        self, generator: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the generator's reconstructions of images in [-1, 1], without gradients."""

    @abstractmethod
    def build_pipeline(self, generator, energy_model, scheduler: LangevinScheduler | None) -> DiffusionPipeline:
        """Return the pipeline to save, or another object with `save_pretrained` and `from_pretrained`."""

    def end_step(self) -> None:
        """Update the task's own state, such as a dual variable. Called in every process after the networks' step."""

    def measure(self, generator: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
        """Return further measures of an evaluation, from reference images (N, C, H, W), uint8. Called on the main process."""
        return {}

    def finish(self, generator: torch.nn.Module, feed) -> None:
        """Measure what the pipeline needs to know about the generator, and write it into the generator's config."""
