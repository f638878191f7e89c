# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The task of training a normalizing flow.

In each training step, one forward pass of the wrapped flow computes the likelihood of dequantized images and, through its inverse, prior
samples. The samples are calibrated like those of an EC-VAE. The equations are in `ecvae_diffusers.calibration` and `.models.flow_ec`.
"""

from pathlib import Path

import torch
from accelerate.logging import get_logger

from ecvae_diffusers import ECFlowPipeline, EnergyModel, FlowEC
from ecvae_diffusers.models import as_shown, bits_per_dimension, dequantize
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.launch import train
from ecvae_diffusers.training.tasks.base import Task, evaluating
from ecvae_diffusers.training.tasks.flow_config import ECFlowConfig
from ecvae_diffusers.training.tasks.networks import Pretrained, build_models, load_pretrained


logger = get_logger(__name__)

# Number of images for the initial statistics of activation normalization.
NUM_INITIALIZATION_IMAGES = 256


class FlowTask(Task):
    """The task of training a flow: its own loss is the negative log-likelihood, its samples come from its inverse."""

    component, headline, saved_class = "flow", "bits_per_dimension", "ECFlowPipeline"

    def __init__(self, config: ECFlowConfig, flow: FlowEC, energy_model: EnergyModel | None):
        self.optimizer, self.generator, self.energy_model = config.optimizer, flow, energy_model
        self.latent_shape = (flow.num_latents, 1, 1)

    def loss(self, network, real, noise, step, with_samples, labels=None):
        dequantized = dequantize(real, noise.uniform(*real.shape))
        output = network(dequantized, prior_latents=self.draw(real, noise) if with_samples else None)
        bits = bits_per_dimension(output.log_prob.detach(), self.generator.num_latents)
        scalars, samples = {"bits_per_dimension": bits.mean()}, None
        if with_samples:
            samples, is_far = as_shown(output.prior_sample)
            scalars["far_samples"] = is_far.float().mean()
        return -output.log_prob.mean(), samples, scalars

    def measure(self, generator, images):
        """Return bits per dimension, with the same dequantization at each evaluation."""
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(self.optimizer.seed))
        device, bits = next(generator.parameters()).device, []
        with evaluating(generator):
            for part, own in zip(*(x.split(self.optimizer.train_batch_size) for x in (images, noise))):
                log_prob = generator.log_prob(dequantize(to_range(part), own).to(device))
                bits.append(bits_per_dimension(log_prob, self.generator.num_latents).cpu())
        return {"bits_per_dimension": torch.cat(bits).mean().item()}

    def sample(self, generator, latents, labels=None):
        with evaluating(generator):
            return generator.decode(latents).float().clamp(-1, 1)

    def reconstruct(self, generator, images, labels=None):
        """Encode and decode images. A flow is invertible, so only rounding errors remain."""
        with evaluating(generator):
            return generator.decode(generator.encode(images)[0]).float()

    def build_pipeline(self, generator, energy_model, scheduler):
        return ECFlowPipeline(flow=generator, energy_model=energy_model, scheduler=scheduler)


def build_flow(config: ECFlowConfig, feed) -> FlowEC:
    """Return a new flow, initialized on the same images in every process."""
    flow = FlowEC(
        sample_size=config.data.resolution,
        in_channels=feed.channels,
        num_levels=config.model.num_levels,
        steps_per_level=config.model.steps_per_level,
        hidden_channels=config.model.hidden_channels,
    )
    images = to_range(feed.reference(NUM_INITIALIZATION_IMAGES).cpu())
    flow.initialize(dequantize(images, torch.rand(images.shape)))
    return flow


def train_flow(config: ECFlowConfig) -> None:
    """Train with a configuration. Raises the errors of `launch.train`."""

    def load(checkpoint: Path | None) -> Pretrained:
        pretrained = load_pretrained(config, "flow", FlowEC)
        if pretrained[0] is None and checkpoint is None and config.model.calibration != "none":
            logger.warning(
                "A new flow is calibrated from its first step. It is safer to train it first with --calibration none, and then to "
                "calibrate it with --pretrained_model_name_or_path (docs/guides/flows.md)."
            )
        return pretrained

    def build_task(pretrained: Pretrained, feed) -> FlowTask:
        return FlowTask(config, *build_models(config, feed, lambda: build_flow(config, feed), pretrained))

    train(config, load, build_task, FlowTask)
