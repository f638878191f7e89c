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
from ecvae_diffusers.training.data.loaders import build_feed
from ecvae_diffusers.training.run.folder import (
    check_output_dir,
    check_pretrained_stays,
    check_resumed_arguments,
    checkpoints,
    find_checkpoint,
    is_finished,
)
from ecvae_diffusers.training.run.last_line import announce, fail
from ecvae_diffusers.training.run.launch import build_accelerator
from ecvae_diffusers.training.run.lock import locked_by_main
from ecvae_diffusers.training.run.places import check_places
from ecvae_diffusers.training.tasks.base import Task
from ecvae_diffusers.training.trainer import Stopped, Trainer


logger = logging.getLogger(__name__)


def train(
    args: Namespace,
    load: Callable[[Path | None], Any],
    build_task: Callable[[Any, Any], Task],
    task_class: type[Task],
) -> None:
    """
    One run, from its checked command line to its saved, and perhaps published, pipeline. One process at a time has the folder.

    Args:
        args: The command line.
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
    accelerator = build_accelerator(args)
    with locked_by_main(accelerator, args.output_dir):
        train_alone(args, accelerator, load, build_task, task_class)


def train_alone(
    args: Namespace, accelerator: Accelerator, load: Callable, build_task: Callable, task_class: type[Task]
):
    """`train`, where no other run has the folder."""
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint is not None
    check_output_dir(output_dir, args.overwrite_output_dir, resume, task_class.component)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumed_arguments(output_dir, vars(args))
    elif args.pretrained_model_name_or_path is not None:
        check_pretrained_stays(output_dir, args.pretrained_model_name_or_path)
    # Opened, checked and decoded before anything is written.
    loaded = load(checkpoint)
    feed = build_feed(args, accelerator, train_batch_size=args.train_batch_size, seed=args.seed)
    num_steps = args.max_train_steps
    if num_steps is None:
        num_steps = max(args.num_epochs * feed.batches_per_epoch // args.gradient_accumulation_steps, 1)

    set_seed(args.seed)
    trainer = Trainer(args, accelerator, feed, build_task(loaded, feed), num_steps)
    images = f"{feed.num_images} images" if feed.num_images is not None else "A stream of images"
    if accelerator.is_main_process:
        logger.info(
            f"{images} of {feed.channels}x{args.resolution}x{args.resolution}, {trainer.images_per_step} a step, {num_steps} "
            f"steps, calibration: {args.calibration}."
        )
    repository = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        # Not before: a run that its data or its networks refuse leaves no empty repository.
        open_repository(
            repository, private=args.hub_private_repo, revision=args.hub_revision, name=task_class.published
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


def run_script(name: str, args: Namespace, main: Callable[[Namespace], None]) -> None:
    """`main(args)`, whose errors that a user can mend end the process with one line, and what to do."""
    try:
        check_places(args)
        main(args)
    except UploadError as error:
        where = f"--hub_model_id {args.hub_model_id or Path(args.output_dir).resolve().name}"
        where += " --hub_private_repo" if args.hub_private_repo else ""
        where += f" --hub_revision {args.hub_revision}" if args.hub_revision is not None else ""
        what_to_do = f" The model is saved: training/publish.py {args.output_dir} {where} uploads it."
        what_to_do = what_to_do if is_finished(Path(args.output_dir)) else ""
        fail(f"{name}: error: --push_to_hub: {error}{what_to_do}")
    except WriteError as error:
        found = checkpoints(Path(args.output_dir))
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
            f"{name}: error: {error} Lower --train_batch_size (--gradient_accumulation_steps keeps the images a step), or use "
            "--gradient_checkpointing or --mixed_precision bf16, and resume with --resume_from_checkpoint latest."
        )
    except Exception as error:
        # A fault of the code, whose traceback says where: its line comes last, too.
        announce(" ".join(f"{name}: {type(error).__name__}: {error}".split()))
        raise
    except KeyboardInterrupt:
        found = checkpoints(Path(args.output_dir))
        left = (
            f"go on from {found[-1].name} with --resume_from_checkpoint latest" if found else "no checkpoint was saved"
        )
        fail(f"{name}: interrupted: {left}.")
