"""What the training loop needs to know of what it trains."""

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
    """Evaluation mode, without gradients, for as long as this is open."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


class Task(ABC):
    """What is trained: a generator whose samples can be calibrated, and the energy model, `None` without calibration."""

    generator: torch.nn.Module
    energy_model: torch.nn.Module | None
    latent_shape: tuple[int, ...]  # of one sample
    component: str  # the generator's name in the pipeline
    headline: str  # the scalar of `loss` that the progress bar shows
    saved_class: str  # loads what is saved
    published = INDEX  # the file that tells what a saved folder holds
    samples_change = True  # whether training changes samples, of which the best evaluation is chosen
    state: Any = None  # what else a checkpoint must hold: anything with `state_dict` and `load_state_dict`

    def prepare(self, accelerator: Accelerator) -> None:
        """Once, before the first step: the processes and the precision that the task computes with."""
        self.accelerator = accelerator

    def launch(self) -> dict:
        """What a run that is gone on with must have in common with what it was, beside its arguments and data."""
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
        In one pass through `network`, the wrapped generator: its own loss; new samples (B, C, H, W) with gradients, or
        `None` where they aren't asked for; and scalars to log, `headline` among them. `labels` are the classes of `real`, which
        the samples get too.
        """

    def draw(self, real: torch.Tensor, noise: StepNoise) -> torch.Tensor:
        """Latents of as many new samples as there are images in `real`, another draw at each call."""
        return noise.normal(len(real), *self.latent_shape)

    def latents(self, count: int, seed: int) -> torch.Tensor:
        """Latents of `count` samples, or of as many as there are, always the same for a seed."""
        return torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(seed))

    def labels(self, count: int, seed: int) -> torch.Tensor | None:
        """Classes of `count` samples, by their frequencies, always the same for a seed. `None` without classes."""
        return None

    @abstractmethod
    def sample(
        self, generator: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images in [-1, 1]. No gradient."""

    @abstractmethod
    def reconstruct(
        self, generator: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The generator's own version of images in [-1, 1]. No gradient."""

    @abstractmethod
    def build_pipeline(self, generator, energy_model, scheduler: LangevinScheduler | None) -> DiffusionPipeline:
        """The pipeline that is saved, or what is saved and loaded as one is."""

    def end_step(self) -> None:
        """After a step of the networks, in every process: what is the task's own, such as a dual variable."""

    def measure(self, generator: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
        """Measure, on the main process, what an evaluation states next to samples, on reference images: uint8 (N, C, H, W)."""
        return {}

    def finish(self, generator: torch.nn.Module, feed) -> None:
        """Measure, and write into the generator's config, what its pipeline should know."""
