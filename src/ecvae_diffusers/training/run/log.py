"""Logs of a run (JSON lines of steps, evaluations and events), its saved arguments, progress bars and training time."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm import tqdm

from ecvae_diffusers.atomic import to_json, write_text, writing


logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
METRICS_FILE = "metrics.jsonl"
ENERGIES_FILE = "energies.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVENTS_FILE = "events.jsonl"


class RunLog:
    """A log file with one JSON object per line, each with a `step`. Numbers that are not finite are written as `null`."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **values) -> None:
        """Append a line. Raises `WriteError` if it can't be written."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")

    def cut(self, last_step: int) -> None:
        """Remove records of steps after `last_step`, and lines that are not records."""
        if self.path.is_file():
            kept = [to_json(record) + "\n" for record in read_metrics(self.path) if record.get("step", 0) <= last_step]
            write_text(self.path, "".join(kept))


def read_metrics(path: Path) -> list[dict]:
    """
    Read the records of a file with one JSON object per line, such as a `RunLog`. Lines that are not records are skipped: the last line
    silently, since a killed process may leave it incomplete, and others with a warning.
    """
    records, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode())
        except ValueError:  # not UTF-8, or not JSON
            record = None
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
        elif number < len(lines):
            logger.warning(f"{str(path)!r}: line {number} is not a record and is skipped.")
    return records


def record_event(accelerator: Accelerator, output_dir: Path, step: int, kind: str, message: str, **values) -> None:
    """Log a message, and write it to `events.jsonl`."""
    get_logger(__name__).warning(f"Step {step}: {message}.")
    if accelerator.is_main_process:
        RunLog(output_dir / EVENTS_FILE).write(step=step, kind=kind, message=message, **values)


def read_arguments(output_dir: str | Path) -> dict[str, Any]:
    """
    Return a run's arguments by name, with its `component` and `launch`, or an empty dictionary if the folder holds no run. Raises
    `ValueError` if the file can't be read or holds no arguments.
    """
    path = Path(output_dir) / ARGUMENTS_FILE
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:  # damaged text or JSON, or a folder of that name
        raise ValueError(f"{str(path)!r} can't be read: {error}.") from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("launch", {}), dict):
        raise ValueError(f"{str(path)!r} must hold the run's arguments by name.")
    return arguments


def moments(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean and mean square of values, from which `reduce_scalars` computes moments over all processes."""
    return {name: values.mean(), f"{name}_square": values.square().mean()}


def reduce_scalars(accelerator: Accelerator, scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    Average scalars over processes, with a single exchange and a single wait for the device. A pair `name` and `name_square` (from
    `moments`) becomes `name` and `name_std`.
    """
    # MPS has no float64.
    dtype = torch.float32 if next(iter(scalars.values())).device.type == "mps" else torch.float64
    values = torch.stack([value.detach().to(dtype) for value in scalars.values()])
    logged = dict(zip(scalars, accelerator.reduce(values, reduction="mean").tolist()))
    for name in [name for name in scalars if f"{name}_square" in scalars]:
        logged[f"{name}_std"] = max(logged.pop(f"{name}_square") - logged[name] ** 2, 0.0) ** 0.5
    return logged


def duration(seconds: float) -> str:
    """Format a duration, such as "2 h 5 min" or "40 s"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB: that of this process's tensors with CUDA, else that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    # On Linux, the peak of `getrusage` includes that of the parent process.
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) / 2**20
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def progress(
    name: str, iterable: Iterable | None = None, total: int | None = None, shown: bool = True, delay: float = 1.0
) -> tqdm:
    """
    Return a progress bar below that of the steps. It disappears when its work is done, and appears only after `delay` seconds, so that
    short work leaves no trace in a log. If `shown` is `False`, it never appears.
    """
    return tqdm(iterable, name, total, leave=False, disable=not shown, delay=delay, mininterval=1.0)


class Stopwatch:
    """A clock of training time, in seconds. It pauses for evaluations, pictures and saving, and continues in a resumed run."""

    def __init__(self):
        self.before, self.since = 0.0, None

    def start(self) -> None:
        self.since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.since if self.since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.before, self.since = self.seconds, None
        yield
        self.start()

    def state_dict(self) -> dict:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict) -> None:
        self.before, self.since = state_dict["seconds"], None
