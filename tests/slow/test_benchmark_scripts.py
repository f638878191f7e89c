# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark starts as a user starts it, with nothing but the package on its path. Slow: `make test-slow`."""

from pathlib import Path

import fork_server
import pytest


FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "script", sorted([*FOLDER.glob("studies/*.py"), *FOLDER.glob("speed/*.py")]), ids=lambda path: path.stem
)
def test_help(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    output = fork_server.run(script, "--help")
    assert output.returncode == 0 and f"usage: {script.name}" in output.stdout, output.stderr
