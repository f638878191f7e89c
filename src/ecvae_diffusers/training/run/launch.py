"""Run a training script: set up Accelerate, lock the output folder, open the data, train, save and publish."""

import ctypes
import errno
import logging
import platform
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.utils import logging as diffusers_logging

from ecvae_diffusers.atomic import WriteError
from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.command import announce, check_places, fail
from ecvae_diffusers.hub.upload import UploadError, open_repository, upload_folder
from ecvae_diffusers.training.command_line import RETIRED
from ecvae_diffusers.training.config import TrainingConfig
from ecvae_diffusers.training.data.loaders import build_feed
from ecvae_diffusers.training.run.checkpoints import check_resumed_arguments, checkpoints, find_checkpoint
from ecvae_diffusers.training.run.folder import check_output_dir, check_pretrained_stays, is_finished, locked_by_main
from ecvae_diffusers.training.tasks.base import Task
from ecvae_diffusers.training.trainer import Stopped, Trainer


logger = logging.getLogger(__name__)

# Parameters of `mallopt`, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MOST_BYTES = 2**31 - 1
# Steps from one check whether any process received a signal to the next: each check waits for the device.
ASKED_EVERY = 5


def keep_freed_memory() -> bool:
    """
    Let malloc keep freed memory for the next tensor, instead of returning it to the system. Return whether this worked (glibc only).

    Each training step allocates the same tensors again. On a CPU, fetching zeroed pages for a tensor of more than 32 MB would cost more
    than computing it (`docs/results/growth/handed_back.md`).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST_BYTES))


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """
    Return the accelerator of a run. Raises `ValueError` if the kind of distributed training supports only one model, or if the
    precision is not supported on this machine.
    """
    run, optimizer = config.run, config.optimizer
    accelerator = Accelerator(
        # Explicit, because each of several processes without an accelerator would otherwise run as the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=optimizer.mixed_precision,
        log_with=run.report_to,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=f"{run.output_dir}/logs"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=optimizer.seed),
        # Accumulation continues across epochs, so that every step has the same number of batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=optimizer.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} trains only one model, but this script trains two: use data parallel training "
            "(`accelerate launch --multi_gpu`)."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        if accelerator.mixed_precision == "fp16":
            raise ValueError("--mixed_precision must be bf16 or no on a CPU, but is fp16.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it logs every file of a checkpoint
    diffusers_logging.set_verbosity_error()
    return accelerator


class StopSignal:
    """
    A context in which the first SIGTERM or SIGINT (a cluster's time limit, or Ctrl-C) ends the run after its current step, with a
    checkpoint. A second SIGINT interrupts at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, False

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def is_agreed(self, step: int) -> bool:
        """Return whether any process received a signal. All processes ask at the same step and get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % ASKED_EVERY:
            return False
        flag = torch.tensor(float(self.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def train(
    config: TrainingConfig,
    load: Callable[[Path | None], Any],
    build_task: Callable[[Any, Any], Task],
    task_class: type[Task],
) -> None:
    """
    Train, save and, with `--push_to_hub`, publish. The output folder is locked meanwhile.

    Args:
        config ([`TrainingConfig`]): The configuration of the run.
        load (`Callable`): Takes the checkpoint to resume from, or `None`, and returns what the run starts from, such as pretrained
            networks. It is called before the data is opened, because its errors show in seconds and opening data can take minutes.
        build_task (`Callable`): Takes the result of `load` and the feed, and returns the task. Its random draws depend only on `--seed`.
        task_class (`type`): The class of the task.

    Raises:
        Stopped: if the run ended before its last step.
        ValueError: if the folder, the data, the networks or the launch are not usable, or another run holds the folder.
        WriteError: if something can't be written. Complete files are kept.
        UploadError: if publishing failed. The model is saved.
    """
    accelerator = build_accelerator(config)
    run, hub, model, optimizer = config.run, config.hub, config.model, config.optimizer
    output_dir, main_process = Path(str(run.output_dir)), accelerator.is_main_process
    with locked_by_main(accelerator, output_dir):
        resume = run.resume_from_checkpoint
        check_output_dir(output_dir, run.overwrite_output_dir, resume is not None, task_class.component)
        checkpoint = find_checkpoint(output_dir, resume)
        if checkpoint is not None:
            check_resumed_arguments(output_dir, config.flat(), RETIRED)
        elif model.pretrained_model_name_or_path is not None:
            check_pretrained_stays(output_dir, model.pretrained_model_name_or_path)
        # Networks and data are loaded and checked before anything is written.
        loaded = load(checkpoint)
        feed = build_feed(config.data, accelerator, train_batch_size=optimizer.train_batch_size, seed=optimizer.seed)
        set_seed(optimizer.seed)
        trainer = Trainer(config, accelerator, feed, build_task(loaded, feed))
        if main_process:
            size = (feed.channels, *height_and_width(config.data.resolution))
            images = f"{feed.num_images} images" if feed.num_images is not None else "A stream of images"
            logger.info(
                f"{images} of {'x'.join(map(str, size))}, {trainer.images_per_step} per step, {optimizer.max_train_steps} steps, calibration: {model.calibration}."
            )
        repository = hub.hub_model_id or output_dir.resolve().name
        if hub.push_to_hub and main_process:
            # Only now, so that a run with unusable data or networks leaves no empty repository.
            open_repository(repository, private=hub.hub_private_repo, name=task_class.published)
        try:
            with StopSignal(accelerator) as stop:
                trainer.train(checkpoint, stop.is_agreed)
        except Stopped:
            trainer.close()
            raise
        trainer.close()
        if hub.push_to_hub and main_process:
            url = upload_folder(output_dir, repository, private=hub.hub_private_repo)
            logger.info(f"Published: {url}")


def run_script(name: str, config: TrainingConfig, run: Callable[[Any], None]) -> None:
    """Call `run(config)`. Errors that a user can fix end the process with one line that says what to do."""
    output_dir, hub = Path(str(config.run.output_dir)), config.hub
    try:
        check_places(Namespace(**config.flat()))
        run(config)
    except UploadError as error:
        private = " --hub_private_repo" if hub.hub_private_repo else ""
        command = f"ecvae publish {output_dir} --hub_model_id {hub.hub_model_id or output_dir.resolve().name}{private}"
        saved = f" The model is saved. Upload it with: {command}" if is_finished(output_dir) else ""
        fail(f"{name}: error: --push_to_hub: {error}{saved}")
    except WriteError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space (--checkpoints_total_limit keeps fewer checkpoints)" if is_full else "fix that"
        fail(f"{name}: error: {error} {way_on(output_dir, mend + ', and ')}")
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        fail(f"{name}: error: {error}")
    except Stopped as message:
        fail(f"{name}: {message}")
    except torch.OutOfMemoryError as error:
        fail(
            f"{name}: error: {error} Lower --train_batch_size (--gradient_accumulation_steps keeps the images per step), or use "
            f"--gradient_checkpointing. {way_on(output_dir)}"
        )
    except Exception as error:
        # A bug: the traceback shows where, and the last line names the error.
        announce(f"{name}: {type(error).__name__}: {error}")
        raise
    except KeyboardInterrupt:
        fail(f"{name}: interrupted. {way_on(output_dir)}")


def way_on(output_dir: Path, mend: str = "") -> str:
    """Return one sentence on how to resume the run. `mend` says what to do first."""
    if not (found := checkpoints(output_dir)):
        return "No checkpoint was saved."
    return f"The newest checkpoint is {found[-1].name}: {mend}resume with --resume_from_checkpoint latest."
