# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The last line under the launchers themselves, which take seconds to start. Slow: `make test-slow`."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import SCRIPT


BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "launcher",
    [
        [BIN / "accelerate", "launch", "--cpu"],
        [sys.executable, "-m", "accelerate.commands.launch"],
        [BIN / "torchrun", "--nproc_per_node", "2"],
    ],
)
def test_the_last_line_is_ours(launcher):
    command = [*launcher, SCRIPT, "--no_such_argument"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert process.returncode != 0
    assert process.stderr.splitlines()[-1].startswith("train_ecvae.py: error: ")
