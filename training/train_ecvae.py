#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated VAE on images: `accelerate launch training/train_ecvae.py --help`.

One iteration: one wrapped forward of the autoencoder gives reconstructions and prior samples; the chain on the frozen
energy model gives the prior samples' targets; the autoencoder steps on the ELBO plus lambda times the constraint; the
energy model steps on data against the same targets; lambda steps on the constraint. The equations are in
`ecvae_diffusers.calibration`.
"""

import gc
import json
import logging
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm

from ecvae_diffusers import ECVAEPipeline, EnergyCalibrator, LangevinScheduler
from ecvae_training.arguments import parse_args
from ecvae_training.checkpoints import load_checkpoint, save_checkpoint
from ecvae_training.data import ImageDataset, collate, load_images
from ecvae_training.loop import Stopped, clip_gradients, endless_batches, reconstruction_variance, to_model_range
from ecvae_training.models import build_models, load_pretrained, moving_average
from ecvae_training.noise import ChainNoise, StepNoise
from ecvae_training.output import (
    ARGUMENTS_FILE,
    METRICS_FILE,
    MetricsLog,
    check_output_dir,
    check_resumed_arguments,
    checkpoint_step,
    checkpoints,
    clear_run,
    find_checkpoint,
    image_grid,
    remove_old_checkpoints,
    save_atomically,
)
from ecvae_training.signals import StopSignal


logger = get_logger(__name__)

NUM_GRID_IMAGES = 64


def main(args) -> None:
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint is not None
    check_output_dir(output_dir, args.overwrite_output_dir, resume)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumed_arguments(output_dir, vars(args))
    accelerator = Accelerator(
        # Said outright: of several processes without an accelerator, each would otherwise take itself for the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        # Accumulation goes on over the end of an epoch: every step has the same number of batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} trains one model, and this script two: use data parallel training "
            "(`accelerate launch --multi_gpu`)."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs an accelerator, and there is none: use bf16 or no.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of a checkpoint
    diffusers_logging.set_verbosity_error()
    main_process, device = accelerator.is_main_process, accelerator.device

    # 1. Data: opened, checked and decoded before anything is written. A wrong model is told first: it takes seconds.
    pretrained = (None, None)
    if args.pretrained_model_name_or_path is not None:
        pretrained = load_pretrained(args.pretrained_model_name_or_path, args.resolution)
    images = load_images(
        args.dataset_name,
        args.dataset_config_name,
        args.train_data_dir,
        args.image_column,
        args.cache_dir,
        args.max_train_samples,
        args.output_dir,
    )
    dataset = ImageDataset(images, args.resolution, args.in_channels, args.skip_broken_images, progress=main_process)
    if dataset.skipped is not None:
        logger.warning(f"Left out: {dataset.skipped}")
    if pretrained[0] is not None and pretrained[0].config.in_channels != dataset.channels:
        raise ValueError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is for images of "
            f"{pretrained[0].config.in_channels} channel(s), but the data has {dataset.channels}: see --in_channels."
        )
    batches_per_epoch = len(dataset) // (args.train_batch_size * accelerator.num_processes)
    batches_per_step = args.gradient_accumulation_steps
    global_batch_size = args.train_batch_size * accelerator.num_processes * batches_per_step
    if batches_per_epoch == 0:
        raise ValueError(
            f"--train_batch_size must be at most the number of images a process "
            f"({len(dataset) // accelerator.num_processes}), but is {args.train_batch_size}."
        )
    max_train_steps = args.max_train_steps or max(args.num_epochs * batches_per_epoch // batches_per_step, 1)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )

    # 2. Models, optimizers, calibrator.
    set_seed(args.seed)
    calibrate = args.calibration == "energy"
    vae, energy_model = build_models(args, dataset.channels, pretrained)
    scheduler = LangevinScheduler(
        num_steps=args.langevin_steps,
        drift_step_size=args.langevin_drift_step,
        noise_scale=args.langevin_noise,
        conditioning_weight=args.conditioning_weight,
    )
    adam = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
        if calibrate:
            energy_model.enable_gradient_checkpointing()
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, **adam)
    schedule = {
        "name": args.lr_scheduler,
        # Accelerate steps a prepared schedule once a process.
        "num_warmup_steps": args.lr_warmup_steps * accelerator.num_processes,
        "num_training_steps": max_train_steps * accelerator.num_processes,
    }
    lr_scheduler = get_scheduler(optimizer=optimizer, **schedule)
    # Before `prepare`, so that its modules carry no wrapper into the saved average.
    ema = moving_average(vae, args.ema_max_decay).to(device) if args.use_ema else None
    vae, optimizer, lr_scheduler, loader = accelerator.prepare(vae, optimizer, lr_scheduler, loader)
    calibrator = None
    if calibrate:
        energy_model.to(memory_format=torch.channels_last)
        energy_optimizer = torch.optim.AdamW(energy_model.parameters(), lr=args.energy_learning_rate, **adam)
        energy_lr_scheduler = get_scheduler(optimizer=energy_optimizer, **schedule)
        energy_model, energy_optimizer, energy_lr_scheduler = accelerator.prepare(
            energy_model, energy_optimizer, energy_lr_scheduler
        )
        calibrator = EnergyCalibrator(
            accelerator.unwrap_model(energy_model),
            scheduler,
            tolerance=args.calibration_tolerance,
            initial_dual=args.initial_dual,
            dual_learning_rate=args.dual_learning_rate,
            max_dual=args.max_dual,
            energy_regularization=args.energy_regularization,
        )
        accelerator.register_for_checkpointing(calibrator)
    networks = [vae, energy_model] if calibrate else [vae]
    if ema is not None:
        accelerator.register_for_checkpointing(ema)

    def build_pipeline() -> ECVAEPipeline:
        trained_vae = ema.module if ema is not None else accelerator.unwrap_model(vae)
        trained_energy = accelerator.unwrap_model(energy_model) if calibrate else None
        pipeline = ECVAEPipeline(
            vae=trained_vae, energy_model=trained_energy, scheduler=scheduler if calibrate else None
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # 3. Resume, or start.
    first_step = 0
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
        first_step = checkpoint_step(checkpoint)
        logger.info(f"Resuming from {checkpoint.name}.")
    elif resume:
        logger.info("There is no checkpoint to resume from: starting at step 0.")
    metrics = None
    if main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            clear_run(output_dir)
        metrics = MetricsLog(output_dir / METRICS_FILE, first_step)
        (output_dir / ARGUMENTS_FILE).write_text(json.dumps(vars(args), indent=2, sort_keys=True) + "\n")
    if first_step >= max_train_steps:
        logger.info(f"{checkpoint.name} is at the end of the {max_train_steps} steps: saving only.")
    logger.info(
        f"{len(dataset)} images of {dataset.channels}x{args.resolution}x{args.resolution}, {global_batch_size} a step, "
        f"{max_train_steps} steps ({batches_per_epoch / batches_per_step:g} an epoch), calibration: {args.calibration}."
    )

    # 4. Train.
    grid_latents = torch.randn(
        NUM_GRID_IMAGES, accelerator.unwrap_model(vae).config.latent_channels, 1, 1,
        generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    progress = tqdm(
        total=max_train_steps, initial=first_step, desc="Training", disable=not main_process, mininterval=1.0
    )
    started, started_step = time.perf_counter(), first_step
    step, constraint, norms = first_step, 0.0, {}
    batches = endless_batches(accelerator, loader, first_step * batches_per_step, batches_per_epoch)
    with StopSignal() as stop:
        for batch_index, batch in batches:
            if step == max_train_steps:
                break
            noise = StepNoise(args.seed, batch_index, accelerator.process_index, accelerator.num_processes, device)
            real = to_model_range(batch, args.random_flip, noise)
            latent_shape = (real.shape[0], *grid_latents.shape[1:])
            # One context for both networks: each entered would count a batch of accumulation.
            with accelerator.accumulate(*networks):
                # Autoencoder: the ELBO, and the constraint on prior samples.
                output = vae(
                    real,
                    sample_posterior=True,
                    posterior_noise=noise.normal(*latent_shape),
                    prior_latents=noise.normal(*latent_shape) if calibrate else None,
                )
                reconstruction = (output.sample.float() - real).square().flatten(1).sum(1).mean()
                kl = output.latent_dist.kl().mean()
                loss = reconstruction + args.kl_weight * kl
                if calibrate:
                    chain_noise = ChainNoise(noise, output.prior_sample)
                    calibration = calibrator.calibrate(output.prior_sample, noise=chain_noise)
                    loss = loss + calibration.loss
                    constraint = constraint + calibration.constraint / batches_per_step
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms["gradient_norm"] = clip_gradients(accelerator, vae, optimizer, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                # Energy model: data against the same targets.
                if calibrate:
                    energy = calibrator.energy_loss(real, calibration.targets, energy_model)
                    accelerator.backward(energy.loss)
                    if accelerator.sync_gradients:
                        norms["energy_gradient_norm"] = clip_gradients(
                            accelerator, energy_model, energy_optimizer, args.max_grad_norm
                        )
                    energy_optimizer.step()
                    energy_lr_scheduler.step()
                    energy_optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            # lambda, one number for all processes, on the constraint of the whole step.
            if calibrate:
                calibrator.dual_step(accelerator.reduce(constraint, reduction="mean"))
                constraint = 0.0
            if ema is not None:
                ema.update_parameters(accelerator.unwrap_model(vae))
            step += 1
            progress.update()

            if step % args.log_steps == 0 or step == max_train_steps:
                scalars = {"reconstruction": reconstruction.detach(), "kl": kl.detach(), **norms}
                if calibrate:
                    scalars |= {name: calibration[name] for name in ("constraint", "noise_floor", "drift")}
                    scalars |= {name: energy[name] for name in ("energy_real", "energy_targets")}
                names = list(scalars)
                values = accelerator.reduce(torch.stack([scalars[name].float() for name in names]), reduction="mean")
                logged = dict(zip(names, values.tolist()))
                if calibrate:
                    logged |= {"dual": calibrator.dual.item(), "tolerance": calibrator.resolve_tolerance()}
                if not all(abs(value) < float("inf") for value in logged.values()):
                    raise FloatingPointError(f"Training has diverged at step {step}: {logged}. Lower the rates.")
                if main_process:
                    speed = (step - started_step) * global_batch_size / (time.perf_counter() - started)
                    metrics.write(
                        step=step, epoch=batch_index // batches_per_epoch, **logged, learning_rate=lr_scheduler.get_last_lr()[0],
                        images_per_second=round(speed, 1),
                    )  # fmt: skip
                shown = {"rec": f"{logged['reconstruction']:.1f}", "kl": f"{logged['kl']:.1f}"}
                if calibrate:
                    shown |= {"lambda": f"{logged['dual']:.1f}", "drift": f"{logged['drift']:.4f}"}
                progress.set_postfix(shown, refresh=False)
            if main_process and (step % args.save_images_steps == 0 or step == max_train_steps):
                pipeline = build_pipeline()
                was_training = pipeline.vae.training
                pipeline.vae.eval()
                samples = pipeline(latents=grid_latents.to(device), output_type="pt").images * 2 - 1
                pipeline.vae.train(was_training)
                save_atomically(image_grid(samples, num_columns=8), output_dir / "samples" / f"step-{step:06d}.png")
            stopped = stop.agreed(accelerator)
            if step % args.checkpointing_steps == 0 or (stopped and step < max_train_steps):
                save_checkpoint(accelerator, output_dir, step, build_pipeline)
                if main_process:
                    remove_old_checkpoints(output_dir, args.checkpoints_total_limit)
            if stopped and step < max_train_steps:
                progress.close()
                raise Stopped(
                    f"stopped at step {step} of {max_train_steps}, which checkpoint-{step} holds: go on with "
                    "--resume_from_checkpoint latest."
                )
    progress.close()

    # 5. The pipeline's folder.
    accelerator.wait_for_everyone()
    if main_process:
        pipeline = build_pipeline()
        pipeline.vae.eval()
        variance = reconstruction_variance(pipeline.vae, dataset, args.train_batch_size, device)
        pipeline.vae.register_to_config(reconstruction_variance=variance)
        pipeline.save_pretrained(output_dir)
        logger.info(f"Saved to {output_dir}: ECVAEPipeline.from_pretrained({str(output_dir)!r}).")
    # All leave together, the wrapped networks first: freed after the process group, their gradient reducer would be the
    # last to hold it, and free it under Python's lock, which the group's own threads may be waiting for.
    accelerator.wait_for_everyone()
    networks.clear()
    vae = energy_model = None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, ImportError, FloatingPointError) as error:
        sys.exit(f"train_ecvae.py: error: {error}")
    except Stopped as message:
        sys.exit(f"train_ecvae.py: {message}")
    except KeyboardInterrupt:
        found = checkpoints(Path(arguments.output_dir))
        left = (
            f"go on from {found[-1].name} with --resume_from_checkpoint latest" if found else "no checkpoint was saved"
        )
        sys.exit(f"train_ecvae.py: interrupted: {left}.")
