# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Runs code in a process where a package can't be imported: this one, or torch."""

import json
import subprocess
import sys
from typing import Any


PRELUDE = """
import json, sys
from importlib.machinery import PathFinder


class WithoutPackage(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "{package}" else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutPackage
"""
DIFFUSERS = """
import torch
from diffusers import DiffusionPipeline
"""


def run_without(
    package: str, code: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run code that finds `arguments` in `sys.argv[1:]`."""
    command = [sys.executable, "-c", PRELUDE.format(package=package) + code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def run_without_package(code: str, *arguments: str, environment: dict[str, str] | None = None) -> tuple[Any, str]:
    """Return what the code, which has diffusers, but not this package, prints as JSON, and its standard error."""
    done = run_without("ecvae_diffusers", DIFFUSERS + code, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr
