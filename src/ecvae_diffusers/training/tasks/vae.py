# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The task of training an EC-VAE: an ELBO, samples decoded from the prior, and calibration of the encoder's samples.

One training step:

1. One forward pass of the wrapped autoencoder computes reconstructions and prior samples.
2. The chain on the frozen energy model computes targets from the prior samples.
3. The autoencoder steps on the ELBO loss plus lambda times the constraint.
4. The energy model steps on data against the same targets, and lambda steps on the constraint.

With `--calibration posterior` or `both`, a chain on the posterior of each image, and of as many generated images, computes targets for
the encoder's samples. The decoder can also learn from the refined latents of the data. The equations are in
`ecvae_diffusers.calibration`, `.variational` and `.posterior`.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel
from ecvae_diffusers.edits import principal_directions
from ecvae_diffusers.model_error import error_power, mean_over_frequencies, spectrum_of
from ecvae_diffusers.pipelines.inputs import draw_classes
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.config import POSTERIOR_CALIBRATIONS
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.launch import train
from ecvae_diffusers.training.run.log import progress
from ecvae_diffusers.training.tasks.base import Task, evaluating
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS, Pretrained, build_models, load_pretrained
from ecvae_diffusers.training.tasks.posterior import PosteriorCalibration
from ecvae_diffusers.training.tasks.vae_config import ECVAEConfig
from ecvae_diffusers.variational import active_units, elbo_loss, error_gradient_norm, kl_warmup


# Enough for a standard error of the mean of a few per cent.
NUM_VARIANCE_IMAGES = 2048
# Principal directions that are saved, at most.
NUM_DIRECTIONS = 16
# Effort of the likelihood bounds in an evaluation. An image costs some hundred decoder passes, so there is only one image per 64 of
# --evaluation_samples, and at most 32.
SAMPLES_PER_LIKELIHOOD_IMAGE, NUM_LIKELIHOOD_IMAGES, IMPORTANCE_SAMPLES, AMORTISATION_STEPS = 64, 32, 64, 100


class ECVAETask(Task):
    """
    The task of training an EC-VAE: its own loss is the ELBO loss, and its samples are decoded from the prior.

    Args:
        config ([`ECVAEConfig`]): The configuration of the run.
        vae ([`AutoencoderEC`]): The autoencoder.
        energy_model ([`EnergyModel`], *optional*): The energy model, for calibration with it.
        companions (`dict`, *optional*): The `energy_model` and `scheduler` to save with a frozen decoder.
    """

    component, headline, saved_class = "vae", "reconstruction", "ECVAEPipeline"

    def __init__(
        self, config: ECVAEConfig, vae: AutoencoderEC, energy_model: EnergyModel | None, companions: dict | None = None
    ):
        self.config, self.batch_size = config.model, config.optimizer.train_batch_size
        self.num_likelihood_images = config.evaluation.evaluation_samples // SAMPLES_PER_LIKELIHOOD_IMAGE
        self.generator, self.energy_model, self.companions = vae, energy_model, companions
        self.samples_change = not self.config.freeze_decoder
        if self.config.freeze_decoder:
            vae.decoder.requires_grad_(False)
        self.latent_shape = (vae.config.latent_channels, 1, 1)
        if self.config.calibration in POSTERIOR_CALIBRATIONS:
            self.state = PosteriorCalibration(self.config, vae, config.calibration.dual_learning_rate)

    def loss(self, network, real, noise, step, with_samples, labels=None):
        kl_weight = kl_warmup(self.config.kl_weight, step, self.config.kl_warmup_steps)
        posterior_noise = noise.normal(len(real), *self.latent_shape)
        latents, generated = {}, None
        if self.state is not None:
            refined = self.state.refine(real, posterior_noise, noise, kl_weight, self.accelerator)
            generated = refined.generated
            if refined.latents is not None:
                latents["refined"] = refined.latents
        if with_samples:
            latents["prior"] = self.draw(real, noise)
        output = network(
            real,
            sample_posterior=True,
            posterior_noise=posterior_noise,
            prior_latents=torch.cat(list(latents.values())) if latents else None,
            extra_sample=generated,
            class_labels=labels,
            prior_class_labels=labels,
        )
        decoded = dict(zip(latents, output.prior_sample.chunk(len(latents)))) if latents else {}
        elbo = elbo_loss(real, output.sample, output.latent_dist, kl_weight)
        loss = elbo.loss
        scalars = {
            "reconstruction": elbo.reconstruction,
            "kl": elbo.kl,
            "reconstruction_gradient_norm": error_gradient_norm(real, output.sample),
            "kl_weight": elbo.kl.new_tensor(kl_weight),
            "active_units": active_units(output.latent_dist.mean),
            "posterior_variance": output.latent_dist.var.detach().float().mean(),
        }
        if self.state is not None:
            calibration = self.state.constrain(output, refined)
            loss = loss + calibration.loss
            scalars["posterior_constraint"] = calibration.constraint
            scalars["posterior_dual"] = self.state.calibrator.dual
        if "refined" in decoded:
            error = (decoded["refined"].float() - real).square().flatten(1).sum(1).mean()
            loss = loss + self.config.posterior_decoder_weight * error
            scalars["refined_reconstruction"] = error.detach()
        return loss, decoded.get("prior"), scalars

    def end_step(self):
        if self.state is not None:
            self.state.end_step(self.accelerator)

    def measure(self, generator, images):
        """Return the importance-weighted bound, the evidence lower bound and the amortisation gap, in nats per image."""
        if self.config.kl_weight == 0:
            return {}  # without the KL divergence, the loss is not a bound on a likelihood
        count = max(1, min(NUM_LIKELIHOOD_IMAGES, self.num_likelihood_images))
        images, variance = to_range(images[:count].to(generator.device)), self.config.kl_weight / 2
        numbers = (IMPORTANCE_SAMPLES, AMORTISATION_STEPS)
        bounds = posterior_bounds(images, generator, *numbers, variance, batch_size=self.batch_size)
        return {name: values.mean().item() for name, values in bounds.items()}

    def labels(self, count, seed):
        if self.generator.config.num_class_embeds is None:
            return None
        return draw_classes(self.generator.config, count, torch.Generator().manual_seed(seed))

    def sample(self, generator, latents, labels=None):
        with evaluating(generator):
            return generator.decode(latents, class_labels=labels).sample.float()

    def reconstruct(self, generator, images, labels=None):
        with evaluating(generator):
            latents = generator.encode(images, class_labels=labels).latent_dist.mean
            return generator.decode(latents, class_labels=labels).sample.float()

    def build_pipeline(self, generator, energy_model, scheduler):
        if self.companions is not None:
            return ECVAEPipeline(vae=generator, **self.companions)
        return ECVAEPipeline(vae=generator, energy_model=energy_model, scheduler=scheduler)

    def finish(self, generator, feed):
        """
        Write the mean squared error of reconstructions from the posterior mean, its spectrum, and the principal directions of
        posterior means into the config.
        """
        images, labels = feed.reference(NUM_VARIANCE_IMAGES), feed.reference_labels(NUM_VARIANCE_IMAGES)
        parts, power, means = images.split(self.batch_size), 0.0, []
        labels = [None] * len(parts) if labels is None else labels.split(self.batch_size)
        for batch, classes in zip(progress("Error of reconstructions", parts), labels):
            batch = to_range(batch.to(generator.device))
            with evaluating(generator):
                latents = generator.encode(batch, class_labels=classes).latent_dist.mean
                found = generator.decode(latents, class_labels=classes).sample.float()
            means.append(latents.float().flatten(1).cpu().numpy())
            power = power + len(batch) / len(images) * error_power(batch, found)
        width = images.shape[-1]
        variance = mean_over_frequencies(power, width).item()
        measured: dict[str, Any] = {"reconstruction_variance": variance, "reconstruction_spectrum": None}
        if 0 < variance < math.inf:  # an error that is 0 or not finite has no spectrum
            _, directions = principal_directions(np.concatenate(means).astype(np.float64), NUM_DIRECTIONS)
            measured["reconstruction_spectrum"] = spectrum_of(power, width)
            measured["posterior_directions"] = directions.round(4).tolist()
        generator.eval().register_to_config(**measured)


def describe_classes(feed) -> dict[str, Any]:
    """Return the config entries of an autoencoder for the classes of `feed`. Empty without classes."""
    if feed.class_names is None:
        return {}
    counts = feed.labels.bincount(minlength=len(feed.class_names))
    return {
        "num_class_embeds": len(feed.class_names),
        "id2label": {str(i): name for i, name in enumerate(feed.class_names)},
        "class_frequencies": [round(share, 6) for share in (counts / counts.sum()).tolist()],
    }


def build_vae(config: ECVAEConfig, in_channels: int, **classes: Any) -> AutoencoderEC:
    """Return a new autoencoder. `classes` are the entries from `describe_classes`."""
    return AutoencoderEC(
        **classes,
        sample_size=config.data.resolution,
        in_channels=in_channels,
        latent_channels=config.model.latent_channels,
        block_out_channels=tuple(config.model.block_out_channels or ()),
        layers_per_block=config.model.layers_per_block,
        patch_size=config.model.patch_size,
    )


def train_vae(config: ECVAEConfig) -> None:
    """Train with a configuration. Raises the errors of `launch.train`."""
    model = config.model

    def load(checkpoint: Path | None) -> Pretrained:
        vae, companions = load_pretrained(config, "vae", AutoencoderEC)
        needs_group_norm = model.freeze_decoder or model.calibration in POSTERIOR_CALIBRATIONS
        if vae is not None and vae.config.norm_type == "batch" and needs_group_norm:
            raise ValueError(
                f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path!r} must have group normalization with "
                "--calibration posterior or both, or --freeze_decoder, but has batch normalization."
            )
        if model.freeze_decoder and checkpoint is not None:
            # The decoder is that of the checkpoint, even if the pretrained path now holds another one.
            folder = checkpoint / "pipeline"
            try:
                saved = ECVAEPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
            except LOADING_ERRORS as error:
                raise ValueError(f"{str(folder)!r} can't be loaded: {' '.join(str(error).split())}") from error
            companions = {"energy_model": saved.energy_model, "scheduler": saved.scheduler}
        return vae, companions

    def build_task(pretrained: Pretrained, feed) -> ECVAETask:
        build = functools.partial(build_vae, config, feed.channels, **describe_classes(feed))
        vae, energy_model = build_models(config, feed, build, pretrained)
        names = None if vae.config.id2label is None else list(vae.config.id2label.values())
        if pretrained[0] is not None and names != feed.class_names:
            raise ValueError(
                f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path!r} must have the classes of the data "
                f"({feed.class_names}), but has {names}: see --class_conditional."
            )
        return ECVAETask(config, vae, energy_model, pretrained[1] if model.freeze_decoder else None)

    train(config, load, build_task, ECVAETask)
