# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the command lines of all benchmarks share: types of arguments, tables as they grow, and the few figures for gpu.py."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common.results import table
from ecvae_diffusers.training.run.command import device_name


RESOLUTIONS = (8, 16, 32, 64, 128, 256)


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, but is {text}")
        return int(text)

    return parse


positive = whole_number(1)


def place(text: str) -> Path:
    """Return a folder, a file or a Hub id, with the home folder for a leading `~`."""
    return Path(text).expanduser()


def picture_file(text: str) -> Path:
    """Return a PNG file that can be written: checked before the hours of work that it shows."""
    path = place(text)
    if path.suffix.lower() != ".png" or path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file that ends in .png, in a folder that exists, but is {text}")
    return path


def device(text: str) -> torch.device:
    """Return a device that can compute, here and now."""
    return torch.device(device_name(text))


def speed_parser(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark of speed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device, default="cpu")
    if rounds is not None:
        parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument(
        "--figures", type=place, help="file to which the most telling figures are added, as JSON lines"
    )
    return parser


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Add the size of the networks that a training step is timed with."""
    parser.add_argument("--resolution", type=int, choices=RESOLUTIONS, default=32)
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--langevin_steps", type=positive, default=15)
    parser.add_argument("--block_out_channels", type=positive, nargs="+", default=[32, 64, 128, 128])


def write_figures(args: argparse.Namespace, figures: dict[str, str]) -> None:
    """Add the most telling figures, what was measured -> value with its unit, to the file of `--figures`."""
    if args.figures is not None:
        with args.figures.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"what": what, "value": value}) + "\n" for what, value in figures.items())


def print_table(columns: list[str], rows: Iterable[list[str]]) -> None:
    """Print a table in Markdown, each row as soon as it is measured."""
    print(table(columns, []), flush=True)
    for row in rows:
        print(table(row, []).splitlines()[0], flush=True)


def machine(device: torch.device | str) -> str:
    return f"{device}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call, with what it leaves the device to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
