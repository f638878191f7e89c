"""What `evaluate.py` computes image by image, in parts: features, energies, errors, bounds."""

import logging

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.evaluation.parts import Parts
from ecvae_diffusers.evaluation.while_training import load_features
from ecvae_diffusers.hub.contents import INDEX, check_components, class_name, held_class
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.metrics import reconstruction_metrics
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.data.files import HASH_BYTES, Pictures, trained_hashes
from ecvae_diffusers.training.data.images import CheckedPictures, hashes_of
from ecvae_diffusers.training.data.ranges import to_range, to_uint8
from ecvae_diffusers.training.run.places import name_as_text
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS


logger = logging.getLogger(__name__)

PART_SIZE = 250
HASHED_PART_SIZE = 5000
LIKELIHOOD_PART_SIZE = 8
# What the training loss stands for at beta 1.
LIKELIHOOD_VARIANCE = 0.5
# By which the posterior of each image is optimised, for the amortisation gap.
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
        OSError, ValueError: if it can't be loaded, or is another model than an `ECVAEPipeline` or an `ECFlowPipeline`.

    Attributes:
        is_flow (`bool`): Whether it has exact likelihoods, and no reconstructions that differ from the images.
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
        self.pipeline = pipeline.to(device)
        self.fingerprint = weights_fingerprint(pipeline)
        self.is_flow = isinstance(pipeline, ECFlowPipeline)
        model = pipeline.flow if self.is_flow else pipeline.vae
        self.resolution, self.channels = model.config.sample_size, model.config.in_channels
        self.num_latents = model.num_latents if self.is_flow else model.config.latent_channels
        self.device = device

    def latents(self, count: int, seed: int) -> torch.Tensor:
        """Always the same ones for a seed, and the first ones of a larger count."""
        shape = (count, self.num_latents, 1, 1)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def sample(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 images: what a reader of PNG files would get."""
        images = self.pipeline(len(latents), latents=latents.to(self.device), output_type="pt").images
        return to_uint8(images.cpu() * 2 - 1)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] by way of the mean of their latents."""
        vae = self.pipeline.vae
        return vae.decode(vae.encode(images).latent_dist.mode()).sample.float()

    @torch.no_grad()
    def energy(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of images in [-1, 1]; nothing where there is no energy model."""
        if self.pipeline.energy_model is None:
            return {}
        with frozen(self.pipeline.energy_model):
            return {"energy": compute_energy(self.pipeline.energy_model, images)}

    @torch.no_grad()
    def bits(self, images: torch.Tensor) -> torch.Tensor:
        """
        Of a flow: bits per dimension of 8-bit images in [-1, 1], dequantized by the same noise for each image, so that any batches
        give the same.
        """
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        log_prob = self.pipeline.flow.log_prob(dequantize(images, noise.expand_as(images)))
        return bits_per_dimension(log_prob, self.num_latents)

    def own_score(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a model without an energy tells other images by: its reconstruction error, or of a flow the number of bits."""
        if self.is_flow:
            return {"bits_per_dimension": self.bits(images)}
        return {"error": squared_error(images, self.reconstruct(images))}


class Work:
    """
    Args:
        args: The command line.
        accelerator ([`Accelerator`]): Each process does its share.
        model ([`EvaluatedModel`], *optional*): `None` for a folder of generated images.
        images (`dict`): uint8 images by name: `real`, `test`, `generated`, and `outside_...` of other data.
        parts ([`Parts`]): Keeps what is done.
        checked (`dict`): By the same names, the pictures that the images are of.
        training ([`Pictures`]): All training images, of which those named `real` are drawn.
    """

    def __init__(
        self,
        args,
        accelerator: Accelerator,
        model: EvaluatedModel | None,
        images: dict[str, torch.Tensor],
        parts: Parts,
        checked: dict[str, CheckedPictures],
        training: Pictures,
    ):
        self.args, self.model, self.images, self.parts = args, model, images, parts
        self.accelerator, self.checked, self.training = accelerator, checked, training
        self.recorded = trained_hashes(args.pretrained_model_name_or_path)
        self.device = accelerator.device
        self.features = load_features(args.features, accelerator.device, argument="features")

    def split(self, images: torch.Tensor, index: int, size: int = PART_SIZE) -> torch.Tensor:
        return images[index * size : (index + 1) * size]

    def batches(self, images: torch.Tensor):
        return images.split(self.args.batch_size)

    def features_of(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.features(batch.to(self.device)).cpu() for batch in self.batches(images)])

    def gather(self, images: torch.Tensor, function) -> dict[str, torch.Tensor]:
        """What `function` makes of images in [-1, 1], batch by batch."""
        found = [function(to_range(batch.to(self.device))) for batch in self.batches(images)]
        return {name: torch.cat([one[name].cpu() for one in found]) for name in found[0]}

    def count(self, total: int, size: int = PART_SIZE) -> int:
        return -(-total // size)

    def seed_kind(self, seed: int) -> str:
        return f"samples_{seed}"

    @property
    def num_likelihood_images(self) -> int:
        """Of which bounds are taken. A flow's likelihoods are exact, and of all test images."""
        if self.model is None or self.model.is_flow:
            return 0
        return min(self.args.num_likelihood_images, len(self.images.get("test", ())))

    def do(self) -> None:
        """Make all parts that are not there yet."""
        if "test" in self.images:
            self.compare_with_training()
        for name, images in self.images.items():
            if name == "test":
                self.parts.make(name, self.count(len(images)), self.test_part)
            elif name.startswith("outside_"):
                make = lambda index, images=images: self.gather(self.split(images, index), self.scores)  # noqa: E731
                self.parts.make(name, self.count(len(images)), make)
            else:  # real, generated
                make = lambda index, images=images: {"features": self.features_of(self.split(images, index))}  # noqa: E731
                self.parts.make(name, self.count(len(images)), make)
        if self.model is None:
            return
        for seed in self.args.seeds:
            latents = self.model.latents(self.args.num_samples, seed)
            make = lambda index, latents=latents: self.sample_part(self.split(latents, index))  # noqa: E731
            self.parts.make(self.seed_kind(seed), self.count(self.args.num_samples), make)
        if self.num_likelihood_images > 0:
            count = self.count(self.num_likelihood_images, LIKELIHOOD_PART_SIZE)
            self.parts.make("likelihood", count, self.likelihood_part)

    def compare_with_training(self) -> None:
        """Find the test images that are training images, and warn of them."""
        known = set(self.checked["real"].hashes)
        if self.recorded is not None:
            known |= self.recorded
        elif len(self.training) > len(self.checked["real"]):
            count = self.count(len(self.training), HASHED_PART_SIZE)
            self.parts.make("hashes_of_training", count, self.hashes_part)
            self.accelerator.wait_for_everyone()
            found = self.parts.collect("hashes_of_training", count)["hashes"]
            known |= {bytes(one) for one in found.numpy()}
        self.is_trained_on = [one in known for one in self.checked["test"].hashes]
        if (count := sum(self.is_trained_on)) and self.accelerator.is_main_process:
            logger.warning(
                f"WARNING {count} of {len(self.is_trained_on)} test images are among the training images: what is measured of "
                "them as held out is not."
            )

    def hashes_part(self, index: int) -> dict[str, torch.Tensor]:
        """Of training images: those that can't be read are not trained on either."""
        last = min((index + 1) * HASHED_PART_SIZE, len(self.training))
        pictures = self.training.select(list(range(index * HASHED_PART_SIZE, last)))
        hashes = hashes_of(pictures)
        return {"hashes": torch.tensor(list(b"".join(hashes)), dtype=torch.uint8).view(len(hashes), HASH_BYTES)}

    def collect(self, name: str) -> dict[str, torch.Tensor]:
        total = self.args.num_samples if name.startswith("samples_") else len(self.images.get(name, ()))
        if name == "likelihood":
            return self.parts.collect(name, self.count(self.num_likelihood_images, LIKELIHOOD_PART_SIZE))
        return self.parts.collect(name, self.count(total))

    def scores(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What may tell one kind of images from another."""
        return self.model.energy(images) | self.model.own_score(images)

    def sample_part(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        samples = torch.cat([self.model.sample(batch) for batch in self.batches(latents)])
        return {"features": self.features_of(samples)} | self.gather(samples, self.model.energy)

    def test_part(self, index: int) -> dict[str, torch.Tensor]:
        images = self.split(self.images["test"], index)
        found = {"features": self.features_of(images)}
        if self.model is None:
            return found
        if self.model.is_flow:
            return found | self.gather(images, self.scores)

        def measured(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            reconstructed = self.model.reconstruct(batch)
            scores = self.model.energy(batch) | {"error": squared_error(batch, reconstructed)}
            scores["reconstructed"] = to_uint8(reconstructed)
            if self.model.resolution >= LEAST_SIZE_FOR_SSIM:
                scores |= reconstruction_metrics((reconstructed.clamp(-1, 1) + 1) / 2, (batch + 1) / 2)
            return scores

        found |= self.gather(images, measured)
        return found | {"reconstructed": self.features_of(found["reconstructed"])}

    def likelihood_part(self, index: int) -> dict[str, torch.Tensor]:
        test = self.images["test"][: self.num_likelihood_images]
        images = to_range(self.split(test, index, LIKELIHOOD_PART_SIZE).to(self.device))
        bounds = posterior_bounds(
            images,
            self.model.pipeline.vae,
            self.args.importance_samples,
            AMORTISATION_STEPS,
            LIKELIHOOD_VARIANCE,
            torch.Generator().manual_seed(index),
            batch_size=max(self.args.batch_size, len(images)),
        )
        return dict(bounds)
