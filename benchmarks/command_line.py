# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""
Types of the benchmarks' arguments: a wrong value is refused in one line, before anything is measured; and `--figures`,
by which gpu.py makes one table of many benchmarks.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ecvae_diffusers.training.run.launch import device_name


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, but is {text}")
        return value

    return parse


positive = whole_number(1)


def positive_number(text: str) -> str:
    """As it was written: it goes on to a script, and rows remember what that was given."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, but is {text}")
    return text


def resolution(text: str) -> int:
    if text not in ("8", "16", "32", "64", "128", "256"):
        raise argparse.ArgumentTypeError(f"must be a power of two from 8 to 256, but is {text}")
    return int(text)


def source(text: str) -> str:
    """A folder, a file or a Hub id, with the home folder for a leading `~`."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a place, but is {text!r}")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def place(text: str) -> Path:
    """A folder or file, as [`source`] reads it."""
    return Path(source(text))


def picture_file(text: str) -> Path:
    """A PNG file to write, in a folder that is made: found out before the work that it is to show."""
    path = place(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file that ends in .png, but is {text}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be in a folder that can be made, but is {text}: {error}") from error
    return path


def device(text: str) -> torch.device:
    """A device that can be computed on, here and now."""
    return torch.device(device_name(text))


def add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--figures", type=place, help="file that the few figures which say most are added to, as JSON lines"
    )


def write_figures(args: argparse.Namespace, figures: dict[str, str]) -> None:
    """Add the figures that say most, what was measured -> value with its unit, to the file of `--figures`."""
    if args.figures is not None:
        with args.figures.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"what": what, "value": value}) + "\n" for what, value in figures.items())
