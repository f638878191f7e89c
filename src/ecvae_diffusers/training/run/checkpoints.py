"""Checkpoints through Accelerate, written next to their place and renamed, so that a whole one is always there."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ecvae_diffusers.atomic import discard, remove, replacing, sync, temporary_path, writing
from ecvae_diffusers.training.run.folder import write_manifest


# torch then reads no pickle that runs code, whatever its caller asks for: Accelerate asks for all of `custom_checkpoint_*.pkl`.
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Read tensors, numbers and containers from pickles, and refuse all else."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, build_pipeline: Callable[[], DiffusionPipeline]
) -> None:
    """
    Write `checkpoint-<step>`: Accelerate's state (networks, optimizers, schedules, moving average, dual variable, random
    states) and, in `pipeline/`, the pipeline as it is now, to be looked at with `from_pretrained`.

    Raises:
        WriteError: if it can't be written. What was written of it is removed.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = temporary_path(final)
    main_process = accelerator.is_main_process
    with replacing(final) if main_process else writing(final):
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if main_process:
            write_manifest(temporary)
            build_pipeline().save_pretrained(temporary / "pipeline")
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """
    Raises:
        ValueError: if it can't be loaded, or holds a pickle that would run code.
    """
    try:
        with weights_only():
            accelerator.load_state(str(path))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{str(path)!r} can't be loaded ({reason}): move it away, and --resume_from_checkpoint latest goes on from the one "
            "before it."
        ) from error


def save_folder(pipeline: DiffusionPipeline, folder: Path) -> None:
    """
    Replace a pipeline's folder, which is whole at any moment but the one of its renaming.

    Raises:
        WriteError: if it can't be written.
    """
    with replacing(folder) as temporary:
        pipeline.save_pretrained(temporary)


def save_pipeline(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """
    Write the pipeline into the run's own folder: next to it first, then each part into its place.

    Raises:
        WriteError: if it can't be written. What was there before stays.
    """
    temporary = output_dir / ".pipeline"
    with writing(output_dir):
        remove(temporary)
        try:
            card = output_dir / "README.md"
            if card.is_file():
                # It may have been edited by hand, which `save_pretrained` sees.
                temporary.mkdir()
                shutil.copy2(card, temporary / card.name)
            pipeline.save_pretrained(temporary)
            sync(temporary)
            for part in sorted(temporary.iterdir()):
                with writing(output_dir / part.name):
                    if (output_dir / part.name).is_dir():
                        discard(output_dir / part.name)
                    os.replace(part, output_dir / part.name)
            sync(output_dir, recursive=False)
        finally:
            remove(temporary)
