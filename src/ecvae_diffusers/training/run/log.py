"""Logs of a run: one JSON object a line for each logged step, evaluation and event, and the arguments that it was started with."""

import json
import logging
import re
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ecvae_diffusers.atomic import to_json, write_json, write_text, writing


logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
METRICS_FILE = "metrics.jsonl"
ENERGIES_FILE = "energies.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVENTS_FILE = "events.jsonl"


class RunLog:
    """A file of the run with one JSON object a line, each with its `step`. A number that is not finite is `null`."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **values) -> None:
        """Append a line. Raises `WriteError` if it can't be written."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")

    def cut(self, last_step: int) -> None:
        """Drop records of later steps, and lines that are no records."""
        if self.path.is_file():
            kept = [to_json(record) + "\n" for record in read_metrics(self.path) if record.get("step", 0) <= last_step]
            write_text(self.path, "".join(kept))


def read_metrics(path: Path) -> list[dict]:
    """
    Read the records of a file with one JSON object a line, such as a `RunLog`. Lines that are no records are skipped: a last
    one that a kill cut off, and, with a warning, others, such as those that a failing disk has damaged.
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


def record_event(accelerator: Accelerator, output_dir: Path, step: int, kind: str, message: str, **values) -> None:
    """Log a message, and write it to `events.jsonl`."""
    get_logger(__name__).warning(f"Step {step}: {message}.")
    if accelerator.is_main_process:
        RunLog(output_dir / EVENTS_FILE).write(step=step, kind=kind, message=message, **values)


def write_arguments(output_dir: Path, arguments: dict) -> None:
    write_json(output_dir / ARGUMENTS_FILE, arguments, sort_keys=True)


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
    """Return what `read_arguments` does, or nothing if that can't be read."""
    try:
        return read_arguments(output_dir)
    except ValueError:
        return {}


def moments(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `reduce_scalars` computes the mean and the spread over all processes from."""
    return {name: values.mean(), f"{name}_square": values.square().mean()}


def reduce_scalars(accelerator: Accelerator, scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    Average scalars over processes, in one exchange and one wait for the device. A pair of `name` and `name_square` becomes `name`
    and `name_std`.
    """
    # MPS has no float64.
    dtype = torch.float32 if next(iter(scalars.values())).device.type == "mps" else torch.float64
    values = torch.stack([value.detach().to(dtype) for value in scalars.values()])
    logged = dict(zip(scalars, accelerator.reduce(values, reduction="mean").tolist()))
    for name in [name for name in scalars if f"{name}_square" in scalars]:
        logged[f"{name}_std"] = max(logged.pop(f"{name}_square") - logged[name] ** 2, 0.0) ** 0.5
    return logged


def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held, of the device or, on a CPU, of the process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # Preferred: what `getrusage` tells begins with the peak of the process that started this one.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) / 2**20
    import resource  # POSIX only

    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
