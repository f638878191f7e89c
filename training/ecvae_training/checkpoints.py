"""Checkpoints through Accelerate, written beside their place and renamed, so that a whole one is always there."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ecvae_training.output import checkpoints, discard


class SavingFailed(Exception):
    """A checkpoint or a pipeline could not be written; the message says what is left."""


@contextmanager
def saving(what: str, output_dir: Path, temporary: Path) -> Iterator[None]:
    """Turn the errors of a failed write, as on a full disk, into `SavingFailed`, and remove what was written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Of torch's own writing; another process that fails, or a device's memory, says RuntimeError too.
        if isinstance(error, RuntimeError) and not any(
            word in str(error) for word in ("StreamWriter", "unexpected pos")
        ):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        whole = [path.name for path in checkpoints(output_dir)]
        left = f"Whole are {', '.join(whole)}" if whole else "There is no earlier one"
        raise SavingFailed(
            f"{what} could not be written to {str(output_dir)!r}: {error}. Is the disk full "
            f"({shutil.disk_usage(output_dir).free / 2**30:.1f} GiB are free)? {left}: make room, and go on with "
            "--resume_from_checkpoint latest; --checkpoints_total_limit keeps fewer."
        ) from error


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, build_pipeline: Callable[[], DiffusionPipeline]
) -> None:
    """
    Write `checkpoint-<step>`: Accelerate's state (networks, optimizers, schedules, moving average, dual variable, random
    states) and, in `pipeline/`, the pipeline as it is now, to be looked at with `from_pretrained`.

    Raises:
        SavingFailed: if it can't be written. What was written of it is removed.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}"
    if accelerator.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    accelerator.wait_for_everyone()
    with saving(final.name, output_dir, temporary):
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            build_pipeline().save_pretrained(temporary / "pipeline")
            if final.exists():
                discard(final)
            os.replace(temporary, final)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    accelerator.load_state(str(path))


def save_folder(pipeline: DiffusionPipeline, folder: Path) -> None:
    """
    Replace a pipeline's folder, which is whole at any moment but the one of its renaming.

    Raises:
        SavingFailed: if it can't be written.
    """
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with saving(folder.name, folder.parent, temporary):
        pipeline.save_pretrained(temporary)
        if folder.exists():
            discard(folder)
        os.replace(temporary, folder)


def save_pipeline(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """
    Write the pipeline into the run's own folder: beside it first, then each part into its place.

    Raises:
        SavingFailed: if it can't be written. What was there before stays.
    """
    temporary = output_dir / ".pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    with saving("the pipeline", output_dir, temporary):
        card = output_dir / "README.md"
        if card.is_file():
            # It may have been edited by hand, which `save_pretrained` sees.
            temporary.mkdir()
            shutil.copy2(card, temporary / card.name)
        pipeline.save_pretrained(temporary)
        for part in sorted(temporary.iterdir()):
            if (output_dir / part.name).is_dir():
                discard(output_dir / part.name)
            os.replace(part, output_dir / part.name)
        temporary.rmdir()
