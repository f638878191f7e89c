# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The task of training the decoder of an autoencoder of diffusers, or a new decoder for its latents. The encoder is frozen.

One training step: one forward pass of the wrapped decoder decodes latents, and the chain on the frozen energy model computes targets from
these images. The decoder steps on the squared error of reconstructions plus lambda times the constraint, the energy model on data against
the same targets. The saved autoencoder loads with plain diffusers. The equations are in `ecvae_diffusers.calibration`.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from ecvae_diffusers import EnergyModel
from ecvae_diffusers.hub.saving import fingerprint
from ecvae_diffusers.hub.upload import CONFIG
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.launch import train
from ecvae_diffusers.training.tasks.autoencoders import (
    CalibratedDecoder,
    SavedDecoder,
    latent_shape,
    load_autoencoder,
    load_energy_model,
    load_latents,
)
from ecvae_diffusers.training.tasks.base import Task, evaluating
from ecvae_diffusers.training.tasks.decoder_config import ECDecoderConfig
from ecvae_diffusers.training.tasks.distillation import StudentDecoder, build_student
from ecvae_diffusers.training.tasks.networks import build_energy_model
from ecvae_diffusers.variational import error_gradient_norm


# Number of images whose encodings give the standard deviation of latents.
NUM_SPREAD_IMAGES = 256


class DecoderTask(Task):
    """
    The task of training a decoder: its own loss is the squared error, its samples are decoded latents.

    Args:
        config ([`ECDecoderConfig`]): The configuration of the run.
        decoder ([`CalibratedDecoder`]): The autoencoder with a trainable decoder.
        energy_model ([`EnergyModel`], *optional*): The energy model, for calibration with it.
        feed: The data, from `build_feed`.
        given (`torch.Tensor` of shape `(N, C, h, w)`, *optional*): Latents to decode, instead of encodings of the images.
    """

    component, headline, published = "decoder", "reconstruction", CONFIG
    generator: CalibratedDecoder

    def __init__(
        self,
        config: ECDecoderConfig,
        decoder: CalibratedDecoder,
        energy_model: EnergyModel | None,
        feed,
        given: torch.Tensor | None,
    ):
        self.config, self.batch_size = config.model, config.optimizer.train_batch_size
        self.generator, self.energy_model, self.feed, self.given = decoder, energy_model, feed, given
        self.saved_class = type(decoder.autoencoder).__name__
        self.noise_scale = 0.0
        self.last_encoded: tuple[torch.Tensor, torch.Tensor] | None = None

    def launch(self):
        latents = None if self.given is None else fingerprint({"latents": {"latents": self.given}})
        encoder = self.generator.encoder_fingerprint()
        same = {"autoencoder": self.saved_class, "encoder": encoder, "latents": latents}
        if isinstance(self.generator, StudentDecoder):
            config = json.loads(self.generator.autoencoder.to_json_string())
            same["decoder_config"] = {key: value for key, value in config.items() if not key.startswith("_")}
        return same

    def prepare(self, accelerator):
        super().prepare(accelerator)
        # Only now, when the autoencoder is on the device: 256 encodings of large images take minutes on a CPU.
        if self.config.latent_noise > 0:
            self.noise_scale = self.config.latent_noise * self.encodings(NUM_SPREAD_IMAGES).std().item()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images. The encoder is always in evaluation mode, because it is not trained."""
        with evaluating(self.generator):
            return self.generator.encode(images)

    def encode_batch(self, real: torch.Tensor) -> torch.Tensor:
        """Encode a batch once for both `loss` and `draw`, in the precision of training."""
        if self.last_encoded is None or self.last_encoded[0] is not real:
            with self.accelerator.autocast():
                self.last_encoded = (real, self.encode(real).float())
        return self.last_encoded[1]

    def encodings(self, count: int) -> torch.Tensor:
        """Return encodings (on the CPU) of the feed's reference images."""
        device = next(self.generator.parameters()).device
        batches = self.feed.reference(count).split(self.batch_size)
        return torch.cat([self.encode(to_range(batch).to(device)).cpu() for batch in batches])

    def draw(self, real, noise):
        if self.given is not None:
            rows = (noise.uniform(len(real)).cpu() * len(self.given)).long()
            return self.given[rows].to(real.device)
        encodings = self.encode_batch(real)
        return encodings + self.noise_scale * noise.normal(*encodings.shape) if self.noise_scale > 0 else encodings

    def loss(self, network, real, noise, step, with_samples, labels=None):
        latents = self.encode_batch(real)
        if with_samples and (self.given is not None or self.noise_scale > 0):
            latents = torch.cat([latents, self.draw(real, noise)])
        student = self.generator if isinstance(self.generator, StudentDecoder) else None
        if student is not None and student.learns_encoder:
            decoded, latent_error = network(latents, real)
        else:
            decoded, latent_error = network(latents), None
        # Without other latents, the reconstructions themselves are calibrated, which saves a second decoding.
        reconstructions, samples = decoded[: len(real)], decoded[-len(real) :] if with_samples else None
        numel, weight = real[0].numel(), self.config.reconstruction_weight
        reconstruction = squared_error(real, reconstructions).mean() * numel  # summed over an image
        loss, scalars = weight * reconstruction, {"reconstruction": reconstruction.detach()}
        scalars["reconstruction_gradient_norm"] = weight * error_gradient_norm(real, reconstructions)
        if student is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = student.teacher(latents)
            distillation = squared_error(taught, decoded).mean() * numel
            loss = loss + self.config.distillation_weight * distillation
            scalars["distillation"] = distillation.detach()
        if latent_error is not None:
            loss = loss + latent_error
            scalars["latent_error"] = latent_error.detach()
        return loss, samples, scalars

    def latents(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        if self.given is not None:
            return self.given[torch.randperm(len(self.given), generator=generator)[:count]]
        encodings = self.encodings(count)
        return encodings + self.noise_scale * torch.randn(encodings.shape, generator=generator)

    def measure(self, generator, images):
        """Return the PSNR of reconstructions in dB, averaged over images."""
        device, errors = next(generator.parameters()).device, []
        for part in images.split(self.batch_size):
            originals = to_range(part.to(device))
            decoded = self.reconstruct(generator, originals).clamp(-1, 1)
            errors.append((decoded - originals).square().mean((1, 2, 3)).cpu())
        return {"psnr": (10 * torch.log10(4 / torch.cat(errors))).mean().item()}

    def sample(self, generator, latents, labels=None):
        with evaluating(generator):
            return generator(latents).float()

    def reconstruct(self, generator, images, labels=None):
        with evaluating(generator):
            return generator(generator.encode(images)).float()

    def build_pipeline(self, generator, energy_model, scheduler):
        return SavedDecoder(generator, energy_model, scheduler)


def calibrate_decoder(config: ECDecoderConfig) -> None:
    """Train with a configuration. Raises the errors of `launch.train`, and `ValueError` if the autoencoder or latents do not fit."""
    model, path = config.model, config.model.pretrained_model_name_or_path or ""
    autoencoder = load_autoencoder(path, model.subfolder, model.revision, model.variant)
    decoder = CalibratedDecoder(autoencoder, path)
    if config.optimizer.gradient_checkpointing and not autoencoder._supports_gradient_checkpointing:
        raise ValueError(f"--gradient_checkpointing is not supported by {type(autoencoder).__name__}.")
    # Images are converted to the channels of the autoencoder: gray images become RGB if it has three.
    channels = decoder.config.in_channels
    if config.data.in_channels not in (None, channels):
        raise ValueError(f"--in_channels must be {channels} as in {path!r}, but is {config.data.in_channels}.")
    config = replace(config, data=replace(config.data, in_channels=channels))
    shape = latent_shape(decoder, config.data.resolution)
    given = load_latents(model.latents_file, shape) if model.latents_file is not None else None
    if model.decoder_config is not None:
        decoder = build_student(model.decoder_config, decoder, config.data.resolution)
        # Again, for the parameters of the new decoder that decoding does not use.
        latent_shape(decoder, config.data.resolution)

    def load(checkpoint: Path | None) -> EnergyModel | None:
        if model.calibration == "none":
            return None
        return load_energy_model(path, config.data.resolution, channels, model.subfolder, model.revision)

    def build_task(energy_model: EnergyModel | None, feed) -> DecoderTask:
        if energy_model is None and model.calibration == "energy":
            energy_model = build_energy_model(config.energy, config.data.resolution, channels)
        return DecoderTask(config, decoder.train(), energy_model, feed, given)

    train(config, load, build_task, DecoderTask)
