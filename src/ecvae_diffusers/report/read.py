# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Reads the folder of a training run: arguments, logged steps, evaluations, events and pictures."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ecvae_diffusers.training.run import log
from ecvae_diffusers.training.run.folder import STEP_FILE


# The verdict judges the last quarter of a run, but at least this many logged steps.
MIN_JUDGED = 5


@dataclass
class Run:
    """The records of a training run that have a step. `energy_gap` is added to those in `metrics`."""

    folder: Path
    arguments: dict[str, Any]
    metrics: list[dict]
    evaluations: list[dict]
    events: list[dict]
    energies: list[dict]

    def __post_init__(self) -> None:
        self.metrics = [record | energy_gap(record) for record in self.metrics]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder. Raises `ValueError` if it is not the output folder of a run, or its files can't be read."""
        path = folder / log.METRICS_FILE
        if not path.is_file():
            raise ValueError(f"RUN must be the output folder of a training run, but there is no {str(path)!r}.")
        files = (log.METRICS_FILE, log.EVALUATIONS_FILE, log.EVENTS_FILE, log.ENERGIES_FILE)
        run = cls(folder, log.read_arguments(folder), *(read_records(folder / name) for name in files))
        if not run.metrics:
            raise ValueError(f"{str(path)!r} holds no logged step: has the run logged anything yet?")
        return run

    @property
    def judged(self) -> list[dict]:
        """The last part of the run, which the verdict judges."""
        return self.metrics[-max(len(self.metrics) // 4, MIN_JUDGED) :]

    def last(self, name: str) -> np.ndarray:
        """Return the finite values of a quantity in the last part of the run."""
        values = series(self.judged, name)
        return values[np.isfinite(values)]

    def median(self, name: str) -> float:
        """Return the median of a quantity over the last part of the run, or NaN if it was not logged."""
        return float(np.median(self.last(name))) if len(self.last(name)) else math.nan

    def argument(self, name: str) -> float:
        return number(self.arguments.get(name))

    @property
    def drift_is_judged(self) -> bool:
        """Whether `drift_tolerance` limits how far the chain may move, instead of a tolerance that the user set."""
        tolerance = self.arguments.get("calibration_tolerance", "auto")
        return "auto" in (tolerance, self.arguments.get("langevin_drift_step")) and self.drift_tolerance > 0

    @property
    def drift_tolerance(self) -> float:
        """The allowed root-mean-square drift per pixel: the logged value, or else the argument."""
        logged = self.median("drift_tolerance")
        return self.argument("drift_tolerance") if math.isnan(logged) else logged

    def pictures(self, kind: str) -> list[tuple[int, Path]]:
        """Return the pictures of a kind with their steps, in order."""
        found = [(STEP_FILE.fullmatch(path.name), path) for path in (self.folder / kind).glob("step-*.png")]
        return sorted((int(match[1]), path) for match, path in found if match)


def read_records(path: Path) -> list[dict]:
    records = log.read_metrics(path) if path.is_file() else []
    return [record for record in records if isinstance(record.get("step"), int)]


def energy_gap(record: dict) -> dict[str, float]:
    """
    Return the mean energy of calibrated samples minus that of data, in standard deviations of the energies. Return nothing
    if both standard deviations are 0 or missing.
    """
    names = ("energy_real", "energy_targets", "energy_real_std", "energy_targets_std")
    real, targets, real_std, targets_std = (number(record.get(name)) for name in names)
    spread = math.hypot(real_std, targets_std) / math.sqrt(2)
    return {"energy_gap": (targets - real) / spread} if spread > 0 else {}


def number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def series(records: list[dict], name: str) -> np.ndarray:
    """Return the values of a quantity over the records, NaN where it was not logged."""
    return np.array([number(record.get(name)) for record in records])


def spread_over(items: Sequence, count: int) -> list:
    """Return at most `count` of `items`, evenly spread, including the first and the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[place] for place in sorted({round(place) for place in places})]


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
