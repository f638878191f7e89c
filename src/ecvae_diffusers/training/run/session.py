"""What every training script does around its task: check, open the data, train, publish, and say what went wrong."""

import errno
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ecvae_diffusers.atomic import WriteError
from ecvae_diffusers.hub.upload import UploadError, open_repository, upload_folder
from ecvae_diffusers.training.command_line import RETIRED
from ecvae_diffusers.training.config import TrainingConfig
from ecvae_diffusers.training.data.loaders import build_feed
from ecvae_diffusers.training.run.checkpoints import check_resumed_arguments, checkpoints, find_checkpoint
from ecvae_diffusers.training.run.folder import check_output_dir, check_pretrained_stays, is_finished, locked_by_main
from ecvae_diffusers.training.run.last_line import announce, fail
from ecvae_diffusers.training.run.launch import build_accelerator
from ecvae_diffusers.training.run.places import check_places
from ecvae_diffusers.training.tasks.base import Task
from ecvae_diffusers.training.trainer import Stopped, Trainer


logger = logging.getLogger(__name__)

# What a run of 0.1 must have had of a retired flag to be resumed; a checkpoint holds its dual variables.
KEPT = {name: value for name, (value, _) in RETIRED.items() if name != "initial_posterior_dual"}


def train(
    config: TrainingConfig,
    load: Callable[[Path | None], Any],
    build_task: Callable[[Any, Any], Task],
    task_class: type[Task],
) -> None:
    """
    One run, from its checked command line to its saved, and perhaps published, pipeline. One process at a time has the folder.

    Args:
        config ([`TrainingConfig`]): Resolved and checked.
        load (`Callable`): What the run starts from, such as pretrained networks, given the checkpoint that it resumes from, if
            there is one. Called before the data is opened, which can take minutes, since what is wrong with it is told in seconds.
        build_task (`Callable`): The task, of what `load` gave and of the feed. All that it draws depends on `--seed` alone.
        task_class (`type`): Its class.

    Raises:
        Stopped: if the run ended before its last step.
        ValueError: if folder, data, networks or ways of launching do not fit, or another run has the folder.
        WriteError: if something can't be written; what was whole stays.
        UploadError: if publishing failed; the model is saved.
    """
    accelerator = build_accelerator(config)
    with locked_by_main(accelerator, config.run.output_dir):
        train_alone(config, accelerator, load, build_task, task_class)


def train_alone(
    config: TrainingConfig, accelerator: Accelerator, load: Callable, build_task: Callable, task_class: type[Task]
) -> None:
    """`train`, where no other run has the folder."""
    run, hub, model = config.run, config.hub, config.model
    output_dir = Path(run.output_dir)
    resume = run.resume_from_checkpoint is not None
    check_output_dir(output_dir, run.overwrite_output_dir, resume, task_class.component)
    checkpoint = find_checkpoint(output_dir, run.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumed_arguments(output_dir, {**KEPT, **config.flat()})
    elif model.pretrained_model_name_or_path is not None:
        check_pretrained_stays(output_dir, model.pretrained_model_name_or_path)
    # Opened, checked and decoded before anything is written.
    loaded = load(checkpoint)
    optimizer = config.optimizer
    feed = build_feed(config.data, accelerator, train_batch_size=optimizer.train_batch_size, seed=optimizer.seed)

    set_seed(config.optimizer.seed)
    trainer = Trainer(config, accelerator, feed, build_task(loaded, feed))
    images = f"{feed.num_images} images" if feed.num_images is not None else "A stream of images"
    if accelerator.is_main_process:
        logger.info(
            f"{images} of {feed.channels}x{config.data.resolution}x{config.data.resolution}, {trainer.images_per_step} per step, "
            f"{config.optimizer.max_train_steps} steps, calibration: {model.calibration}."
        )
    repository = hub.hub_model_id or output_dir.resolve().name
    if hub.push_to_hub and accelerator.is_main_process:
        # Not before: a run that its data or its networks refuse leaves no empty repository.
        open_repository(repository, private=hub.hub_private_repo, name=task_class.published)
    try:
        trainer.train(checkpoint)
    except Stopped:
        trainer.close()
        raise
    main_process = accelerator.is_main_process
    trainer.close()
    if hub.push_to_hub and main_process:
        url = upload_folder(output_dir, repository, private=hub.hub_private_repo)
        logger.info(f"Published: {url}")


def run_script(name: str, config: TrainingConfig, run: Callable[[Any], None]) -> None:
    """Call `run(config)`. Errors that a user can mend end the process with one line, and what to do."""
    output_dir = Path(config.run.output_dir)
    try:
        check_places(Namespace(**config.flat()))
        run(config)
    except UploadError as error:
        where = f"--hub_model_id {config.hub.hub_model_id or output_dir.resolve().name}"
        where += " --hub_private_repo" if config.hub.hub_private_repo else ""
        what_to_do = f" The model is saved: ecvae publish {output_dir} {where} uploads it."
        what_to_do = what_to_do if is_finished(output_dir) else ""
        fail(f"{name}: error: --push_to_hub: {error}{what_to_do}")
    except WriteError as error:
        found = checkpoints(output_dir)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what_to_do = "make room (--checkpoints_total_limit keeps fewer), and " if is_full else "mend that, and "
        what_to_do += "resume with --resume_from_checkpoint latest."
        left = f" {found[-1].name} is the newest checkpoint: {what_to_do}" if found else ""
        fail(f"{name}: error: {error}{left}")
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        fail(f"{name}: error: {error}")
    except Stopped as message:
        fail(f"{name}: {message}")
    except torch.OutOfMemoryError as error:
        fail(
            f"{name}: error: {error} Lower --train_batch_size (--gradient_accumulation_steps keeps the images per step), or use "
            "--gradient_checkpointing or --mixed_precision bf16, and resume with --resume_from_checkpoint latest."
        )
    except Exception as error:
        # A fault of the code, whose traceback says where: its line comes last, too.
        announce(" ".join(f"{name}: {type(error).__name__}: {error}".split()))
        raise
    except KeyboardInterrupt:
        found = checkpoints(output_dir)
        left = (
            f"go on from {found[-1].name} with --resume_from_checkpoint latest" if found else "no checkpoint was saved"
        )
        fail(f"{name}: interrupted: {left}.")
