# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What `evaluate.py` computes per image, in parts: features, energies, errors, bounds."""

import argparse
import logging
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.evaluation.parts import Parts
from ecvae_diffusers.evaluation.pictures import EvaluatedImages
from ecvae_diffusers.evaluation.while_training import load_features
from ecvae_diffusers.hub.contents import INDEX, check_components, class_name, held_class
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.metrics import reconstruction_metrics
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.data.files import HASH_BYTES, trained_hashes
from ecvae_diffusers.training.data.images import hashes_of
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.run.command import name_as_text
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS


logger = logging.getLogger(__name__)

PART_SIZE = 250
HASHED_PART_SIZE = 5000
LIKELIHOOD_PART_SIZE = 8
# What the training loss stands for at beta 1.
LIKELIHOOD_VARIANCE = 0.5
# Steps that optimize the posterior of each image, for the amortisation gap.
AMORTISATION_STEPS = 200
LEAST_SIZE_FOR_SSIM = 11
PIPELINES = {"ECVAEPipeline": ECVAEPipeline, "ECFlowPipeline": ECFlowPipeline}


class EvaluatedModel:
    """
    A pipeline under evaluation, in float32.

    Args:
        name (`str`): Folder or Hub id.
        revision (`str`, *optional*): Of a Hub id.
        device (`torch.device`): Where it computes.

    Raises:
        OSError, ValueError: if it can't be loaded, or is no `ECVAEPipeline` and no `ECFlowPipeline`.

    Attributes:
        is_flow (`bool`): Whether it has exact likelihoods, and reconstructions that equal the images.
    """

    def __init__(self, name: str, revision: str | None, device: torch.device):
        argument = f"--pretrained_model_name_or_path {name!r}"
        others = "give a folder of another model's samples as --generated_image_dir."
        try:
            index = DiffusionPipeline.load_config(name, revision=revision)
        except OSError as error:
            raise ValueError(f"{argument} holds no pipeline ({' '.join(str(error).split())}): {others}") from error
        # diffusers would load the weights of any pipeline with such components, and say nothing.
        if class_name(index) not in PIPELINES:
            raise ValueError(
                f"{argument} must be an {' or an '.join(PIPELINES)}, but holds {held_class(INDEX, index)}: {others}"
            )
        check_components(name, index)
        try:
            pipeline = PIPELINES[class_name(index)].from_pretrained(name, revision=revision)
        except LOADING_ERRORS as error:
            raise ValueError(f"{argument} can't be loaded: {' '.join(str(error).split())}") from error
        pipeline.set_progress_bar_config(disable=True)
        self.name = name_as_text(name)
        self.pipeline, self.device = pipeline.to(device), device
        self.fingerprint = weights_fingerprint(pipeline)
        self.is_flow = isinstance(pipeline, ECFlowPipeline)
        model = pipeline.flow if self.is_flow else pipeline.vae
        self.resolution, self.channels = model.config.sample_size, model.config.in_channels
        self.num_latents = model.num_latents if self.is_flow else model.config.latent_channels

    def latents(self, count: int, seed: int) -> torch.Tensor:
        """Draw latents: the same ones for a seed, and the first ones of a larger count."""
        return torch.randn((count, self.num_latents, 1, 1), generator=torch.Generator().manual_seed(seed))

    def sample(self, latents: torch.Tensor) -> torch.Tensor:
        """Return uint8 images: what a reader of PNG files would get."""
        images = self.pipeline(len(latents), latents=latents.to(self.device), output_type="pt").images
        return to_uint8(images.cpu() * 2 - 1)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images in [-1, 1], and decode the mean of their latents."""
        vae = self.pipeline.vae
        return vae.decode(vae.encode(images).latent_dist.mode()).sample.float()

    @torch.no_grad()
    def energy(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the `energy` of images in [-1, 1]; nothing without an energy model."""
        if self.pipeline.energy_model is None:
            return {}
        with frozen(self.pipeline.energy_model):
            return {"energy": compute_energy(self.pipeline.energy_model, images)}

    @torch.no_grad()
    def scores(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Return what may tell other images in [-1, 1] from the model's own: the energy, and of a model the error of its
        reconstruction, of a flow the bits per dimension of 8-bit images. These are dequantized by the same noise for
        each image, so that any batches give the same.
        """
        if not self.is_flow:
            return self.energy(images) | {"error": squared_error(images, self.reconstruct(images))}
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        log_prob = self.pipeline.flow.log_prob(dequantize(images, noise.expand_as(images)))
        return self.energy(images) | {"bits_per_dimension": bits_per_dimension(log_prob, self.num_latents)}


class Work:
    """
    Args:
        args: The command line of `evaluate.py`.
        accelerator ([`Accelerator`]): Each process does its share.
        model ([`EvaluatedModel`], *optional*): `None` for a folder of generated images.
        images ([`EvaluatedImages`]): What it is measured against.
        parts ([`Parts`]): Keeps what is done.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: EvaluatedModel | None,
        images: EvaluatedImages,
        parts: Parts,
    ):
        self.args, self.accelerator, self.model, self.images, self.parts = args, accelerator, model, images, parts
        self.recorded = trained_hashes(args.pretrained_model_name_or_path)
        self.is_trained_on: list[bool] = []
        self.device = accelerator.device
        self.features = load_features(args.features, accelerator.device, argument="features")
        self.counts: dict[str, int] = {}  # parts by their kind

    def do(self) -> None:
        """Make all parts that are not there yet."""
        if "test" in self.images.decoded:
            self.compare_with_training()
        for name, images in self.images.decoded.items():
            if name.startswith("outside_"):
                self.make(name, images, lambda part: self.gather(part, self.model.scores))
            else:  # real, generated, test
                self.make(name, images, self.test_part if name == "test" and self.model else self.features_part)
        if self.model is None:
            return
        for seed in self.args.seeds:
            self.make(f"samples_{seed}", self.model.latents(self.args.num_samples, seed), self.sample_part)
        # A flow's likelihoods are exact, and of all test images.
        if self.num_likelihood_images > 0 and not self.model.is_flow:
            self.make("likelihood", range(self.num_likelihood_images), self.likelihood_part, LIKELIHOOD_PART_SIZE)

    def make(self, kind: str, items: Sequence, make: Callable, size: int = PART_SIZE) -> None:
        self.counts[kind] = -(-len(items) // size)
        self.parts.make(kind, self.counts[kind], lambda index: make(items[index * size : (index + 1) * size]))

    def collect(self, kind: str) -> dict[str, torch.Tensor]:
        return self.parts.collect(kind, self.counts[kind])

    @property
    def num_likelihood_images(self) -> int:
        return min(self.args.num_likelihood_images, len(self.images.decoded.get("test", ())))

    def compare_with_training(self) -> None:
        """Find the test images that are training images, and warn of them."""
        real, training = self.images.checked["real"], self.images.training
        known = set(real.hashes)
        if self.recorded is not None:
            known |= self.recorded
        elif len(training) > len(real):
            self.make("hashes_of_training", range(len(training)), self.hashes_part, HASHED_PART_SIZE)
            self.accelerator.wait_for_everyone()
            known |= {bytes(one) for one in self.collect("hashes_of_training")["hashes"].numpy()}
        self.is_trained_on = [one in known for one in self.images.checked["test"].hashes]
        if (count := sum(self.is_trained_on)) and self.accelerator.is_main_process:
            logger.warning(
                f"WARNING {count} of {len(self.is_trained_on)} test images are among the training images: figures of "
                "held-out images are partly of these."
            )

    def hashes_part(self, indices: range) -> dict[str, torch.Tensor]:
        """Hash training images: those that can't be read are not trained on either."""
        hashes = hashes_of(self.images.training.select(list(indices)))
        return {"hashes": torch.tensor(list(b"".join(hashes)), dtype=torch.uint8).view(len(hashes), HASH_BYTES)}

    def features_part(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        batches = images.split(self.args.batch_size)
        return {"features": torch.cat([self.features(batch.to(self.device)).cpu() for batch in batches])}

    def gather(self, images: torch.Tensor, function: Callable) -> dict[str, torch.Tensor]:
        """Return what `function` makes of images in [-1, 1], batch by batch."""
        found = [function(to_range(batch.to(self.device))) for batch in images.split(self.args.batch_size)]
        return {name: torch.cat([one[name].cpu() for one in found]) for name in found[0]}

    def sample_part(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        samples = torch.cat([self.model.sample(batch) for batch in latents.split(self.args.batch_size)])
        return self.features_part(samples) | self.gather(samples, self.model.energy)

    def test_part(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.model.is_flow:
            return self.features_part(images) | self.gather(images, self.model.scores)

        def measured(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            reconstructed = self.model.reconstruct(batch)
            scores = self.model.energy(batch) | {"error": squared_error(batch, reconstructed)}
            scores["reconstructed"] = to_uint8(reconstructed)
            if self.model.resolution >= LEAST_SIZE_FOR_SSIM:
                scores |= reconstruction_metrics((reconstructed.clamp(-1, 1) + 1) / 2, (batch + 1) / 2)
            return scores

        found = self.features_part(images) | self.gather(images, measured)
        return found | {"reconstructed": self.features_part(found["reconstructed"])["features"]}

    def likelihood_part(self, indices: range) -> dict[str, torch.Tensor]:
        images = to_range(self.images.decoded["test"][indices.start : indices.stop].to(self.device))
        bounds = posterior_bounds(
            images,
            self.model.pipeline.vae,
            self.args.importance_samples,
            AMORTISATION_STEPS,
            LIKELIHOOD_VARIANCE,
            torch.Generator().manual_seed(indices.start // LIKELIHOOD_PART_SIZE),
            batch_size=max(self.args.batch_size, len(images)),
        )
        return dict(bounds)
