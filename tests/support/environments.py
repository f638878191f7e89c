"""Environments with other packages than the one that the tests run in."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest


def make_environment(folder: Path, inherits: bool = False) -> Callable[..., Path]:
    """
    Make an environment. Returns a function that installs what arguments of pip say, and returns the folder of its programs.

    If it `inherits`, it has the packages of the running environment too, and only others are installed. Skips the test if packages
    can't be had.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    if inherits:
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        (packages / "inherited.pth").write_text(sysconfig.get_path("purelib"))

    def pip(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pip", "--python", programs / "python", *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)

    def install(*arguments) -> Path:
        # Not compiled: most of what is installed is never imported.
        done = pip("install", "--no-compile", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return programs

    found = pip("download", "--no-deps", "--dest", folder / "downloaded", "Jinja2")
    if found.returncode:
        pytest.skip(f"needs a package index: {found.stderr[-300:]}")
    return install
