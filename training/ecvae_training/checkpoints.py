"""Checkpoints through Accelerate, written beside their place and renamed, so that a whole one is always there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError


class SavingFailed(Exception):
    """A checkpoint could not be written; the message says what is left."""


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, build_pipeline: Callable[[], DiffusionPipeline]
) -> None:
    """
    Write `checkpoint-<step>`: Accelerate's state (networks, optimizers, schedules, moving average, dual variable, random
    states) and, in `pipeline/`, the pipeline as it is now, to be looked at with `from_pretrained`.

    Raises:
        SavingFailed: if it can't be written, as on a full disk. What was written of it is removed.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}"
    if accelerator.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            build_pipeline().save_pretrained(temporary / "pipeline")
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
    # torch says RuntimeError of a write that failed.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        whole = sorted(path.name for path in output_dir.glob("checkpoint-*"))
        left = f"Whole are {', '.join(whole)}" if whole else "There is no earlier one"
        raise SavingFailed(
            f"{final.name} could not be written to {str(output_dir)!r}: {error}. Is the disk full "
            f"({shutil.disk_usage(output_dir).free / 2**30:.1f} GiB are free)? {left}: make room, and go on with "
            "--resume_from_checkpoint latest; --checkpoints_total_limit keeps fewer."
        ) from error
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    accelerator.load_state(str(path))


def save_folder(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Replace a pipeline's folder, which is whole at any moment but the one of its renaming."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
