"""The list of what is to be measured on a GPU, at toy sizes on the CPU. Slow: `make test-slow`."""

import os
import re
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def test_every_benchmark_of_the_list_runs():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    outcomes, figures = result.stdout.split("| benchmark | outcome | s |")[1].split("| benchmark | what | measured |")
    outcomes, figures = outcomes.strip().splitlines()[1:], figures.strip().splitlines()[1:]
    scripts = ["training_step", "limit", "precision", "sampling", "sampling", "growth", "training_step"]
    assert [row.strip("| ").split(" | ")[:2] for row in outcomes] == [[f"{name}.py", "ran"] for name in scripts]
    # The one table has figures of each of them, each a number.
    assert {row.strip("| ").split(" | ")[0] for row in figures} == {f"{name}.py" for name in scripts}
    assert all(float(re.match(r"[\d.e+-]+", row.strip("| ").split(" | ")[2])[0]) >= 0 for row in figures)


def test_what_fails_is_said_and_ends_with_an_error():
    command = [sys.executable, str(SCRIPT), "--device", "nonsense", "--small"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1
    assert result.stdout.count("failed: ") == 7
