# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark starts as a user starts it, with nothing but the package on its path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# What others import.
LIBRARIES = ("command_line.py", "study.py")
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in LIBRARIES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, str(FOLDER / script), "--help"]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert output.returncode == 0, output.stderr
    assert "usage: " + script in output.stdout
