# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The commands of `ecvae` that use a trained model. The others are in `training`, `evaluation` and `report`."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecvae_diffusers.command import fail


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LARGEST_SEED = 2**63 - 1


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse `type` for finite numbers from `least` to `most`."""
    allowed = f"from {least} to {most}" if most < math.inf else f"of at least {least}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            what = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"must be {what} {allowed}, but is {text!r}")
        return value

    return read


def check_writable(argument: str, path: str) -> None:
    """Raise `ValueError` if a path can't be written, before anything is computed."""
    place = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    if not os.access(place, os.W_OK):
        raise ValueError(f"{argument} {path!r} can't be written: {str(place)!r} is read-only.")


def read_label(text: str | None, config: Any) -> str | int | None:
    """Read a class from the command line: the name of one of a model's classes, or else a number."""
    names = (config.get("id2label") or {}).values()
    return int(text) if text is not None and text.isdecimal() and text not in names else text


def load_pipeline(
    loader: type["DiffusionPipeline"], argument: str, source: str, device: str | None
) -> "DiffusionPipeline":
    """
    Load a pipeline from a folder or a Hub id to `device`. If that is `None`, use an accelerator if there is one.

    Raises:
        ValueError: naming the command line's `argument`, if the pipeline can't be loaded or `device` can't be used.
    """
    import torch

    from ecvae_diffusers.command import device_name, why_missing
    from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS

    try:
        device = device_name(device or str(torch.accelerator.current_accelerator() or "cpu"))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--device {error}") from error
    if (reason := why_missing(source, "model")) is not None:
        raise ValueError(f"{argument} {source!r} can't be loaded: {reason}.")
    try:
        return loader.from_pretrained(source).to(device)
    except LOADING_ERRORS as error:
        raise ValueError(f"{argument} {source!r} can't be loaded: {error}") from error


def what_to_install(error: ImportError) -> str:
    """Return an error's message, and what to install unless the message says so."""
    return str(error) if "pip install" in str(error) else f"{error}: pip install 'ecvae-diffusers[training]'"


def run_or_fail(
    run: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str, how_to_go_on: str = ""
) -> None:
    """Run a command. An error that a user can fix, or an interruption, ends the process with one line."""
    try:
        run(args)
    except ImportError as error:
        fail(f"{prog}: error: {what_to_install(error)}")
    except (ValueError, OSError, RuntimeError) as error:
        fail(f"{prog}: error: {error}")
    except KeyboardInterrupt:
        fail(f"{prog}: interrupted{how_to_go_on}.")
