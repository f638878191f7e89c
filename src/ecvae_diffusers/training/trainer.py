"""The training loop: calibrated training of any generator, with logs, pictures, evaluations, checkpoints and rollbacks.

A `Task` defines what is trained: the generator's own loss, how it makes images, and the pipeline that is saved.
"""

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from ecvae_diffusers.atomic import replacing, write_json
from ecvae_diffusers.evaluation.while_training import Evaluator, Patience
from ecvae_diffusers.training.augmentation import (
    MEASURED_EVERY,
    AdaptiveAugmentation,
    augmented,
    compare_with_held_out,
)
from ecvae_diffusers.training.config import TrainingConfig
from ecvae_diffusers.training.data.files import trained_hashes, write_hashes
from ecvae_diffusers.training.data.loaders import Batch, DecodedFeed, StreamFeed
from ecvae_diffusers.training.data.transforms import (
    batch_spread,
    crop_at_random,
    flip_at_random,
    forget_classes,
    to_range,
)
from ecvae_diffusers.training.randomness import ChainNoise, StepNoise
from ecvae_diffusers.training.run.checkpoints import (
    check_resumed_launch,
    checkpoint_step,
    load_checkpoint,
    save_checkpoint,
    save_pipeline,
)
from ecvae_diffusers.training.run.divergence import Recovery, calibration_state
from ecvae_diffusers.training.run.folder import BEST_FOLDER, HASHES_FILE, clear_run, cut_run, remove_leftovers
from ecvae_diffusers.training.run.log import (
    ARGUMENTS_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    RunLog,
    Stopwatch,
    duration,
    moments,
    peak_memory,
    progress,
    record_event,
    reduce_scalars,
)
from ecvae_diffusers.training.run.pictures import NUM_ENERGIES, Observer
from ecvae_diffusers.training.tasks.base import Task
from ecvae_diffusers.training.tasks.networks import Trained, build_calibrator, moving_average, use_contiguous_norms
from ecvae_diffusers.training.tasks.resizing import freeze_coarse_blocks


logger = get_logger(__name__)

# Steps of pictures in addition to every `--save_images_steps`: faults in the data or the learning rates show early.
FIRST_PICTURES = (1, 10, 100)
# Number of steps after which a run logs its expected duration, and channels at full resolution from which a network is large for a CPU.
WARMUP_STEPS, LARGE_WIDTH = 5, 64
# Share of images whose class is hidden from the networks, so that they also learn images without a known class.
CLASS_DROPOUT = 0.1
TRACKER_PROJECT = "ecvae"


class Stopped(Exception):
    """The error of a run that saved its state and ended before its last step. The message says why and what to do."""


class Trainer:
    """
    The training loop of a run.

    Args:
        config ([`TrainingConfig`]): The configuration of the run.
        accelerator ([`Accelerator`]): From `build_accelerator`.
        feed: The data, from `build_feed`.
        task ([`Task`]): The generator and the energy model to train.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, feed: DecodedFeed | StreamFeed, task: Task):
        self.config, self.accelerator, self.feed, self.task = config, accelerator, feed, task
        optimizer, evaluation = config.optimizer, config.evaluation
        self.num_steps, self.output_dir = optimizer.max_train_steps, Path(str(config.run.output_dir))
        self.step = 0
        self.num_batches = optimizer.gradient_accumulation_steps
        self.images_per_step = optimizer.train_batch_size * accelerator.num_processes * self.num_batches
        self.calibrator = self.energy = self.ema = self.overfitting = None
        models: list[Any] = [model for model in (task.generator, task.energy_model) if model is not None]
        for model in models:
            model.to(memory_format=torch.channels_last)
            if optimizer.gradient_checkpointing:
                model.enable_gradient_checkpointing()
        # Before `prepare`, so that the saved average contains no wrapped modules.
        if optimizer.use_ema:
            self.ema = moving_average(task.generator, optimizer.ema_max_decay).to(accelerator.device)
        # After the average, which is used in float32.
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            use_contiguous_norms(task.generator)
        betas = (optimizer.adam_beta1, optimizer.adam_beta2)
        self.generator = self.prepare(task.generator, optimizer.learning_rate, betas)
        if task.energy_model is not None:
            freeze_coarse_blocks(task.energy_model, config.energy.freeze_energy_blocks)
            betas = (0.0, optimizer.energy_adam_beta2)
            self.energy = self.prepare(task.energy_model, optimizer.energy_learning_rate, betas)
            self.calibrator = build_calibrator(config.calibration, config.energy, task.energy_model)
        task.prepare(accelerator)
        if feed.held_out and self.energy is not None:
            self.overfitting = AdaptiveAugmentation(config.energy.adaptive_augmentation)
        state = (self.ema, self.calibrator, task.state, self.overfitting)
        self.recovery = Recovery(config, accelerator, self.generator, self.energy, state)
        self.evaluation: Any = None
        metric = "frechet_distance"
        if evaluation.evaluation_steps is not None:
            self.evaluation = Evaluator(
                accelerator, feed, task, features=evaluation.evaluation_features, num_samples=evaluation.evaluation_samples,
                batch_size=optimizer.train_batch_size, seed=optimizer.seed,
            )  # fmt: skip
            metric = self.evaluation.metric
        self.patience = Patience(metric, evaluation.early_stopping_patience)
        self.stopwatch = Stopwatch()
        resumed = (
            self.calibrator,
            self.ema,
            self.recovery,
            self.patience,
            self.stopwatch,
            task.state,
            self.overfitting,
        )
        accelerator.register_for_checkpointing(*[part for part in resumed if part is not None])

    def prepare(self, network: torch.nn.Module, learning_rate: Any, betas: tuple[float, float]) -> Trained:
        """Return a network with its AdamW optimizer and schedule, wrapped by Accelerate."""
        config, num_processes = self.config.optimizer, self.accelerator.num_processes
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=0.0)
        # Accelerate steps a prepared schedule once per process.
        warmup, total = config.lr_warmup_steps * num_processes, config.max_train_steps * num_processes
        lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        prepared = self.accelerator.prepare(network, optimizer, lr_scheduler)
        return Trained(self.accelerator, config.max_grad_norm, *prepared)

    @property
    def launch(self) -> dict:
        """Properties, other than arguments, that must be the same when the run is resumed."""
        return {
            "images_per_step": self.images_per_step,
            "num_images": self.feed.num_images,
            "channels": self.feed.channels,
            "hash_of_images": self.feed.data_hash,
            "mixed_precision": self.accelerator.mixed_precision,
            **self.task.launch(),
        }

    @property
    def exported(self) -> torch.nn.Module:
        """The generator that is saved and sampled from: the moving average, if there is one."""
        return self.ema.module if self.ema is not None else self.task.generator

    def build_pipeline(self) -> DiffusionPipeline:
        scheduler = self.calibrator.adapted_scheduler() if self.calibrator is not None else None
        pipeline = self.task.build_pipeline(self.exported, self.task.energy_model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def train(self, checkpoint: Path | None, is_stopped: Callable[[int], bool]) -> None:
        """
        Train to the last step and save the pipeline.

        Args:
            checkpoint (`Path`, *optional*): The checkpoint to resume from. Default: start at step 0.
            is_stopped (`Callable`): Takes the number of a step, and returns whether to save a checkpoint and end the run after it.

        Raises:
            Stopped: if a signal or the guard ended the run before its last step.
        """
        self.start(checkpoint)
        batches = self.new_batches()
        main_process, run = self.accelerator.is_main_process, self.config.run
        evaluation_steps = self.config.evaluation.evaluation_steps
        self.progress = tqdm(
            total=self.num_steps, initial=self.step, desc="Training", disable=not main_process, mininterval=1.0
        )
        self.stopwatch.start()
        self.started, self.started_step = self.stopwatch.seconds, self.step
        self.suggest_small_networks()
        with self.progress:
            while self.step < self.num_steps and not self.patience.is_over:
                scalars = self.train_step(batches)
                self.step += 1
                if self.step - self.started_step == WARMUP_STEPS:
                    self.tell_what_to_expect()
                last = self.step == self.num_steps
                observed = self.is_observed(self.step)
                stopped = is_stopped(self.step) and not last
                evaluate = evaluation_steps is not None and (self.step % evaluation_steps == 0 or last)
                save = self.step % run.checkpointing_steps == 0 or stopped
                alarms = []
                if observed:
                    alarms = self.observe(scalars)
                # A state that is not finite is never saved, even if this step is not observed.
                elif (evaluate or save) and (peaks := self.recovery.peaks):
                    alarms = self.recovery.judge(self.step, reduce_scalars(self.accelerator, peaks), complete=False)
                if alarms:
                    self.roll_back(alarms)
                    batches = self.new_batches()
                    continue
                if observed:
                    self.recovery.keep_healthy(self.step)
                with self.stopwatch.paused():
                    full = self.step % run.save_images_steps == 0 or last
                    if main_process and (full or self.step in FIRST_PICTURES):
                        self.observer.observe(self.step, self.exported, self.task.generator, self.calibrator, full)
                    if evaluate:
                        self.evaluate()
                    if save:
                        self.save_checkpoint()
                if stopped:
                    raise Stopped(
                        f"stopped at step {self.step} of {self.num_steps} and saved checkpoint-{self.step}: resume "
                        "with --resume_from_checkpoint latest."
                    )
                if last:
                    break
                if self.patience.is_over:
                    outcome = self.patience.outcome
                    record_event(self.accelerator, self.output_dir, self.step, "early_stopping", outcome)
                self.progress.update()
            self.save()
            # Only now, because at 100% the work should be done.
            self.progress.update(self.step - self.progress.n)

    def suggest_small_networks(self) -> None:
        """Log which arguments make a small model, if large networks are about to be trained on a CPU."""
        channels = getattr(self.config.model, "block_out_channels", None) or [0]
        if self.accelerator.device.type == "cpu" and channels[0] >= LARGE_WIDTH:
            logger.info(
                "These networks are slow on a CPU. For smaller and faster ones, use --block_out_channels 16 32 64 "
                "--latent_channels 64 --mixed_precision bf16."
            )

    def tell_what_to_expect(self) -> None:
        """Log the expected duration of the run, from its steps so far, and the steps at which pictures are written."""
        seconds = (self.stopwatch.seconds - self.started) / WARMUP_STEPS
        run, pictures = self.config.run, self.output_dir / "samples"
        logger.info(
            f"{seconds:.2g} s per step: {duration(seconds * (self.num_steps - self.step))} for the remaining "
            f"{self.num_steps - self.step} steps, without evaluations. Peak memory: {peak_memory(self.accelerator.device):.1f} GiB. "
            f"Pictures are written to {pictures} at steps {', '.join(map(str, FIRST_PICTURES))} and every {run.save_images_steps} steps."
        )

    def start(self, checkpoint: Path | None) -> None:
        """Load the checkpoint, if there is one, and remove files of later steps from the output folder."""
        config, output_dir = self.config, self.output_dir
        if checkpoint is not None:
            check_resumed_launch(output_dir, self.launch)
            load_checkpoint(self.accelerator, checkpoint)
            self.step = checkpoint_step(checkpoint)
            logger.info(f"Resuming from {checkpoint.name}, up to step {self.num_steps}.")
        elif config.run.resume_from_checkpoint is not None:
            logger.info("There is no checkpoint to resume from: starting at step 0.")
        if self.accelerator.is_main_process:
            if checkpoint is None:
                clear_run(output_dir)
            remove_leftovers(output_dir)
            cut_run(output_dir, self.step)
            arguments = {**config.flat(), "component": self.task.component, "launch": self.launch}
            write_json(output_dir / ARGUMENTS_FILE, arguments, sort_keys=True)
            if self.feed.hashes is not None and not (checkpoint is not None and (output_dir / HASHES_FILE).is_file()):
                # Images that the pretrained model was trained on count as well.
                before = trained_hashes(config.model.pretrained_model_name_or_path) or set()
                write_hashes(self.feed.hashes | before, output_dir / HASHES_FILE)
            images, labels = self.feed.reference(NUM_ENERGIES), self.feed.reference_labels(NUM_ENERGIES)
            device, optimizer = self.accelerator.device, config.optimizer
            batch_size = optimizer.train_batch_size
            self.observer = Observer(output_dir, self.task, images, labels, optimizer.seed, device, batch_size)
        if config.run.report_to is not None:
            flat = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.flat().items()}
            self.accelerator.init_trackers(TRACKER_PROJECT, config=flat)
        self.recovery.keep_healthy(self.step)

    def new_batches(self) -> Iterator[Batch]:
        return self.feed.batches(self.step * self.num_batches, reseed=self.recovery.num_rollbacks)

    def train_step(self, batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        """Update both networks, the dual variable and the moving average. Return the scalars of the last batch."""
        data, optimizer, accelerator = self.config.data, self.config.optimizer, self.accelerator
        generator, energy = self.generator, self.energy
        networks = [trained.network for trained in (generator, energy) if trained is not None]
        norms: dict[str, torch.Tensor] = {}
        constraint: Any = 0.0
        # Not `None` if there is an energy model.
        calibrator: Any = self.calibrator
        samples: Any
        for part in range(self.num_batches):
            noise = StepNoise(
                optimizer.seed, self.step * self.num_batches + part, accelerator.process_index, accelerator.num_processes,
                accelerator.device, reseed=self.recovery.num_rollbacks,
            )  # fmt: skip
            images, labels = next(batches)
            real = to_range(images)
            if data.image_size is not None:
                real = crop_at_random(real, data.resolution, noise)
            if data.random_flip:
                real = flip_at_random(real, noise)
            if labels is not None and self.feed.class_names is not None:
                labels = forget_classes(labels, CLASS_DROPOUT, len(self.feed.class_names), noise)
            # One context for both networks, because each entry counts as a batch of gradient accumulation.
            with accelerator.accumulate(*networks):
                # The generator: its own loss plus the constraint on its samples. Samples get the classes of the batch.
                loss, samples, own = self.task.loss(
                    generator.network, real, noise, self.step, energy is not None, labels
                )
                if energy is not None:
                    # The same network twice: without and with Accelerate's wrapper.
                    frozen_energy, trained_energy = augmented(
                        self.overfitting, real, noise, self.task.energy_model, energy.network
                    )
                    calibration = calibrator.calibrate(
                        samples, noise=ChainNoise(noise, samples), energy_model=frozen_energy, condition=labels
                    )
                    loss = loss + calibration.loss
                    constraint = constraint + calibration.constraint / self.num_batches
                norms |= generator.step(loss)
                # The energy model: data against the targets of the same chain.
                if energy is not None:
                    energies = calibrator.energy_loss(real, calibration.targets, trained_energy, labels, labels)
                    norms |= {f"energy_{name}": norm for name, norm in energy.step(energies.loss).items()}
        scalars, peaks = {**norms, **own}, {**norms}
        if energy is not None:
            # lambda is the same in all processes: it steps on the mean constraint of the whole step.
            peaks["constraint"] = constraint = accelerator.reduce(constraint, reduction="mean")
            calibrator.dual_step(constraint)
            if self.config.calibration.langevin_drift_step == "auto":
                calibrator.adapt_drift_step(constraint)
            if self.overfitting is not None and self.step % MEASURED_EVERY == 0:
                number, found = self.step // MEASURED_EVERY, (energies.energy_real, calibration.energy_samples)
                means = compare_with_held_out(accelerator, self.feed, number, frozen_energy, *found)
                self.overfitting.update(means, MEASURED_EVERY * self.images_per_step)
        self.task.end_step()
        if self.ema is not None:
            self.ema.update_parameters(self.task.generator)
        self.recovery.note_peaks(peaks)
        if self.is_observed(self.step + 1):
            scalars["data_spread"] = batch_spread(real)
            if energy is not None:
                scalars |= {name: calibration[name] for name in ("constraint", "noise_floor", "drift")}
                scalars["calibration_gradient_norm"] = calibration.gradient_norm
                scalars["sample_spread"] = batch_spread(samples.detach())
                scalars |= moments("energy_real", energies.energy_real)
                scalars |= moments("energy_samples", calibration.energy_samples)
                scalars |= moments("energy_targets", energies.energy_targets)
        return scalars

    def is_logged(self, step: int) -> bool:
        return step % self.config.run.log_steps == 0 or step == self.num_steps

    def is_observed(self, step: int) -> bool:
        """Return whether the guard looks at a step: at each logged one, and at others if few are logged."""
        return step % self.recovery.interval == 0 or self.is_logged(step)

    def observe(self, scalars: dict[str, torch.Tensor]) -> list[str]:
        """Show an observed step's scalars to the guard and return its alarms. Without alarms, log the step if it is due."""
        calibrator, recovery = self.calibrator, self.recovery
        observed: dict[str, Any] = reduce_scalars(self.accelerator, {**scalars, **recovery.peaks})
        if calibrator is not None:
            observed |= {"dual": calibrator.dual.item(), "tolerance": calibrator.resolve_tolerance()}
            observed["drift_tolerance"] = calibrator.resolve_drift_tolerance()
            observed["langevin_drift_step"] = calibrator.drift_step_size
            observed |= calibration_state(observed)
        if self.overfitting is not None:
            observed |= self.overfitting.scalars()
        largest = {name: max(observed[name], recovery.logged_peaks.get(name, -math.inf)) for name in recovery.peaks}
        recovery.peaks.clear()
        alarms = recovery.judge(self.step, observed)
        recovery.logged_peaks = largest
        if not alarms and self.is_logged(self.step):
            self.log({**observed, **largest})
            recovery.logged_peaks = {}
        return alarms

    def log(self, logged: dict[str, Any]) -> None:
        """Write scalars to the log and the trackers, and show some of them in the progress bar."""
        accelerator, calibrator = self.accelerator, self.calibrator
        logged["learning_rate"] = self.generator.lr_scheduler.get_last_lr()[0]
        if self.energy is not None:
            logged["energy_learning_rate"] = self.energy.lr_scheduler.get_last_lr()[0]
        images = (self.step - self.started_step) * self.images_per_step
        logged["images_per_second"] = round(images / (self.stopwatch.seconds - self.started), 1)
        logged["training_seconds"] = round(self.stopwatch.seconds, 3)
        logged["peak_memory_gib"] = round(peak_memory(accelerator.device), 3)
        if accelerator.is_main_process:
            epoch = {}
            if self.feed.batches_per_epoch is not None:
                epoch = {"epoch": (self.step * self.num_batches - 1) // self.feed.batches_per_epoch}
            RunLog(self.output_dir / METRICS_FILE).write(step=self.step, **epoch, **logged)
        if self.config.run.report_to is not None:
            accelerator.log(logged, step=self.step)
        shown = {self.task.headline: f"{logged[self.task.headline]:.4g}"}
        if calibrator is not None:
            off = " (calibration is off)" if logged["calibration_off"] else ""
            shown |= {"lambda": f"{logged['dual']:.1f}{off}", "drift": f"{logged['drift']:.4f}"}
        self.progress.set_postfix(shown, refresh=False)

    def roll_back(self, alarms: list[str]) -> None:
        """
        Roll back to a healthy state, with a lower learning rate and the data in another order.

        Raises:
            Stopped: if there were `--max_rollbacks` rollbacks already. The healthy state is saved.
        """
        broke_at = self.step
        self.step, go_on = self.recovery.roll_back(self.step, alarms)
        self.patience.cut(self.step)
        # Remove later checkpoints first: if the run is killed here, the newest one must be healthy.
        if self.accelerator.is_main_process:
            cut_run(self.output_dir, self.step)
        with self.stopwatch.paused():
            self.save_checkpoint()
        if not go_on:
            self.save()
            rate = "--energy_learning_rate" if self.energy is not None else "--learning_rate"
            raise Stopped(
                f"stopped at step {broke_at} after {self.config.guard.max_rollbacks} rollbacks: {'; '.join(alarms)}. The healthy "
                f"state of step {self.step} is saved. Start a new run from it with --pretrained_model_name_or_path "
                f"{str(self.output_dir)!r} and another --output_dir, and try a lower {rate}, --max_grad_norm or --mixed_precision no."
            )
        self.progress.n = self.step
        self.progress.refresh()
        self.started, self.started_step = self.stopwatch.seconds, self.step

    def save_checkpoint(self) -> None:
        limit = self.config.run.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.step, self.build_pipeline, limit)

    def evaluate(self) -> None:
        """Evaluate the exported generator. If it is the best one so far, save its pipeline in `best/`."""
        measures = self.evaluation.measure(self.exported, self.output_dir, self.step)
        best = self.patience.is_best(measures, self.step) and self.task.samples_change
        if self.accelerator.is_main_process:
            measures |= self.task.measure(self.exported, self.evaluation.reference)
        stated = {name: value for name, value in measures.items() if value is not None}
        logger.info(f"Step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in stated.items()))
        if self.accelerator.is_main_process:
            features = self.config.evaluation.evaluation_features
            RunLog(self.output_dir / EVALUATIONS_FILE).write(step=self.step, **measures, features=features)
            if best:
                with replacing(self.output_dir / BEST_FOLDER) as temporary:
                    self.build_pipeline().save_pretrained(temporary)
        if self.config.run.report_to is not None:
            numbers = {f"evaluation/{name}": value for name, value in stated.items()}
            self.accelerator.log(numbers, step=self.step)

    def save(self) -> None:
        """Save the pipeline of the last step or, after early stopping, the best one."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        pipeline = self.build_pipeline()
        if self.patience.is_over and self.patience.has_best:
            pipeline = type(pipeline).from_pretrained(self.output_dir / BEST_FOLDER, low_cpu_mem_usage=False)
            pipeline.to(self.accelerator.device)
        self.task.finish(getattr(pipeline, self.task.component), self.feed)
        with progress("Saving", total=1, delay=0) as bar:
            save_pipeline(pipeline, self.output_dir)
            bar.update()
        loads = f"{self.task.saved_class}.from_pretrained({str(self.output_dir)!r})"
        logger.info(f"Saved to {self.output_dir}. Load with {loads}.")

    def close(self) -> None:
        """
        End the run in all processes together.

        The wrapped networks must be freed before the process group. Otherwise their gradient reducer would free the group while
        it holds Python's lock, for which the group's threads may be waiting.
        """
        self.accelerator.wait_for_everyone()
        del self.generator, self.energy, self.recovery
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()
