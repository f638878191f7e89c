# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checks of arguments that all pipelines share. Imports no torch: the ONNX pipeline runs without it."""

from typing import Any

import numpy as np


# Squares of numbers up to this are finite in float32.
LARGEST_VALUE = 1e12
# Latents have a standard deviation of 1 in training.
LARGEST_TEMPERATURE = 100.0


def check_number(name: str, value: float, low: float, high: float = LARGEST_VALUE, whole: bool = False) -> None:
    """Raise `ValueError` if an argument is not a number from `low` to `high`, or not a whole one."""
    if not low <= value <= high or (whole and not isinstance(value, int | np.integer)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} from {low:g} to {high:g}, but is {value}.")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` if an argument is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, but is {value!r}.")
