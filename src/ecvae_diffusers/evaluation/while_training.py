# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measures samples against training images during training, sharded over processes, and tracks the best model."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ecvae_diffusers.command import why_missing
from ecvae_diffusers.figures import why_no_frechet_distance
from ecvae_diffusers.grid import display_scale
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.run.log import progress
from ecvae_diffusers.training.run.pictures import image_grid, save_atomically, step_file


if TYPE_CHECKING:
    from ecvae_diffusers.metrics import FeatureExtractor


logger = get_logger(__name__)

NUM_NEIGHBOUR_ROWS = 8
NUM_NEIGHBOURS = 5


def load_features(name: str, device: torch.device, argument: str = "evaluation_features") -> "FeatureExtractor":
    """
    Load the feature extractor that `--evaluation_features`, or another `argument`, names. Raises `ValueError` if it can't
    be loaded, and `ImportError` if a package is missing.
    """
    from ecvae_diffusers.metrics import FeatureExtractor, InceptionFeatures, lite0_features, transformers_features
    from ecvae_diffusers.training.data.digits import SIZE, train_digit_features

    if name == "lite0":
        return lite0_features().to(device)
    if name == "digits":
        network, _ = train_digit_features()
        title = f"{network.num_features} features of a digit classifier at {SIZE} px"
        # The classifier scales bytes itself, so this `std` leaves them as they are.
        return FeatureExtractor(network, title, SIZE, mean=0.0, std=1 / 255, num_channels=1).to(device)
    if name == "inception":
        return InceptionFeatures().to(device)
    refused = f"--{argument} must be 'lite0', 'digits', 'inception' or a vision model of transformers, but {name!r}"
    if (reason := why_missing(name, "model")) is not None:
        raise ValueError(f"{refused} can't be loaded: {reason}.")
    try:
        return transformers_features(name).to(device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error


def neighbours_grid(
    samples: torch.Tensor, generated: torch.Tensor, real: torch.Tensor, reference: torch.Tensor
) -> PIL.Image.Image:
    """
    Return a grid with one row per sample, magnified if they are small: the sample, then the reference images nearest to it in features.

    `samples` (N, C, H, W) and `reference` (M, C, H, W) are uint8. `generated` has the features of the samples, possibly
    followed by others, and `real` those of the reference.
    """
    from ecvae_diffusers.metrics import nearest_neighbours

    _, nearest = nearest_neighbours(generated[: len(samples)].float(), real.float(), NUM_NEIGHBOURS)
    images = torch.cat([samples[:, None].cpu(), reference[nearest.cpu()]], dim=1)
    return image_grid(to_range(images.flatten(0, 1)), 1 + NUM_NEIGHBOURS, display_scale(*samples.shape[-2:]))


class Evaluator:
    """
    Measures `num_samples` samples of a task against as many training images of a feed. Each process takes a share.
    `metric` names the distance that decides which evaluation is the best: the Frechet distance, or the kernel distance
    if there are too few images for a Frechet distance.
    """

    def __init__(
        self, accelerator: Accelerator, feed, task, *, features: str, num_samples: int, batch_size: int, seed: int
    ):
        from ecvae_diffusers.metrics import GenerationMetrics
        from ecvae_diffusers.metrics.generation import MAX_KEPT_FEATURES

        self.accelerator, self.task, self.batch_size = accelerator, task, batch_size
        self.reference = feed.reference(num_samples)
        latents = task.latents(num_samples, seed + 1)
        if (fewest := min(len(self.reference), len(latents))) < NUM_NEIGHBOURS + 2:
            raise ValueError(
                f"--evaluation_steps requires at least {NUM_NEIGHBOURS + 2} training images and as many "
                f"--evaluation_samples, but the fewer of both are {fewest}."
            )
        network = load_features(features, accelerator.device)
        try:
            num_features = network(self.reference[:1]).shape[1]
        except ValueError as error:  # fail now, not at the first evaluation
            raise ValueError(f"--evaluation_features {features!r} doesn't fit the data: {error}") from error
        self.metrics = GenerationMetrics(network, num_neighbours=NUM_NEIGHBOURS)
        limit = MAX_KEPT_FEATURES // accelerator.num_processes
        # The images whose features the metrics keep, in the same order.
        self.kept_reference = torch.cat([p[:limit] for p in self.reference.tensor_split(accelerator.num_processes)])
        self.latents, labels = self.share(latents), task.labels(num_samples, seed + 1)
        self.labels = None if labels is None else self.share(labels)
        self.metric = "frechet_distance"
        if (why := why_no_frechet_distance(len(self.reference), len(latents), num_features)) is not None:
            self.metric = "kernel_distance"
            logger.warning(
                f"No Frechet distance: {why} The kernel distance decides which model is the best. See --evaluation_samples."
            )

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]

    @torch.no_grad()
    def measure(self, exported: torch.nn.Module, output_dir: Path, step: int) -> dict[str, float | None]:
        """Return the measures of `GenerationMetrics` in every process. The main process writes a picture to `neighbours/`."""
        device, main_process = self.accelerator.device, self.accelerator.is_main_process
        if not self.metrics.counts[True]:
            for images in self.share(self.reference).split(self.batch_size):
                self.metrics.update(images.to(device), real=True)
        shown: list[torch.Tensor] = []
        classes = itertools.repeat(None) if self.labels is None else self.labels.to(device).split(self.batch_size)
        batches = progress("Evaluation", self.latents.split(self.batch_size), shown=main_process)
        for latents, labels in zip(batches, classes):
            samples = to_uint8(self.task.sample(exported, latents.to(device), labels))
            self.metrics.update(samples, real=False)
            shown += samples[: NUM_NEIGHBOUR_ROWS - len(shown)]
        measures = self.metrics.compute()
        real, generated = self.metrics.kept.compute()
        if main_process:
            grid = neighbours_grid(torch.stack(shown), generated, real, self.kept_reference)
            save_atomically(grid, step_file(output_dir, "neighbours", step))
        self.metrics.reset(keep_real=True)
        return measures


class Patience:
    """
    Remembers the evaluation with the lowest `metric` and the evaluations since then. A run is over after `patience`
    evaluations without improvement.
    """

    def __init__(self, metric: str, patience: int | None):
        self.metric, self.patience = metric, patience
        self.best = math.inf
        self.best_step = 0
        self.since: list[int] = []

    def is_best(self, measures: dict[str, float | None], step: int) -> bool:
        """Record an evaluation and return whether it is the best so far. One that is `None` or NaN never is."""
        value = measures[self.metric]
        if value is None or not value < self.best:
            self.since.append(step)
            return False
        self.best, self.best_step, self.since = value, step, []
        return True

    def cut(self, last_step: int) -> None:
        """Forget evaluations after `last_step`, to which the run goes back, except the best one, whose model was saved."""
        self.since = [step for step in self.since if step <= last_step]

    @property
    def has_best(self) -> bool:
        return self.best < math.inf

    @property
    def is_over(self) -> bool:
        return self.patience is not None and len(self.since) >= self.patience

    @property
    def outcome(self) -> str:
        """The reason and the saved model, in words, of a run that is stopped early."""
        count = len(self.since)
        if not self.has_best:
            return f"{self.metric} was not a number in any of {count} evaluations: the last model is saved"
        return f"{self.metric} has not improved for {count} evaluations: the model of step {self.best_step} is saved"

    def state_dict(self) -> dict:
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "since": list(self.since)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved state. A state with another metric, which version 0.1 allowed, can't be compared: it is ignored."""
        if state_dict.get("metric", self.metric) == self.metric:
            self.best, self.best_step, self.since = (state_dict[name] for name in ("best", "best_step", "since"))
