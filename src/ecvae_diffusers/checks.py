# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Check arguments for all pipelines. This module imports no torch, so that the ONNX pipeline runs without it."""

from collections.abc import Sequence
from typing import Any

import numpy as np


# PIL's mode of images, by their number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Squares of numbers up to this are finite in float32.
LARGEST_VALUE = 1e12
# Upper bound of `temperature`: latents have a standard deviation of 1 in training.
LARGEST_TEMPERATURE = 100.0


def height_and_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width of images from a config's `sample_size`, which is one number for squares."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width


def as_sample_size(sides: Sequence[int]) -> int | list[int]:
    """Return one number, or height and width, as a config's `sample_size`: squares are one number."""
    return sides[0] if len(set(sides)) == 1 else list(sides)


def size_as_text(sample_size: int | Sequence[int]) -> str:
    """Return a config's `sample_size` in words, such as "32 px" for squares and "24x40 px" for a height of 24 px."""
    return f"{sample_size} px" if isinstance(sample_size, int) else f"{'x'.join(map(str, sample_size))} px"


def check_number(name: str, value: float, low: float, high: float = LARGEST_VALUE, whole: bool = False) -> None:
    """Raise `ValueError` if an argument is not from `low` to `high` or, with `whole`, not an integer."""
    if not low <= value <= high or (whole and not isinstance(value, int | np.integer)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} from {low:g} to {high:g}, but is {value}.")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` if an argument is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, but is {value!r}.")


def label_ids(names: list[str], config: Any) -> list[int]:
    """Return the numbers of classes from their names in a model's config. Raises `ValueError` if there is no such class."""
    known = {name: int(number) for number, name in (config.get("id2label") or {}).items()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`class_labels` must be among {list(known)}, but has {unknown[0]!r}.")
    return [known[name] for name in names]


def prepare_labels(class_labels: Any, count: int, config: Any) -> list[int | None] | None:
    """
    Return the class number of each of `count` images, or `None` for images without a given class. Return `None` for a model without
    classes. Raises `ValueError` if the model has no such class, or there are not `count` labels.
    """
    if hasattr(class_labels, "tolist"):  # a tensor or an array
        class_labels = class_labels.reshape(-1).tolist()
    labels = list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels] * count
    num_classes = config.get("num_class_embeds")  # configs saved by earlier versions lack it
    if num_classes is None:
        if labels != [None] * len(labels):
            raise ValueError(f"`class_labels` must be None for a model without classes, but is {class_labels!r}.")
        return None
    if len(labels) != count:
        raise ValueError(f"`class_labels` must have one label per image ({count}), but has {len(labels)}.")
    numbers: list[int | None] = []
    for label in labels:
        if isinstance(label, str):
            numbers += label_ids([label], config)
        elif label is None:
            numbers.append(None)
        elif isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label <= num_classes:
            numbers.append(int(label))
        else:
            raise ValueError(
                f"`class_labels` must be names, integers from 0 to {num_classes} (unknown) or None, but has {label!r}."
            )
    return numbers
