# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated VAE on images: `accelerate launch training/train_ecvae.py --help`.

One iteration: one wrapped forward of the autoencoder gives reconstructions and prior samples; the chain on the frozen
energy model gives the prior samples' targets; the autoencoder steps on the ELBO plus lambda times the constraint; the
energy model steps on data against the same targets; lambda steps on the constraint. With `--calibration posterior` or
`both`, a chain on the posterior of each image, and of as many that the model makes, gives targets to the encoder's samples, and
the decoder may learn from data's. The loop is in `ecvae_diffusers.training.trainer`, the equations in `ecvae_diffusers.calibration`,
`.variational` and `.posterior`.
"""

import math
from pathlib import Path

import torch

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel
from ecvae_diffusers.model_error import error_power, mean_over_frequencies, spectrum_of
from ecvae_diffusers.posterior import posterior_bounds
from ecvae_diffusers.training.arguments.vae import POSTERIOR_CALIBRATIONS, WHY_NO_BATCH_NORM, parse_args
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.progress import progress
from ecvae_diffusers.training.run.session import run_script, train
from ecvae_diffusers.training.tasks.base import Task, evaluating
from ecvae_diffusers.training.tasks.networks import Networks, build_models, load_companions, load_pretrained
from ecvae_diffusers.training.tasks.posterior import PosteriorCalibration
from ecvae_diffusers.variational import active_units, elbo_loss, error_gradient_norm, kl_warmup


# Enough for a mean that is known to a few per cent.
NUM_VARIANCE_IMAGES = 2048
# What an evaluation while training spends on the bounds on the likelihood of training images: one for so many of
# --evaluation_samples, since an image costs some hundred passes through the decoder.
SAMPLES_PER_LIKELIHOOD_IMAGE, NUM_LIKELIHOOD_IMAGES, IMPORTANCE_SAMPLES, AMORTISATION_STEPS = 64, 32, 64, 100


class ECVAETask(Task):
    """The EC-VAE as a `Task` of the trainer: an ELBO of its own, and samples decoded from the prior."""

    component, headline, saved_class = "vae", "reconstruction", "ECVAEPipeline"

    def __init__(self, args, vae: AutoencoderEC, energy_model: EnergyModel | None, companions: dict | None = None):
        """`companions`: what a decoder that is held still is saved with, see `load_companions`."""
        self.args, self.generator, self.energy_model, self.companions = args, vae, energy_model, companions
        self.samples_change = not args.freeze_decoder
        if args.freeze_decoder:
            vae.decoder.requires_grad_(False)
        self.latent_shape = (vae.config.latent_channels, 1, 1)
        self.state = PosteriorCalibration(args, vae) if args.calibration in POSTERIOR_CALIBRATIONS else None

    def loss(self, network, real, noise, step, with_samples):
        args, kl_weight = self.args, kl_warmup(self.args.kl_weight, step, self.args.kl_warmup_steps)
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
        )
        decoded = dict(zip(latents, output.prior_sample.chunk(len(latents)))) if latents else {}
        elbo = elbo_loss(real, output.sample, output.latent_dist, kl_weight, args.free_bits)
        loss = elbo.loss
        scalars = {"reconstruction": elbo.reconstruction, "kl": elbo.kl}
        scalars["reconstruction_gradient_norm"] = error_gradient_norm(real, output.sample)
        scalars["kl_weight"] = elbo.kl.new_tensor(kl_weight)
        scalars["active_units"] = active_units(output.latent_dist.mean)
        scalars["posterior_variance"] = output.latent_dist.var.detach().float().mean()
        if self.state is not None:
            calibration = self.state.constrain(output, refined)
            loss = loss + calibration.loss
            scalars["posterior_constraint"] = calibration.constraint
            scalars["posterior_dual"] = self.state.calibrator.dual
        if "refined" in decoded:
            error = (decoded["refined"].float() - real).square().flatten(1).sum(1).mean()
            loss = loss + args.posterior_decoder_weight * error
            scalars["refined_reconstruction"] = error.detach()
        return loss, decoded.get("prior"), scalars

    def end_step(self):
        if self.state is not None:
            self.state.end_step(self.accelerator)

    def draw(self, real, noise):
        return noise.normal(len(real), *self.latent_shape)

    def measure(self, generator, images):
        """The importance-weighted bound, the evidence lower bound and the amortisation gap, in nats an image."""
        if self.args.kl_weight == 0:
            return {}  # there is no likelihood that the loss stands for
        count = max(1, min(NUM_LIKELIHOOD_IMAGES, self.args.evaluation_samples // SAMPLES_PER_LIKELIHOOD_IMAGE))
        images = to_range(images[:count].to(generator.device))
        bounds = posterior_bounds(
            images,
            generator,
            IMPORTANCE_SAMPLES,
            AMORTISATION_STEPS,
            self.args.kl_weight / 2,
            batch_size=self.args.train_batch_size,
        )
        return {name: values.mean().item() for name, values in bounds.items()}

    def latents(self, count, seed):
        return torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(seed))

    def sample(self, generator, latents):
        with evaluating(generator):
            return generator.decode(latents).sample.float()

    def reconstruct(self, generator, images):
        with evaluating(generator):
            return generator.decode(generator.encode(images).latent_dist.mean).sample.float()

    def build_pipeline(self, generator, energy_model, scheduler):
        if self.companions is not None:
            return ECVAEPipeline(vae=generator, **self.companions)
        return ECVAEPipeline(vae=generator, energy_model=energy_model, scheduler=scheduler)

    def finish(self, generator, feed):
        """Write the error of reconstructions from the posterior mean, its square and spectrum, into the autoencoder's config."""
        images, power = feed.reference(NUM_VARIANCE_IMAGES), 0.0
        for batch in progress("Error of reconstructions", images.split(self.args.train_batch_size)):
            batch = to_range(batch.to(generator.device))
            power = power + len(batch) / len(images) * error_power(batch, self.reconstruct(generator, batch))
        width = images.shape[-1]
        variance = mean_over_frequencies(power, width).item()
        generator.eval().register_to_config(
            reconstruction_variance=variance,
            # An autoencoder that makes no error, or one that is no number, has no spectrum of it.
            reconstruction_spectrum=spectrum_of(power, width) if 0 < variance < math.inf else None,
        )


def build_vae(args, in_channels: int) -> AutoencoderEC:
    """A new autoencoder of the command line."""
    return AutoencoderEC(
        sample_size=args.resolution,
        in_channels=in_channels,
        latent_channels=args.latent_channels,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        norm_type=args.norm_type,
    )


def run(args) -> None:
    def build_task(loaded, feed) -> ECVAETask:
        pretrained, companions = loaded
        models = build_models(args, feed.channels, lambda: build_vae(args, feed.channels), pretrained)
        return ECVAETask(args, *models, companions)

    def load(checkpoint: Path | None) -> tuple[Networks, dict | None]:
        vae, energy_model = load_pretrained(args, "vae", AutoencoderEC)
        if vae is not None and vae.config.norm_type == "batch":
            needs_group, why = f"--calibration {args.calibration}", WHY_NO_BATCH_NORM
            if args.freeze_decoder:
                needs_group, why = "--freeze_decoder", "statistics of the batches would change the decoder"
            if args.freeze_decoder or args.calibration in POSTERIOR_CALIBRATIONS:
                raise ValueError(
                    f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} must have group normalization with "
                    f"{needs_group}, but has batch normalization: {why}."
                )
        companions = None
        if args.freeze_decoder:
            # The decoder of a run that is gone on with is its checkpoint's, whatever the path is by now.
            source = args.pretrained_model_name_or_path if checkpoint is None else checkpoint / "pipeline"
            companions = load_companions(source, AutoencoderEC)
        return (vae, energy_model), companions

    train(args, load, build_task, ECVAETask)


def main(argv: list[str] | None = None, prog: str = "train_ecvae.py") -> None:
    """Train as a command line says: that of this process, or `argv`."""
    run_script(prog, parse_args(argv, prog), run)


if __name__ == "__main__":
    main()
