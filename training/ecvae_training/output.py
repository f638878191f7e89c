"""What a run leaves in its output folder: the check that nothing is overwritten, metrics, sample grids, checkpoints."""

import json
import os
import re
import shutil
from pathlib import Path

import PIL.Image
import torch


ARGUMENTS_FILE = "training_args.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_output_dir(output_dir: Path, overwrite: bool, resume: bool) -> None:
    """
    Refuse an output folder that would lose something.

    Raises:
        ValueError: if it is a file, a folder that this script did not write, or one with a run in it that is neither
            to be resumed nor to be overwritten.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a folder, but {str(output_dir)!r} is a file.")
    if not any(output_dir.iterdir()):
        return
    if not (output_dir / ARGUMENTS_FILE).is_file():
        raise ValueError(
            f"--output_dir {str(output_dir)!r} holds files that are not of a training run: choose another folder."
        )
    if not (overwrite or resume):
        raise ValueError(
            f"--output_dir {str(output_dir)!r} holds a training run: go on with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or choose another folder."
        )


def clear_run(output_dir: Path) -> None:
    """Remove what a run of this script wrote, and nothing else."""
    for path in output_dir.iterdir() if output_dir.is_dir() else []:
        if path.is_dir() and (CHECKPOINT.fullmatch(path.name) or path.name == "samples"):
            shutil.rmtree(path)
        elif path.name == METRICS_FILE:
            path.unlink()


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(CHECKPOINT.fullmatch(path.name)[1])


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint to resume from; `None` to start at 0.

    Raises:
        ValueError: if the one named is not there.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        return next(reversed(checkpoints(output_dir)), None)
    path = output_dir / Path(resume_from_checkpoint).name
    if not path.is_dir() or not CHECKPOINT.fullmatch(path.name):
        raise ValueError(
            f"--resume_from_checkpoint must be 'latest' or one of {[p.name for p in checkpoints(output_dir)]} in "
            f"{str(output_dir)!r}, but is {resume_from_checkpoint!r}."
        )
    return path


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    if limit is not None:
        for path in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


class MetricsLog:
    """
    `metrics.jsonl`: one JSON object a line, in the order of steps. Opened at a step, lines from that step on (of a run
    that was cut off after its last checkpoint) are dropped.
    """

    def __init__(self, path: Path, first_step: int):
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, **values) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def image_grid(images: torch.Tensor, num_columns: int, scale: int = 1) -> PIL.Image.Image:
    """
    Lay images out in rows, with a line of one pixel between them.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        num_columns (`int`): Images a row.
        scale (`int`, *optional*, defaults to 1): Whole-number magnification, without smoothing.
    """
    images = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    batch_size, channels, height, width = images.shape
    num_rows = -(-batch_size // num_columns)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    grid = PIL.Image.new(mode, (num_columns * (width + 1) - 1, num_rows * (height + 1) - 1), "white")
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        tile = PIL.Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        grid.paste(tile, ((i % num_columns) * (width + 1), (i // num_columns) * (height + 1)))
    return grid.resize((grid.width * scale, grid.height * scale), PIL.Image.Resampling.NEAREST)


def save_atomically(image: PIL.Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
