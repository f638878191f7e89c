# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Compares generated images with real ones, by distances between two sets of features and by their overlap.

- **Frechet distance** (Heusel et al. 2017): :math:`|\mu_r - \mu_g|^2 + \operatorname{tr}(\Sigma_r + \Sigma_g
  - 2 (\Sigma_r \Sigma_g)^{1/2})`. Few samples bias it upwards. It is `None` for fewer images than features.
- **Kernel distance** (Binkowski et al. 2018): the unbiased squared MMD with the kernel
  :math:`(x^\top y / F + 1)^3`, as mean and standard deviation over subsets.
- **Precision, recall, density, coverage** (Naeem et al. 2020): overlaps of balls around each image that reach to its
  k-th nearest neighbour.

Distances come from `torchmetrics`, the neighbour measures from `prdc`.
"""

import contextlib
import io
import warnings

import torch
import torch.nn as nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from ..figures import why_no_frechet_distance


# Kernel and neighbour measures keep features in memory and compare them in pairs: at most so many from each set.
MAX_KEPT_FEATURES = 10_000
QUERIES_AT_A_TIME = 1024


class _KeptFeatures(Metric):
    """The first features of each set, gathered from all processes."""

    full_state_update = False
    real: list[torch.Tensor]
    generated: list[torch.Tensor]

    def __init__(self):
        super().__init__()
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("generated", default=[], dist_reduce_fx="cat")

    def update(self, features: torch.Tensor, real: bool) -> None:
        (self.real if real else self.generated).append(features)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        # After gathering from several processes, a state is one tensor, not a list.
        return dim_zero_cat(self.real), dim_zero_cat(self.generated)


class GenerationMetrics:
    """
    Frechet and kernel distance, precision, recall, density and coverage of generated against real images. Each image
    passes through the feature extractor once. Under `torch.distributed`, each process updates with its share of the
    images, and `compute` returns the measures over all images in every process.

    Args:
        features (`nn.Module`): Maps uint8 images (B, C, H, W) to features (B, F). See `ecvae_diffusers.metrics.features`.
        num_neighbours (`int`, *optional*, defaults to `5`): k of precision, recall, density and coverage.
        num_kernel_subsets (`int`, *optional*, defaults to `100`): Number of subsets for the kernel distance.
        kernel_subset_size (`int`, *optional*, defaults to `1000`): Features per subset, or all of a set that has fewer.

    Raises:
        ValueError: if `num_neighbours` is below 1.
    """

    def __init__(
        self,
        features: nn.Module,
        num_neighbours: int = 5,
        num_kernel_subsets: int = 100,
        kernel_subset_size: int = 1000,
    ):
        if num_neighbours < 1:
            raise ValueError(f"`num_neighbours` must be at least 1, but is {num_neighbours}.")
        self.features = features
        self.num_neighbours = num_neighbours
        self.num_kernel_subsets = num_kernel_subsets
        self.kernel_subset_size = kernel_subset_size
        self.frechet: FrechetInceptionDistance | None = None
        self.kept = _KeptFeatures()
        self.counts = {True: 0, False: 0}

    @torch.no_grad()
    def update(self, images: torch.Tensor, real: bool) -> None:
        """Add uint8 images (B, C, H, W) to the `real` ones or to the generated ones."""
        features = self.features(images).cpu()
        if self.frechet is None:
            as_they_are = nn.Identity()
            as_they_are.num_features = features.shape[1]
            self.frechet = FrechetInceptionDistance(feature=as_they_are, reset_real_features=False)
        self.frechet.update(features, real=real)
        num_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        room = MAX_KEPT_FEATURES // num_processes - self.counts[real]
        if room > 0:
            self.kept.update(features[:room], real=real)
            self.counts[real] += min(room, len(features))

    def compute(self) -> dict[str, float | None]:
        """
        Compute all measures from the images that `update` has received.

        Returns:
            `dict` with `frechet_distance` (`None` if a set has fewer images than there are features), `kernel_distance`,
            `kernel_distance_std` (over subsets), `precision`, `recall`, `density`, `coverage`, `num_real` and
            `num_generated` (the numbers of all images).

        Raises:
            ValueError: if a set has fewer images than `num_neighbours` + 2.
        """
        if self.frechet is None:
            raise ValueError("`compute` requires images: call `update` with real and with generated images first.")
        with self.frechet.sync_context(distributed_available=torch.distributed.is_initialized):
            counts = (self.frechet.real_features_num_samples, self.frechet.fake_features_num_samples)
            num_real, num_generated = map(int, counts)
        real, generated = self.kept.compute()
        # An image is not its own neighbour, and `prdc` requires one neighbour more than it uses.
        if min(len(real), len(generated)) < (least := self.num_neighbours + 2):
            found = f"there are {len(real)} real and {len(generated)} generated images"
            raise ValueError(f"`num_neighbours` + 2 = {least} images of each kind are required, but {found}.")
        is_stated = why_no_frechet_distance(num_real, num_generated, real.shape[1]) is None
        return {
            "frechet_distance": self.frechet.compute().item() if is_stated else None,
            **self.kernel_distance(real, generated),
            **neighbour_measures(real, generated, self.num_neighbours),
            "num_real": num_real,
            "num_generated": num_generated,
        }

    def kernel_distance(self, real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
        """Return mean and standard deviation over random subsets, which are the same at each call."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its warning of memory use: features are limited here
            kernel = KernelInceptionDistance(
                feature=nn.Identity(),
                subsets=self.num_kernel_subsets,
                subset_size=min(self.kernel_subset_size, len(real), len(generated)),
                # Every process already has all features.
                distributed_available_fn=lambda: False,
            )
        kernel.update(real.double(), real=True)
        kernel.update(generated.double(), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mean, std = kernel.compute()
        return {"kernel_distance": mean.item(), "kernel_distance_std": std.item()}

    def reset(self, keep_real: bool = False) -> None:
        """Forget all images, or with `keep_real` the generated ones only, to compare others with the same real images."""
        real = list(self.kept.real) if keep_real else []
        self.kept.reset()
        self.kept.real = real
        self.counts = {True: self.counts[True] if keep_real else 0, False: 0}
        if keep_real and self.frechet is not None:
            self.frechet.reset()
        else:
            self.frechet = None


def neighbour_measures(real: torch.Tensor, generated: torch.Tensor, num_neighbours: int = 5) -> dict[str, float]:
    """
    Compute precision, recall, density and coverage (Naeem et al. 2020) from features.

    Args:
        real (`torch.Tensor` of shape `(N, F)`), generated (`torch.Tensor` of shape `(M, F)`): Features.
        num_neighbours (`int`, *optional*, defaults to `5`): k: an image's ball reaches to its k-th nearest neighbour.

    Returns:
        `dict` with `precision`, `recall`, `density` and `coverage`.
    """
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # `compute_prdc` prints the numbers of samples
        measures = compute_prdc(real.cpu().numpy(), generated.cpu().numpy(), num_neighbours)
    return {name: float(value) for name, value in measures.items()}


def nearest_neighbours(
    queries: torch.Tensor, bank: torch.Tensor, num_neighbours: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the features of a bank that are nearest to each query, such as the training images nearest to each sample.

    Args:
        queries (`torch.Tensor` of shape `(N, F)`): Features of generated images.
        bank (`torch.Tensor` of shape `(M, F)`): Features of training images.
        num_neighbours (`int`, *optional*, defaults to `1`): Neighbours per query, at most M.

    Returns:
        Euclidean distances and indices into the bank, both of shape `(N, num_neighbours)`, nearest first.
    """
    found = [
        # The faster way by matrix products loses small distances to rounding.
        torch.cdist(chunk, bank, compute_mode="donot_use_mm_for_euclid_dist").topk(num_neighbours, largest=False)
        for chunk in queries.split(QUERIES_AT_A_TIME)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
