# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark starts as a user starts it, with nothing but the package on its path."""

from pathlib import Path

import fork_server
import pytest


FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# What others import.
LIBRARIES = ("command_line.py", "study.py")
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in LIBRARIES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    output = fork_server.run(FOLDER / script, "--help")
    assert output.returncode == 0, output.stderr
    assert "usage: " + script in output.stdout
