# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Computes what `ecvae evaluate` needs per image: features, energies, errors and bounds.

The work is split into numbered parts. Processes share them, and finished parts are cached on disk, so an interrupted
evaluation resumes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline
from ecvae_diffusers.atomic import replacing, to_json, write_json
from ecvae_diffusers.command import name_as_text
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.evaluation.pictures import EvaluatedImages
from ecvae_diffusers.evaluation.while_training import load_features
from ecvae_diffusers.hub.contents import INDEX, check_components, class_name, held_class
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.metrics import ClassifierFeatures, reconstruction_metrics
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.data.files import HASH_BYTES, trained_hashes
from ecvae_diffusers.training.data.images import hashes_of
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS


PART_SIZE = 250
HASHED_PART_SIZE = 5000
LIKELIHOOD_PART_SIZE = 8
# The variance of the decoder that the training loss implies at beta 1.
LIKELIHOOD_VARIANCE = 0.5
# Steps that optimize the posterior of each image, for the amortisation gap.
AMORTISATION_STEPS = 200
LEAST_SIZE_FOR_SSIM = 11
PIPELINES: dict[str, Any] = {"ECVAEPipeline": ECVAEPipeline, "ECFlowPipeline": ECFlowPipeline}
Part = dict[str, torch.Tensor]


class EvaluatedModel:
    """A pipeline under evaluation, in float32. Raises `ValueError` if it can't be loaded or is not one of `PIPELINES`."""

    def __init__(self, name: str, revision: str | None, device: torch.device):
        argument = f"--pretrained_model_name_or_path {name!r}"
        try:
            index = DiffusionPipeline.load_config(name, revision=revision)
            # diffusers would silently load any pipeline that has components of these names.
            if (kind := str(class_name(index))) not in PIPELINES:
                raise ValueError(
                    f"it must be an {' or an '.join(PIPELINES)}, but is {held_class(INDEX, index)}; measure a folder of its "
                    "samples with --generated_image_dir"
                )
            check_components(name, index)
            pipeline = PIPELINES[kind].from_pretrained(name, revision=revision)
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

    @property
    def class_names(self) -> list[str] | None:
        names = None if self.is_flow else self.pipeline.vae.config.get("id2label")
        return None if names is None else list(names.values())

    def sampler(self, count: int, seed: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        """
        Draw the latents, and for a model with classes the classes, of `count` samples. They depend on `seed` alone. Return
        a function from numbers of samples (N,) to uint8 images (N, C, H, W), rounded as in PNG files, and the classes.
        """
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn((count, self.num_latents, 1, 1), generator=generator)
        labels = None if self.is_flow else self.pipeline.draw_labels([None] * count, generator)

        def sample(chosen: torch.Tensor) -> torch.Tensor:
            classes = {} if labels is None else {"class_labels": labels[chosen]}
            given = latents[chosen].to(self.device)
            images = self.pipeline(len(chosen), latents=given, output_type="pt", **classes).images
            return to_uint8(images.cpu() * 2 - 1)

        return sample, labels

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images in [-1, 1], and decode the mean of the posterior."""
        vae = self.pipeline.vae
        return vae.decode(vae.encode(images).latent_dist.mode()).sample.float()

    @torch.no_grad()
    def scores(self, images: torch.Tensor) -> Part:
        """
        Return scores (N,) that may tell other images from the training data, for images in [-1, 1]: the energy, if there is
        an energy model, and the reconstruction error or, for a flow, the bits per dimension. For these, all images are
        dequantized by the same noise, so that scores do not depend on the batches.
        """
        found = {}
        if self.pipeline.energy_model is not None:
            with frozen(self.pipeline.energy_model):
                found["energy"] = compute_energy(self.pipeline.energy_model, images)
        if not self.is_flow:
            return found | {"error": squared_error(images, self.reconstruct(images))}
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        log_prob = self.pipeline.flow.log_prob(dequantize(images, noise.expand_as(images)))
        return found | {"bits_per_dimension": bits_per_dimension(log_prob, self.num_latents)}


class Work:
    """
    The parts of an evaluation. A part depends only on its number, not on the number of processes.

    Parts are kept in `folder`, which all processes must see, together with `identity`, the settings that they depend on.
    Raises `ValueError` if the folder holds parts with other settings.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: EvaluatedModel | None,
        images: EvaluatedImages,
        folder: Path,
        identity: dict[str, Any],
    ):
        self.args, self.accelerator, self.model, self.images, self.folder = args, accelerator, model, images, folder
        self.device = accelerator.device
        self.classifier: ClassifierFeatures | None = None
        if args.features == "classifier":
            names = images.class_names("real") or []
            found = (images.decoded["real"], images.labels("real"), names, accelerator.is_main_process)
            self.classifier = ClassifierFeatures(*found).to(self.device)
            if model is not None and model.class_names not in (None, names):
                raise ValueError(f"The data must have the model's classes, {model.class_names}, but has {names}.")
        self.features = self.classifier or load_features(args.features, self.device, argument="features")
        self.recorded_hashes = trained_hashes(args.pretrained_model_name_or_path)
        self.paths: dict[str, list[Path]] = {}  # of the parts, by kind
        path, identity = folder / "identity.json", json.loads(to_json(identity))
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else identity
        if changed := sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k)):
            raise ValueError(
                f"--output_dir holds parts of an evaluation with other arguments ({', '.join(changed)}): give the same arguments, "
                f"give another folder, or remove {str(folder)!r}."
            )
        # Every process must have read the file before the main process writes it.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(path, identity)

    def do(self) -> None:
        """Compute all parts that do not exist yet."""
        model, images, training = self.model, self.images.decoded, self.images.training
        if "test" in images and self.recorded_hashes is None and len(training) > len(images["real"]):
            self.make("hashes_of_training", torch.arange(len(training)), self.hashes_of, HASHED_PART_SIZE)
        for name, found in images.items():
            if model is None or name == "real":
                self.make(name, found, self.features_of)
            elif name == "test":
                self.make(name, found, lambda batch: self.features_of(batch) | model.scores(self.in_range(batch)))
            else:  # outside_...
                self.make(name, found, lambda batch: model.scores(self.in_range(batch)))
        if model is None:
            return
        for seed in self.args.seeds:
            sample, _ = model.sampler(self.args.num_samples, seed)
            numbers = torch.arange(self.args.num_samples)
            self.make(f"samples_{seed}", numbers, lambda chosen: self.features_of(sample(chosen)))
        # A flow's reconstructions are exact, and so is its likelihood, which `scores` has.
        if "test" in images and not model.is_flow:
            self.make("reconstructed", images["test"], lambda batch: self.reconstructed(model, batch))
            if self.args.num_likelihood_images > 0:
                chosen = torch.arange(min(self.args.num_likelihood_images, len(images["test"])))
                self.make("likelihood", chosen, lambda batch: self.likelihood_of(model, batch), LIKELIHOOD_PART_SIZE)

    def make(
        self, kind: str, items: torch.Tensor, function: Callable[[torch.Tensor], Part], size: int | None = None
    ) -> None:
        """
        Compute this process's share of the missing parts of a kind. A part is the output of `function` for a batch of
        `size` items, or for `PART_SIZE` items in batches of `--batch_size`.
        """
        parts = items.split(size or PART_SIZE)
        paths = [self.folder / f"{kind}-{index:05d}.safetensors" for index in range(len(parts))]
        self.paths[kind] = paths
        mine = range(self.accelerator.process_index, len(parts), self.accelerator.num_processes)
        missing = [index for index in mine if not paths[index].is_file()]
        shown = bool(missing) and self.accelerator.is_main_process
        for index in tqdm(missing, desc=kind.replace("_", " "), disable=not shown):
            found = [function(batch) for batch in parts[index].split(size or self.args.batch_size)]
            with replacing(paths[index]) as temporary:
                save_file({name: torch.cat([one[name].cpu() for one in found]) for name in found[0]}, temporary)

    def collect(self, kind: str) -> Part:
        """Concatenate the parts of a kind. Raises `ValueError` if a part is damaged or missing."""
        if not all(path.is_file() for path in self.paths[kind]):
            raise ValueError(f"parts of {kind!r} are missing: --output_dir must be a folder that all processes share.")
        parts = []
        for path in self.paths[kind]:
            try:
                parts.append(load_file(path))
            except SafetensorError as error:
                raise ValueError(
                    f"{str(path)!r} is damaged ({error}): remove it and run this command again."
                ) from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def trained_on(self) -> int:
        """Return how many test images are training images."""
        known = {*self.images.checked["real"].hashes, *(self.recorded_hashes or ())}
        if "hashes_of_training" in self.paths:
            known |= {bytes(one) for one in self.collect("hashes_of_training")["hashes"].numpy()}
        return sum(one in known for one in self.images.checked["test"].hashes)

    def hashes_of(self, indices: torch.Tensor) -> Part:
        """Hash training images, except those that can't be read, which are not trained on either."""
        hashes = hashes_of(self.images.training.select(indices.tolist()))
        return {"hashes": torch.tensor(list(b"".join(hashes)), dtype=torch.uint8).view(len(hashes), HASH_BYTES)}

    def in_range(self, images: torch.Tensor) -> torch.Tensor:
        return to_range(images.to(self.device))

    def features_of(self, images: torch.Tensor) -> Part:
        return {"features": self.features(images.to(self.device))}

    def reconstructed(self, model: EvaluatedModel, images: torch.Tensor) -> Part:
        originals = self.in_range(images)
        found = model.reconstruct(originals)
        measures = self.features_of(to_uint8(found))
        if min(originals.shape[2:]) >= LEAST_SIZE_FOR_SSIM:
            measures |= reconstruction_metrics((found.clamp(-1, 1) + 1) / 2, (originals + 1) / 2)
        return measures

    def likelihood_of(self, model: EvaluatedModel, indices: torch.Tensor) -> Part:
        bounds = posterior_bounds(
            self.in_range(self.images.decoded["test"][indices]),
            model.pipeline.vae,
            self.args.importance_samples,
            AMORTISATION_STEPS,
            LIKELIHOOD_VARIANCE,
            torch.Generator().manual_seed(int(indices[0]) // LIKELIHOOD_PART_SIZE),
            batch_size=max(self.args.batch_size, len(indices)),
        )
        return dict(bounds)
