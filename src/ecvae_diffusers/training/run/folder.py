"""What a run leaves in its output folder: the check that nothing is overwritten, metrics, sample grids, checkpoints."""

import hashlib
import json
import logging
import re
import sys
import zipfile
from pathlib import Path

import PIL.Image
import torch
from safetensors import SafetensorError, safe_open

from ecvae_diffusers.atomic import discard, remove, replacing, to_json, write_json, write_text, writing
from ecvae_diffusers.training.data.transforms import to_uint8
from ecvae_diffusers.training.run.lock import LOCK_FILE


logger = logging.getLogger(__name__)


ARGUMENTS_FILE = "training_args.json"
METRICS_FILE = "metrics.jsonl"
ENERGIES_FILE = "energies.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVENTS_FILE = "events.jsonl"
HASHES_FILE = "training_images.txt"  # of the images that a run was trained on
BEST_FOLDER = "best"
# Of a checkpoint: the SHA-256 of each of its own files. `pipeline/` is to be looked at, and may be changed.
MANIFEST = "files.json"
# What every checkpoint has; those of before the manifest are known by them.
STATE_FILES = (
    "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl",
)  # fmt: skip
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STEP_FILE = re.compile(r"step-(\d+)\.png")
PICTURES = ("samples", "reconstructions", "chain", "neighbours")
RUN_FOLDERS = {*PICTURES, "vae", "flow", "energy_model", "scheduler", BEST_FOLDER, "logs"}
RUN_FILES = {
    METRICS_FILE, ENERGIES_FILE, EVALUATIONS_FILE, EVENTS_FILE, HASHES_FILE, "report.html", "model_index.json", "pipeline.py",
    "restoration.py", "config.json", "diffusion_pytorch_model.safetensors",
}  # fmt: skip
# Arguments that may change when a run is gone on with: where things lie, how long it lasts, what is written when.
FREE_ON_RESUME = {
    "dataset_name", "train_data_dir", "cache_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "pretrained_model_name_or_path", "subfolder", "revision", "variant", "latents_file", "num_epochs", "max_train_steps", "dataloader_num_workers", "checkpointing_steps",
    "checkpoints_total_limit", "log_steps", "save_images_steps", "config", "report_to", "tracker_project_name",
    "evaluation_steps", "early_stopping_patience", "max_rollbacks", "healthy_state_steps", "healthy_states",
    "divergence_guard", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
}  # fmt: skip


# What runs did that were saved before an argument existed.
BEFORE = {"energy_gradient_penalty": 0.0, "relative_dual_step": True}


def check_output_dir(output_dir: Path, overwrite: bool, resume: bool, component: str) -> None:
    """
    Refuse an output folder that would lose something.

    Args:
        component (`str`): The [`Task`]'s, which tells the scripts' runs apart.

    Raises:
        ValueError: if it is a file, a folder that this script did not write, or one with a run in it that is neither
            to be resumed nor to be overwritten.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a folder, but {str(output_dir)!r} is a file.")
    if all(path.name in (LOCK_FILE, f".{ARGUMENTS_FILE}") for path in output_dir.iterdir()):
        return
    if not (output_dir / ARGUMENTS_FILE).is_file():
        raise ValueError(
            f"--output_dir {str(output_dir)!r} holds files that are not of a training run: choose another folder."
        )
    # What is wrong with the file `check_resumed_arguments` says, where it is needed.
    found = readable_arguments(output_dir).get("component") or component
    if found != component:
        raise ValueError(
            f"--output_dir {str(output_dir)!r} holds the training run of another script (of a {found}, not of a "
            f"{component}): choose another folder."
        )
    go_on = "go on with --resume_from_checkpoint latest, " if checkpoints(output_dir) else ""
    if not (overwrite or resume):
        raise ValueError(
            f"--output_dir {str(output_dir)!r} holds a training run: {go_on}replace it with --overwrite_output_dir, or "
            "choose another folder."
        )
    finished = is_finished(output_dir) or (output_dir / BEST_FOLDER).is_dir()
    if resume and not overwrite and not go_on and finished:
        raise ValueError(
            f"--resume_from_checkpoint finds no checkpoint in {str(output_dir)!r}, but a finished or best "
            "model, which a new run would replace: use --overwrite_output_dir, or choose another folder."
        )


def check_pretrained_stays(output_dir: Path, name_or_path: str) -> None:
    """
    Raises:
        ValueError: if a run in `output_dir` would remove, as it begins, what it starts from.
    """
    path = Path(name_or_path)
    if path.exists() and path.resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(
            f"--pretrained_model_name_or_path {name_or_path!r} must not lie in --output_dir {str(output_dir)!r}, which the "
            "new run replaces: choose another --output_dir."
        )


def is_finished(output_dir: Path) -> bool:
    """Whether a run has saved what it came to: a pipeline, or a model alone."""
    return any((output_dir / name).is_file() for name in ("model_index.json", "config.json"))


def clear_run(output_dir: Path) -> None:
    """Remove what a run of this script wrote, and nothing else: a card that was edited by hand stays."""
    for path in output_dir.iterdir() if output_dir.is_dir() else []:
        if CHECKPOINT.fullmatch(path.name.lstrip(".")) or path.name in RUN_FOLDERS:
            discard(path)
        elif path.name in RUN_FILES:
            path.unlink()


def read_arguments(output_dir: str | Path) -> dict:
    """
    Return the arguments that a run was started with, by name, and its `component` and `launch`; none if the folder holds no run.

    Raises:
        ValueError: if the file can't be read, or holds no arguments.
    """
    path = Path(output_dir) / ARGUMENTS_FILE
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:  # of damaged text, of damaged JSON, or of a folder of that name
        raise ValueError(f"{str(path)!r} can't be read: {error}.") from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("launch", {}), dict):
        raise ValueError(f"{str(path)!r} must hold the run's arguments by name.")
    return arguments


def readable_arguments(output_dir: str | Path) -> dict:
    """Return what `read_arguments` does; nothing where that can't be read."""
    try:
        return read_arguments(output_dir)
    except ValueError:
        return {}


def check_resumed_arguments(output_dir: Path, arguments: dict) -> None:
    """
    Refuse to go on with a run under arguments that its checkpoint was not made with.

    Raises:
        ValueError: if an argument differs that would change the model or the course of training.
    """
    before = read_arguments(output_dir)
    before = {**BEFORE, **before}
    free = FREE_ON_RESUME
    if before.get("evaluation_steps") is None:
        free = free | {"evaluation_features", "evaluation_samples", "early_stopping_metric"}
    changed = {
        name: (before.get(name), value)
        for name, value in arguments.items()
        if name not in free and name in before and before[name] != value
    }
    if changed:
        listed = ", ".join(f"--{name} (was {old}, is {new})" for name, (old, new) in sorted(changed.items()))
        raise ValueError(f"--resume_from_checkpoint goes on with the run's own arguments, but these differ: {listed}.")


def arguments_of_run(output_dir: str | Path) -> dict:
    """
    Return the arguments that a resumed run in this folder has where none are given: those that it was started with, if
    it has a checkpoint.
    """
    if not checkpoints(Path(output_dir)):
        return {}
    own = {**BEFORE, **readable_arguments(output_dir)}
    return {name: value for name, value in own.items() if name not in FREE_ON_RESUME}


def check_resumed_launch(output_dir: Path, launch: dict) -> None:
    """
    Refuse to go on with a run on other data, or launched in another way, than its checkpoint was made with.

    Args:
        launch (`dict`): Images a step (of all processes), number and channels of the images, precision.

    Raises:
        ValueError: if one of them differs.
    """
    before = read_arguments(output_dir).get("launch", {})
    changed = [f"{name} (was {before[name]}, is {launch[name]})" for name in before if before[name] != launch[name]]
    if changed:
        raise ValueError(
            "--resume_from_checkpoint goes on with the run's own data, number of processes and precision, but these "
            f"differ: {', '.join(changed)}."
        )


def write_arguments(output_dir: Path, arguments: dict) -> None:
    write_json(output_dir / ARGUMENTS_FILE, arguments, sort_keys=True)


def remove_leftovers(output_dir: Path) -> None:
    """What a kill has left half written, or half removed."""
    for path in output_dir.iterdir():
        name = path.name.removeprefix(".discarded-").removeprefix(".")
        if path.name.startswith(".") and (CHECKPOINT.fullmatch(name) or name in RUN_FOLDERS | {"pipeline"}):
            remove(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(CHECKPOINT.fullmatch(path.name)[1])


def write_manifest(checkpoint: Path) -> None:
    """Note of each file of a checkpoint what it holds, so that `damage` can tell whether it still does."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(checkpoint / MANIFEST, {path.name: sha256(path) for path in files})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint, in words: a file that is missing, or that is not as it was written. `None` if it is whole.

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
        expected |= {
            path.name: None for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".bin", ".pkl")
        }
    for name, digest in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing" if not path.exists() else f"{name} is no file"
        if not (is_whole(path) if digest is None else sha256(path) == digest):
            return f"{name} is not as it was written"
    return None


def is_whole(path: Path) -> bool:
    """Whether a file of weights or states is there to its end, of which nothing else tells."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint to resume from; `None` to start at 0. `"latest"` is the newest one that is whole: a warning names those
    after it, which the run replaces.

    Raises:
        ValueError: if the one named is not there, not whole, or not the newest, from which two runs would mix; or if
            none is whole.
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
            f"--resume_from_checkpoint {resume_from_checkpoint!r} is not the newest: a run that goes on from it would mix "
            f"with what came later. Move {[one.name for one in found[found.index(chosen) + 1 :]]} away first."
        )
    if (what := damage(chosen)) is not None:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from_checkpoint!r} is damaged ({what}): 'latest' resumes from the newest that "
            "is whole."
        )
    return chosen


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    if limit is not None:
        for path in checkpoints(output_dir)[:-limit]:
            discard(path)


class RunLog:
    """A file of the run with one JSON object a line, each with its `step`. A number that is not finite is `null`."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **values) -> None:
        """Append a line. Raises `WriteError` if it can't be written."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")

    def cut(self, last_step: int) -> None:
        """Drop what came after the step that the run resumes from, and what is no record."""
        if self.path.is_file():
            kept = [to_json(record) + "\n" for record in read_metrics(self.path) if record.get("step", 0) <= last_step]
            write_text(self.path, "".join(kept))


def cut_run(output_dir: Path, last_step: int) -> None:
    """Drop what a run wrote of steps after `last_step`, which it goes on from. Events stay: they have happened."""
    for name in (METRICS_FILE, ENERGIES_FILE, EVALUATIONS_FILE):
        RunLog(output_dir / name).cut(last_step)
    # A line that a kill cut off would hide those after it.
    RunLog(output_dir / EVENTS_FILE).cut(sys.maxsize)
    for kind in PICTURES:
        for path in (output_dir / kind).glob("step-*.png"):
            found = STEP_FILE.fullmatch(path.name)
            if found and int(found[1]) > last_step:
                path.unlink()
    for path in checkpoints(output_dir):
        if checkpoint_step(path) > last_step:
            discard(path)


def step_file(output_dir: Path, kind: str, step: int) -> Path:
    return output_dir / kind / f"step-{step:06d}.png"


def read_metrics(path: Path) -> list[dict]:
    """
    The records of a file with one JSON object a line, such as a `RunLog`. Lines that are none are left out: a last one that a
    kill cut off, and, with a warning, others, such as those that a failing disk has damaged.
    """
    records, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode())
        except ValueError:  # no UTF-8, or no JSON
            record = None
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
        elif number < len(lines):
            logger.warning(f"{str(path)!r}: line {number} is no record, and is left out.")
    return records


def image_grid(images: torch.Tensor, num_columns: int, scale: int = 1) -> PIL.Image.Image:
    """
    Lay images out in rows, with a line of one pixel between them.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        num_columns (`int`): Images a row.
        scale (`int`, *optional*, defaults to 1): Whole-number magnification, without smoothing.
    """
    images = to_uint8(images.cpu())
    batch_size, channels, height, width = images.shape
    num_rows = -(-batch_size // num_columns)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    grid = PIL.Image.new(mode, (num_columns * (width + 1) - 1, num_rows * (height + 1) - 1), "white")
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        tile = PIL.Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        grid.paste(tile, ((i % num_columns) * (width + 1), (i // num_columns) * (height + 1)))
    return grid.resize((grid.width * scale, grid.height * scale), PIL.Image.Resampling.NEAREST)


def save_atomically(image: PIL.Image.Image, path: Path) -> None:
    """Write a PNG. Raises `WriteError` if it can't be written."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
