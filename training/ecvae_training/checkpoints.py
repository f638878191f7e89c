"""Checkpoints through Accelerate, written beside their place and renamed, so that a whole one is always there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, build_pipeline: Callable[[], DiffusionPipeline]
) -> None:
    """
    Write `checkpoint-<step>`: Accelerate's state (networks, optimizers, schedules, moving average, dual variable, random
    states) and, in `pipeline/`, the pipeline as it is now, to be looked at with `from_pretrained`.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}"
    if accelerator.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        build_pipeline().save_pretrained(temporary / "pipeline")
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    accelerator.load_state(str(path))
