# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Runs code in a process that has diffusers, but not this package."""

import json
import subprocess
import sys
from typing import Any


PRELUDE = """
import json, sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ecvae_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
"""


def run_without_package(code: str, *arguments: str, environment: dict[str, str] | None = None) -> tuple[Any, str]:
    """Return what the code prints, as JSON, and its standard error. The code finds `arguments` in `sys.argv[1:]`."""
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr
