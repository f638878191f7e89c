# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Chooses the device of a benchmark, describes the machine in a log, and measures times."""

import os
import platform
import time
from collections.abc import Callable

import diffusers
import torch

from ecvae_diffusers.command import device_name


def device(text: str) -> torch.device:
    """Read a device from the command line, and check that it can be used."""
    return torch.device(device_name(text))


def machine(device: torch.device | str) -> str:
    return (
        f"{device}, {torch.get_num_threads()} threads on {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call in seconds, including work that it leaves to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
