# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark starts as a user starts it, with nothing but the package on its path, and refuses wrong arguments."""

from pathlib import Path

import fork_server
import pytest


FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(
    f"{path.parent.name}/{path.name}" for folder in ("studies", "speed") for path in (FOLDER / folder).glob("*.py")
)
WRONG = [
    ("speed/training_step.py", ["--rounds", "0"], "--rounds"),
    ("speed/training_step.py", ["--resolution", "20"], "--resolution"),
    ("speed/training_step.py", ["--conditioning_weight", "10"], "--conditioning_weight"),
    ("speed/training_step.py", ["--resolution", "8"], "--block_out_channels"),
    ("speed/sampling.py", ["--device", "nonsense"], "--device"),
    ("speed/sampling.py", ["--batch_sizes", "x"], "--batch_sizes"),
    ("studies/chain_study.py", ["--output_dir", "x", "--seeds", "-1"], "--seeds"),
    ("studies/restoration.py", ["--output_dir", "x"], "--ecvae"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    output = fork_server.run(FOLDER / script, "--help")
    assert output.returncode == 0, output.stderr
    assert "usage: " + Path(script).name in output.stdout


@pytest.mark.parametrize(("script", "arguments", "named"), WRONG)
def test_wrong_arguments_are_refused_before_anything_is_measured(script, arguments, named, tmp_path):
    output = fork_server.run(FOLDER / script, *arguments)
    assert output.returncode == 2 and named in output.stderr.splitlines()[-1], output.stderr[-2000:]
    assert not output.stdout and not any(tmp_path.iterdir())
