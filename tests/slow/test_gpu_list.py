"""The list of what is to be measured on a GPU, at toy sizes on the CPU. Slow: `make test-slow`."""

import os
import re
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "speed" / "gpu.py"
SCRIPTS = ["training_step.py", "sampling.py", "training_step.py"]


def run(device: str) -> tuple[subprocess.CompletedProcess, list[list[str]], list[list[str]]]:
    """Run the list; rows of its outcomes and of its figures."""
    command = [sys.executable, str(SCRIPT), "--device", device, "--small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    tables = result.stdout.split("| benchmark | outcome | s |")[1].split("| benchmark | what | measured |")
    return result, *([row.strip("| ").split(" | ") for row in part.strip().splitlines()[1:]] for part in tables)


def test_every_benchmark_of_the_list_runs():
    result, outcomes, figures = run("cpu")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert [row[:2] for row in outcomes] == [[name, "ran"] for name in SCRIPTS]
    # The one table has figures of each of them, each a number.
    assert {row[0] for row in figures} == set(SCRIPTS)
    assert all(float(re.match(r"[\d.e+-]+", row[2])[0]) >= 0 for row in figures)


def test_a_failure_is_listed_and_is_the_exit_code():
    result, outcomes, _ = run("nonsense")
    assert result.returncode == 1
    assert [row[1].split(":")[0] for row in outcomes] == ["failed"] * len(SCRIPTS)
