"""The output folder of a run: what is in it, what may be overwritten, and one process at a time."""

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
# What systems say of a folder, such as some of those on other machines, in which nothing can be locked.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
HASHES_FILE = "training_images.txt"  # of the images that a run was trained on
BEST_FOLDER = "best"
PICTURES = ("samples", "reconstructions", "chain", "neighbours")
STEP_FILE = re.compile(r"step-(\d+)\.png")
RUN_FOLDERS = {*PICTURES, "vae", "flow", "energy_model", "scheduler", BEST_FOLDER, "logs"}
RUN_FILES = {
    METRICS_FILE, ENERGIES_FILE, EVALUATIONS_FILE, EVENTS_FILE, HASHES_FILE, "report.html", "model_index.json", "pipeline.py",
    "restoration.py", "config.json", "diffusion_pytorch_model.safetensors",
}  # fmt: skip


def check_output_dir(output_dir: Path, overwrite: bool, resume: bool, component: str) -> None:
    """
    Raise `ValueError` if a run would lose something: files of others, of the script of another `component`, or of a run that is
    neither to be resumed nor to be overwritten.
    """
    if not output_dir.exists() or {path.name for path in output_dir.iterdir()} <= {LOCK_FILE, f".{ARGUMENTS_FILE}"}:
        return
    named = f"--output_dir {str(output_dir)!r}"
    if not (output_dir / ARGUMENTS_FILE).is_file():
        raise ValueError(f"{named} holds files that are not of a training run: choose another folder.")
    found = component
    with suppress(ValueError):  # what is wrong with the file `check_resumed_arguments` says, where it is needed
        found = read_arguments(output_dir).get("component") or component
    if found != component:
        raise ValueError(
            f"{named} holds the training run of another script (of a {found}, not of a {component}): choose another folder."
        )
    can_resume = bool(checkpoints(output_dir))
    if not (overwrite or resume):
        ways = "go on with --resume_from_checkpoint latest, " if can_resume else ""
        ways += "replace it with --overwrite_output_dir, or choose another folder."
        raise ValueError(f"{named} holds a training run: {ways}")
    if not (overwrite or can_resume) and (is_finished(output_dir) or (output_dir / BEST_FOLDER).is_dir()):
        raise ValueError(
            f"--resume_from_checkpoint finds no checkpoint in {str(output_dir)!r}, but a finished or best "
            "model, which a new run would replace: use --overwrite_output_dir, or choose another folder."
        )


def check_pretrained_stays(output_dir: Path, name_or_path: str) -> None:
    """Raise `ValueError` if a run in `output_dir` would remove, as it begins, what it starts from."""
    path = Path(name_or_path)
    if path.exists() and path.resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(
            f"--pretrained_model_name_or_path {name_or_path!r} must not lie in --output_dir {str(output_dir)!r}, which the "
            "new run replaces: choose another --output_dir."
        )


def is_finished(output_dir: Path) -> bool:
    """Return whether a run has saved its result: a pipeline, or a model alone."""
    return any((output_dir / name).is_file() for name in ("model_index.json", "config.json"))


def clear_run(output_dir: Path) -> None:
    """Remove what a run of this script wrote, and nothing else: a card that was edited by hand stays."""
    for path in output_dir.iterdir():
        if CHECKPOINT.fullmatch(path.name.lstrip(".")) or path.name in RUN_FOLDERS:
            discard(path)
        elif path.name in RUN_FILES:
            path.unlink()


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a kill has left half written, or half removed."""
    for path in output_dir.iterdir():
        name = path.name.removeprefix(".discarded-").removeprefix(".")
        if path.name.startswith(".") and (CHECKPOINT.fullmatch(name) or name in RUN_FOLDERS | {"pipeline"}):
            remove(path)


def cut_run(output_dir: Path, last_step: int) -> None:
    """Remove what a run wrote of steps after `last_step`, from which it continues. Events stay: they have happened."""
    for name in (METRICS_FILE, ENERGIES_FILE, EVALUATIONS_FILE):
        RunLog(output_dir / name).cut(last_step)
    # A line that a kill cut off would hide those after it.
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
    Hold `--output_dir`, which is made if it is not there, for this process. The lock ends with the process, however that ends, and
    is seen by other machines that share the folder. If nothing else was written, nothing is left. Raises `ValueError` if another
    process holds it, or it is a file, and `WriteError` if it can't be written.
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
            logger.warning(f"{str(output_dir)!r} lies on a file system without locks: start no second run there.")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open, and the folder may hold something by now
            (output_dir / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                output_dir.rmdir()


@contextmanager
def locked_by_main(accelerator: Accelerator, output_dir: str | os.PathLike) -> Iterator[None]:
    """`locked` in the main process. All processes wait for it, and raise what it raises."""
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
