"""The output folder of a run: its files, what may be overwritten, and a lock against a second run."""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ecvae_diffusers.atomic import discard, remove, writing
from ecvae_diffusers.hub.modular import MODULAR_FILES
from ecvae_diffusers.training.run.checkpoints import CHECKPOINT, checkpoint_step, checkpoints
from ecvae_diffusers.training.run.log import (
    ARGUMENTS_FILE,
    ENERGIES_FILE,
    EVALUATIONS_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    RunLog,
    read_arguments,
)


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Errors of file systems that have no locks, such as some network file systems.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
HASHES_FILE = "training_images.txt"  # hashes of the training images
BEST_FOLDER = "best"
PICTURES = ("samples", "reconstructions", "chain", "neighbours")
STEP_FILE = re.compile(r"step-(\d+)\.png")
RUN_FOLDERS = {*PICTURES, "vae", "flow", "energy_model", "scheduler", BEST_FOLDER, "logs"}
RUN_FILES = {
    METRICS_FILE, ENERGIES_FILE, EVALUATIONS_FILE, EVENTS_FILE, HASHES_FILE, "report.html", "model_index.json", "pipeline.py",
    "restoration.py", *MODULAR_FILES, "config.json", "diffusion_pytorch_model.safetensors",
}  # fmt: skip


def check_output_dir(output_dir: Path, overwrite: bool, resume: bool, component: str) -> None:
    """
    Check that a run in `output_dir` would destroy nothing. Raises `ValueError` if the folder holds files that are not of a run, a run of
    another script (with another `component`), or a run that is neither resumed nor overwritten.
    """
    if not output_dir.exists() or {path.name for path in output_dir.iterdir()} <= {LOCK_FILE, f".{ARGUMENTS_FILE}"}:
        return
    named = f"--output_dir {str(output_dir)!r}"
    if not (output_dir / ARGUMENTS_FILE).is_file():
        raise ValueError(f"{named} holds files that are not from a training run: choose another folder.")
    found = component
    with suppress(ValueError):  # `check_resumed_arguments` reports what is wrong with the file, if it is needed
        found = read_arguments(output_dir).get("component") or component
    if found != component:
        raise ValueError(
            f"{named} holds a training run of another script (it trains a {found}, not a {component}): choose another folder."
        )
    can_resume = bool(checkpoints(output_dir))
    if not (overwrite or resume):
        ways = "resume it with --resume_from_checkpoint latest, " if can_resume else ""
        ways += "replace it with --overwrite_output_dir, or choose another folder."
        raise ValueError(f"{named} holds a training run: {ways}")
    if not (overwrite or can_resume) and (is_finished(output_dir) or (output_dir / BEST_FOLDER).is_dir()):
        raise ValueError(
            f"--resume_from_checkpoint finds no checkpoint in {str(output_dir)!r}, only a finished or best "
            "model, which a new run would replace: use --overwrite_output_dir, or choose another folder."
        )


def check_pretrained_stays(output_dir: Path, name_or_path: str) -> None:
    """Raise `ValueError` if the pretrained model lies in `output_dir`, where a new run would remove it at its start."""
    path = Path(name_or_path)
    if path.exists() and path.resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(
            f"--pretrained_model_name_or_path {name_or_path!r} must not lie in --output_dir {str(output_dir)!r}, which the "
            "new run replaces: choose another --output_dir."
        )


def is_finished(output_dir: Path) -> bool:
    """Return whether a run has saved its final pipeline, or its final model without a pipeline."""
    return any((output_dir / name).is_file() for name in ("model_index.json", "config.json"))


def clear_run(output_dir: Path) -> None:
    """Remove the files that a run wrote, and no others. The card is kept, since it may have been edited by hand."""
    for path in output_dir.iterdir():
        if CHECKPOINT.fullmatch(path.name.lstrip(".")) or path.name in RUN_FOLDERS:
            discard(path)
        elif path.name in RUN_FILES:
            path.unlink()


def remove_leftovers(output_dir: Path) -> None:
    """Remove files and folders that a killed process left half written or half removed."""
    for path in output_dir.iterdir():
        name = path.name.removeprefix(".discarded-").removeprefix(".")
        if path.name.startswith(".") and (CHECKPOINT.fullmatch(name) or name in RUN_FOLDERS | {"pipeline"}):
            remove(path)


def cut_run(output_dir: Path, last_step: int) -> None:
    """Remove what a run wrote at steps after `last_step`, from which it continues. Events are kept."""
    for name in (METRICS_FILE, ENERGIES_FILE, EVALUATIONS_FILE):
        RunLog(output_dir / name).cut(last_step)
    # Remove an incomplete last line, to which the next event would be appended.
    RunLog(output_dir / EVENTS_FILE).cut(sys.maxsize)
    for path in (path for kind in PICTURES for path in (output_dir / kind).glob("step-*.png")):
        if (found := STEP_FILE.fullmatch(path.name)) and int(found[1]) > last_step:
            path.unlink()
    for path in checkpoints(output_dir):
        if checkpoint_step(path) > last_step:
            discard(path)


@contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    Create `--output_dir` if it is missing, and lock it for this process.

    The lock ends with the process, even if that is killed, and holds for other machines that share the folder. A new folder to
    which nothing else was written is removed again. Raises `ValueError` if another process holds the lock or `output_dir` is a file,
    and `WriteError` if it can't be written.
    """
    output_dir = Path(output_dir)
    is_new, lock = not output_dir.exists(), FileLock(output_dir / LOCK_FILE, timeout=0)
    if output_dir.is_file():
        raise ValueError(f"--output_dir must be a folder, but {str(output_dir)!r} is a file.")
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"--output_dir {str(output_dir)!r} is in use by another run: wait for it, stop it, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(f"{str(output_dir)!r} is on a file system without locks: do not start a second run there.")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows can't remove an open file
            (output_dir / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                output_dir.rmdir()


@contextmanager
def locked_by_main(accelerator: Accelerator, output_dir: str | os.PathLike) -> Iterator[None]:
    """Run `locked` in the main process. All processes wait for it, and raise its error if it fails."""
    with ExitStack() as stack:
        failure: list[Exception | None] = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(locked(output_dir))
            except (ValueError, OSError) as error:
                failure = [error]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        yield
