"""Save, find, check and load checkpoints. Each is written by Accelerate under a temporary name and then renamed."""

import hashlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import patch_environment
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ecvae_diffusers.atomic import discard, move, remove, replacing, sync, temporary_path, write_json, writing
from ecvae_diffusers.training.config import POSTERIOR_CALIBRATIONS
from ecvae_diffusers.training.run.log import read_arguments


logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The SHA-256 of each file of a checkpoint, except `pipeline/`, which users may change. Checkpoints of version 0.1 have no manifest.
MANIFEST = "files.json"
# Files of every checkpoint.
STATE_FILES = (
    "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl",
)  # fmt: skip
# Arguments that a resumed run does not inherit: paths, and arguments for publishing.
GIVEN_AGAIN = {
    "dataset_name", "train_data_dir", "cache_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "pretrained_model_name_or_path", "subfolder", "revision", "variant", "latents_file", "decoder_config", "config", "num_epochs",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
}  # fmt: skip
# Arguments that a resumed run may change: the ones above, the number of steps, and when to log, save and evaluate.
FREE_ON_RESUME = GIVEN_AGAIN | {
    "max_train_steps", "dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "log_steps",
    "save_images_steps", "report_to", "tracker_project_name", "evaluation_steps", "early_stopping_patience", "max_rollbacks",
    "healthy_states", "healthy_state_steps", "divergence_guard", "early_stopping_metric",
}  # fmt: skip
# Values for runs that were saved before an argument existed.
BEFORE = {"energy_gradient_penalty": 0.0, "relative_dual_step": True}


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    Return the checkpoint to resume from, or `None` to start at step 0.

    `"latest"` is the newest undamaged one. A warning names the damaged ones after it, which the run replaces. Raises `ValueError` if
    all are damaged, or if the named one is damaged or not the newest.
    """
    if resume_from_checkpoint is None:
        return None
    found = checkpoints(output_dir)
    damaged: list[str] = []
    if resume_from_checkpoint != "latest":
        path = Path(resume_from_checkpoint)
        path = output_dir / path if len(path.parts) == 1 else path
        if not found or found[-1].resolve() != path.resolve():
            raise ValueError(
                f"--resume_from_checkpoint must be 'latest' or the newest of {[one.name for one in found]} in "
                f"{str(output_dir)!r}, but is {resume_from_checkpoint!r}. To resume from an older one, move the newer ones away."
            )
        found = found[-1:]
    for checkpoint in reversed(found):
        if (what := damage(checkpoint)) is None:
            for name in damaged:
                logger.warning(
                    f"Damaged: {name}. Resuming from {checkpoint.name} instead; the run replaces the damaged one."
                )
            return checkpoint
        damaged.append(f"{str(checkpoint)!r} ({what})")
    if damaged:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from_checkpoint!r} finds only damaged checkpoints: {', '.join(damaged)}. Restore the "
            f"files, {'' if resume_from_checkpoint == 'latest' else 'resume from latest, '}or start again with --overwrite_output_dir."
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """
    Describe the damage of a checkpoint, or return `None` if it is complete. Raises `OSError` if a file exists but can't be read,
    which may be temporary.
    """
    digests = {}
    if (checkpoint / MANIFEST).exists():
        try:
            digests = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
        except (ValueError, TypeError, IsADirectoryError):
            return f"{MANIFEST} can't be read"
    for name in [*STATE_FILES, *digests]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if name in digests and sha256(path) != digests[name]:
            return f"{name} has changed since it was saved"
    return None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(checkpoint: Path) -> None:
    """Write the SHA-256 of each file of a checkpoint, from which `damage` tells whether a file has changed."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(checkpoint / MANIFEST, {path.name: sha256(path) for path in files})


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, build_pipeline: Callable, limit: int | None = None
) -> None:
    """
    Write `checkpoint-<step>`, then remove all but the newest `limit` checkpoints.

    A checkpoint holds Accelerate's state (networks, optimizers, schedules, moving average, dual variable, random states) and, in
    `pipeline/`, the current pipeline for `from_pretrained`. Raises `WriteError` if it can't be written; an incomplete checkpoint is
    removed.
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
    """Load a checkpoint. Raises `ValueError` if it can't be loaded, or holds a pickle that would run code."""
    try:
        # Load only tensors, numbers and containers, although Accelerate allows any object in `custom_checkpoint_*.pkl`.
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            accelerator.load_state(str(path))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{str(path)!r} can't be loaded ({reason}). Move it away, and resume from the one before it with "
            "--resume_from_checkpoint latest."
        ) from error


def check_resumed_arguments(output_dir: Path, arguments: dict, retired: dict[str, tuple[Any, str]]) -> None:
    """
    Check the arguments of a resumed run. Raises `ValueError` if one that affects the model or its training differs from the run's
    saved value, or if the run has a value of a `retired` argument that is no longer supported.
    """
    before = {**BEFORE, **read_arguments(output_dir)}
    for name, (value, reason) in retired.items():
        is_kept = name in arguments or name in FREE_ON_RESUME
        if not is_kept and before.get(name, value) != value and is_used(name, before):
            raise ValueError(
                f"--resume_from_checkpoint: the run in {str(output_dir)!r} has --{name} {before[name]}, which is retired "
                f"({reason}). Resume it with ecvae-diffusers 0.1."
            )
    free = {"evaluation_features", "evaluation_samples"} if before.get("evaluation_steps") is None else set()
    fixed = {f"--{name}": value for name, value in arguments.items() if name not in free | FREE_ON_RESUME}
    refuse_changes("arguments", {f"--{name}": value for name, value in before.items()}, fixed)


def check_resumed_launch(output_dir: Path, launch: dict) -> None:
    """Raise `ValueError` if a run is resumed with other data, another number of images per step or another precision."""
    refuse_changes("data, number of processes and precision", read_arguments(output_dir).get("launch", {}), launch)


def is_used(name: str, arguments: dict) -> bool:
    """Return whether an argument has an effect when a run with these arguments is resumed."""
    if name.startswith("posterior_"):
        return arguments.get("calibration") in POSTERIOR_CALIBRATIONS
    # A checkpoint holds the dual variables, so their initial values have no effect.
    return name != "initial_posterior_dual" and bool(name != "shuffle_buffer_size" or arguments.get("streaming"))


def refuse_changes(what: str, before: dict, now: dict) -> None:
    changed = [
        f"{name} (was {before[name]}, is {value})"
        for name, value in sorted(now.items())
        if name in before and before[name] != value
    ]
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint requires the same {what} as the run, but these differ: {', '.join(changed)}."
        )


def arguments_of_run(output_dir: str | Path) -> dict:
    """Return the saved arguments that a resumed run keeps unless they are given again; none if there is no checkpoint."""
    own = {}
    if checkpoints(Path(output_dir)):
        with suppress(ValueError):  # `check_resumed_arguments` reports what is wrong with the file
            own = {**BEFORE, **read_arguments(output_dir)}
    return {name: value for name, value in own.items() if name not in GIVEN_AGAIN}


def save_pipeline(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """
    Save the pipeline in the run's folder. It is first written to a temporary folder, from which each part is then moved. Raises
    `WriteError` if it can't be written; an earlier pipeline is kept.
    """
    temporary, card = output_dir / ".pipeline", output_dir / "README.md"
    with writing(output_dir):
        remove(temporary)
        try:
            if card.is_file():
                # `save_pretrained` keeps a card that was edited by hand.
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
