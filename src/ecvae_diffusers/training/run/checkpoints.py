"""Checkpoints: saved through Accelerate next to their place and renamed, found, checked for damage, loaded, and limited in number."""

import hashlib
import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import patch_environment
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ecvae_diffusers.atomic import discard, move, remove, replacing, sync, temporary_path, write_json, writing
from ecvae_diffusers.training.run.log import read_arguments, readable_arguments


logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The SHA-256 of each file of a checkpoint. `pipeline/` is to be looked at, and may be changed. Checkpoints of 0.1 have none.
MANIFEST = "files.json"
# What every checkpoint has.
STATE_FILES = (
    "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl",
)  # fmt: skip
# Arguments that a resumed run may change: where things lie, how long it lasts, what is written when.
FREE_ON_RESUME = {
    "dataset_name", "train_data_dir", "cache_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "pretrained_model_name_or_path", "subfolder", "revision", "variant", "latents_file", "num_epochs", "max_train_steps", "dataloader_num_workers", "checkpointing_steps",
    "checkpoints_total_limit", "log_steps", "save_images_steps", "config", "report_to", "tracker_project_name",
    "evaluation_steps", "early_stopping_patience", "max_rollbacks", "healthy_states", "healthy_state_steps",
    "divergence_guard", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
}  # fmt: skip
# What runs did that were saved before an argument existed.
BEFORE = {"energy_gradient_penalty": 0.0, "relative_dual_step": True}


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(CHECKPOINT.fullmatch(path.name)[1])


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    Return the checkpoint to resume from, or `None` to start at 0. `"latest"` is the newest one without damage: a warning names
    those after it, which the run replaces.

    Raises:
        ValueError: if the one named is not there, damaged, or not the newest, from which two runs would mix; or if
            all are damaged.
    """
    if resume_from_checkpoint is None:
        return None
    found = checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        damaged = []
        for checkpoint in reversed(found):
            what = damage(checkpoint)
            if what is None:
                for name in damaged:
                    logger.warning(f"Damaged: {name}. Resuming from {checkpoint.name} instead, whose run replaces it.")
                return checkpoint
            damaged.append(f"{str(checkpoint)!r} ({what})")
        if damaged:
            raise ValueError(
                f"--resume_from_checkpoint latest must find a whole checkpoint, but all are damaged: {', '.join(damaged)}. "
                "Bring the files back, or start again with --overwrite_output_dir."
            )
        return None
    path = Path(resume_from_checkpoint)
    if len(path.parts) == 1:
        path = output_dir / path
    chosen = next((one for one in found if one.resolve() == path.resolve()), None)
    if chosen is None:
        raise ValueError(
            f"--resume_from_checkpoint must be 'latest' or one of {[one.name for one in found]} in "
            f"{str(output_dir)!r}, but is {resume_from_checkpoint!r}."
        )
    if chosen != found[-1]:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from_checkpoint!r} is not the newest: a run that resumes from it would mix "
            f"with what came later. Move {[one.name for one in found[found.index(chosen) + 1 :]]} away first."
        )
    if (what := damage(chosen)) is not None:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from_checkpoint!r} is damaged ({what}): 'latest' resumes from the newest that "
            "is whole."
        )
    return chosen


def damage(checkpoint: Path) -> str | None:
    """
    Return what is wrong with a checkpoint, in words: a file that is missing, or that is not as it was written. `None` if it is whole.

    Raises:
        OSError: if a file is there and can't be read, which another try may change.
    """
    if not checkpoint.is_dir():
        return "it is no folder"
    expected = dict.fromkeys(STATE_FILES)
    if (checkpoint / MANIFEST).exists():
        try:
            expected |= json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        except (ValueError, TypeError, IsADirectoryError):
            return f"{MANIFEST} can't be read"
    else:
        states = [path.name for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".bin", ".pkl")]
        expected |= dict.fromkeys(states)
    for name, digest in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing" if not path.exists() else f"{name} is no file"
        if not (is_whole(path) if digest is None else sha256(path) == digest):
            return f"{name} is not as it was written"
    return None


def is_whole(path: Path) -> bool:
    """Return whether a file of weights or states, of which no manifest tells, is there to its end."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(checkpoint: Path) -> None:
    """Note what each file of a checkpoint holds, so that `damage` can tell whether it still does."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(checkpoint / MANIFEST, {path.name: sha256(path) for path in files})


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, build_pipeline: Callable, limit: int | None = None
) -> None:
    """
    Write `checkpoint-<step>`: Accelerate's state (networks, optimizers, schedules, moving average, dual variable, random
    states) and, in `pipeline/`, the pipeline as it is now, to be looked at with `from_pretrained`. Then remove all but the newest
    `limit` checkpoints.

    Raises:
        WriteError: if it can't be written. What was written of it is removed.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary, main_process = temporary_path(final), accelerator.is_main_process
    with replacing(final) if main_process else writing(final):
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if main_process:
            write_manifest(temporary)
            build_pipeline().save_pretrained(temporary / "pipeline")
    accelerator.wait_for_everyone()
    if main_process:
        remove_old_checkpoints(output_dir, limit)


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    for path in checkpoints(output_dir)[:-limit] if limit is not None else []:
        discard(path)


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """
    Raises:
        ValueError: if it can't be loaded, or holds a pickle that would run code.
    """
    try:
        # Only tensors, numbers and containers, although Accelerate asks for all that is in `custom_checkpoint_*.pkl`.
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            accelerator.load_state(str(path))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{str(path)!r} can't be loaded ({reason}): move it away, and --resume_from_checkpoint latest resumes from the one "
            "before it."
        ) from error


def check_resumed_arguments(output_dir: Path, arguments: dict) -> None:
    """
    Refuse to resume a run under arguments that its checkpoint was not made with.

    Raises:
        ValueError: if an argument differs that would change the model or the course of training.
    """
    before = {**BEFORE, **read_arguments(output_dir)}
    free = FREE_ON_RESUME
    if before.get("evaluation_steps") is None:
        free = free | {"evaluation_features", "evaluation_samples", "early_stopping_metric"}
    changed = [
        f"--{name} (was {before[name]}, is {value})"
        for name, value in sorted(arguments.items())
        if name not in free and name in before and before[name] != value
    ]
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint requires the run's own arguments, but these differ: {', '.join(changed)}."
        )


def check_resumed_launch(output_dir: Path, launch: dict) -> None:
    """
    Refuse to resume a run on other data, or launched in another way, than its checkpoint was made with.

    Args:
        launch (`dict`): Images per step (of all processes), number and channels of the images, precision.

    Raises:
        ValueError: if one of them differs.
    """
    before = read_arguments(output_dir).get("launch", {})
    changed = [f"{name} (was {before[name]}, is {launch[name]})" for name in before if before[name] != launch[name]]
    if changed:
        raise ValueError(
            "--resume_from_checkpoint requires the run's own data, number of processes and precision, but these "
            f"differ: {', '.join(changed)}."
        )


def arguments_of_run(output_dir: str | Path) -> dict:
    """Return the arguments that a resumed run keeps if they are not given again: those of a run that has a checkpoint."""
    if not checkpoints(Path(output_dir)):
        return {}
    own = {**BEFORE, **readable_arguments(output_dir)}
    return {name: value for name, value in own.items() if name not in FREE_ON_RESUME}


def save_folder(pipeline: DiffusionPipeline, folder: Path) -> None:
    """
    Replace a pipeline's folder, which is whole at any moment except the one of its renaming.

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
                    move(part, output_dir / part.name)
            sync(output_dir, recursive=False)
        finally:
            remove(temporary)
