#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated VAE on images: `accelerate launch training/train_ecvae.py --help`.

One iteration: one wrapped forward of the autoencoder gives reconstructions and prior samples; the chain on the frozen
energy model gives the prior samples' targets; the autoencoder steps on the ELBO plus lambda times the constraint; the
energy model steps on data against the same targets; lambda steps on the constraint. The loop is in
`ecvae_training/trainer.py`, the equations in `ecvae_diffusers.calibration` and `ecvae_diffusers.variational`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel
from ecvae_diffusers.upload import UploadError, open_repository, upload_folder
from ecvae_diffusers.variational import active_units, elbo_loss, kl_warmup, squared_error
from ecvae_training.arguments import parse_args
from ecvae_training.checkpoints import SavingFailed
from ecvae_training.feeds import build_feed
from ecvae_training.images import to_range
from ecvae_training.launch import build_accelerator
from ecvae_training.models import build_models, load_pretrained
from ecvae_training.output import check_output_dir, check_resumed_arguments, checkpoints, find_checkpoint
from ecvae_training.trainer import Stopped, Trainer


logger = get_logger(__name__)

# Enough for a mean that is known to a few per cent.
NUM_VARIANCE_IMAGES = 2048


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


class ECVAETask:
    """The EC-VAE as a `Task` of the trainer: an ELBO of its own, and samples decoded from the prior."""

    component = "vae"

    def __init__(self, args, vae: AutoencoderEC, energy_model: EnergyModel | None):
        self.args, self.generator, self.energy_model = args, vae, energy_model
        self.latent_shape = (vae.config.latent_channels, 1, 1)

    def loss(self, network, real, noise, step, with_samples):
        args, shape = self.args, (len(real), *self.latent_shape)
        output = network(
            real,
            sample_posterior=True,
            posterior_noise=noise.normal(*shape),
            prior_latents=noise.normal(*shape) if with_samples else None,
        )
        kl_weight = kl_warmup(args.kl_weight, step, args.kl_warmup_steps)
        elbo = elbo_loss(real, output.sample, output.latent_dist, kl_weight, args.free_bits)
        scalars = {"reconstruction": elbo.reconstruction, "kl": elbo.kl}
        scalars["kl_weight"] = elbo.kl.new_tensor(kl_weight)
        scalars["active_units"] = active_units(output.latent_dist.mean)
        return elbo.loss, output.prior_sample, scalars

    def latents(self, count, seed):
        return torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(seed))

    def sample(self, generator, latents):
        with evaluating(generator):
            return generator.decode(latents).sample.float()

    def reconstruct(self, generator, images):
        with evaluating(generator):
            return generator.decode(generator.encode(images).latent_dist.mean).sample.float()

    def build_pipeline(self, generator, energy_model, scheduler):
        return ECVAEPipeline(vae=generator, energy_model=energy_model, scheduler=scheduler)

    def finish(self, generator, feed):
        """Write the mean squared error of reconstructions from the posterior mean into the autoencoder's config."""
        images, total = feed.reference(NUM_VARIANCE_IMAGES), 0.0
        for batch in images.split(self.args.train_batch_size):
            batch = to_range(batch.to(generator.device))
            total += squared_error(batch, self.reconstruct(generator, batch)).sum().item()
        generator.eval().register_to_config(reconstruction_variance=total / len(images))


def main(args) -> None:
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir, args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumed_arguments(output_dir, vars(args))
    accelerator = build_accelerator(args)
    repository = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        open_repository(repository, private=args.hub_private_repo, revision=args.hub_revision)

    # Opened, checked and decoded before anything is written. A wrong model is told first: it takes seconds.
    pretrained = (None, None)
    if args.pretrained_model_name_or_path is not None:
        pretrained = load_pretrained(args.pretrained_model_name_or_path, args.resolution)
    feed = build_feed(args, accelerator)
    if pretrained[0] is not None and pretrained[0].config.in_channels != feed.channels:
        raise ValueError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is for images of "
            f"{pretrained[0].config.in_channels} channel(s), but the data has {feed.channels}: see --in_channels."
        )
    num_steps = args.max_train_steps
    if num_steps is None:
        num_steps = max(args.num_epochs * feed.batches_per_epoch // args.gradient_accumulation_steps, 1)

    set_seed(args.seed)
    vae, energy_model = build_models(args, feed.channels, pretrained)
    trainer = Trainer(args, accelerator, feed, ECVAETask(args, vae, energy_model), num_steps)
    images = f"{feed.num_images} images" if feed.num_images is not None else "A stream of images"
    logger.info(
        f"{images} of {feed.channels}x{args.resolution}x{args.resolution}, {trainer.images_per_step} a step, {num_steps} "
        f"steps, calibration: {args.calibration}."
    )
    try:
        trainer.train(checkpoint)
    except Stopped:
        trainer.close()
        raise
    main_process = accelerator.is_main_process
    trainer.close()
    if args.push_to_hub and main_process:
        url = upload_folder(output_dir, repository, private=args.hub_private_repo, revision=args.hub_revision)
        logger.info(f"Published: {url}")


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except UploadError as error:
        saved = (Path(arguments.output_dir) / "model_index.json").is_file()
        what_to_do = f" The model is saved: training/publish.py {arguments.output_dir} uploads it." if saved else ""
        sys.exit(f"train_ecvae.py: error: --push_to_hub: {error}{what_to_do}")
    except (ValueError, ImportError, FloatingPointError, SavingFailed) as error:
        sys.exit(f"train_ecvae.py: error: {error}")
    except Stopped as message:
        sys.exit(f"train_ecvae.py: {message}")
    except KeyboardInterrupt:
        found = checkpoints(Path(arguments.output_dir))
        left = (
            f"go on from {found[-1].name} with --resume_from_checkpoint latest" if found else "no checkpoint was saved"
        )
        sys.exit(f"train_ecvae.py: interrupted: {left}.")
