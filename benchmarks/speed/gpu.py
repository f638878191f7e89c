#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""All that is to be measured on a GPU, in one command and under ten minutes: `python benchmarks/speed/gpu.py`.

Runs the benchmarks one after the other with `--device cuda`, each within a limit of time, and ends with one table of the most
telling figures. A benchmark that fails or takes too long is listed as such, and the others run. `--device cpu --small` is
the same at toy sizes, to see that it runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.results import table


SMALL = ["--block_out_channels", "16", "16", "--resolution", "16", "--batch_size", "4", "--rounds", "1"]
TOY = [*SMALL, "--langevin_steps", "2", "--changes"]
QUICK = ["--small", "--batch_sizes", "1", "2", "--rounds", "1", "--timed_steps", "2", "--least_seconds", "0"]
# What is run, its arguments, those of the toy size, and its limit in seconds. What needs no compiling comes first: on an
# H100 training_step.py, compiling, did not end within 150 seconds.
PARTS = [
    ("training_step.py", ["--rounds", "10"], [*TOY, "bf16"], 120),
    ("sampling.py", ["--batch_sizes", "1", "64", "256", "--peer_batch_sizes", "1", "64"], QUICK, 180),
    ("training_step.py", ["--rounds", "10", "--changes", "compiled"], TOY, 250),
]


def run(script: str, arguments: list[str], limit: float) -> str:
    """Run a benchmark, and say how it ended."""
    # A session of its own: what a benchmark starts must not run beside the next one.
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"stopped after {limit} s"
    last = (errors.strip().splitlines() or [f"it ended with {process.returncode} and no word"])[-1]
    return "ran" if process.returncode == 0 else f"failed: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    args = parser.parse_args()
    outcomes, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, (script, arguments, small, limit) in enumerate(PARTS):
            chosen, file = small if args.small else arguments, Path(folder) / f"{index}.jsonl"
            print(f"\n## {script} {' '.join(chosen)}\n", flush=True)
            started = time.perf_counter()
            # A slow CPU with other work beside it has no ten minutes to keep to.
            limit *= 4 if args.small else 1
            outcome = run(script, ["--device", args.device, "--figures", str(file), *chosen], limit)
            outcomes.append([script, outcome, f"{time.perf_counter() - started:.0f}"])
            found = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            figures += [[script, row["what"], row["value"]] for row in map(json.loads, found)]
    print("\n" + table(["benchmark", "outcome", "s"], outcomes))
    print("\n" + table(["benchmark", "what", "measured"], figures))
    return int(any(outcome != "ran" for _, outcome, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
