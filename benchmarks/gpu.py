#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""All that is to be measured on a GPU, in one command and under ten minutes: `python benchmarks/gpu.py`.

Runs the benchmarks one after the other with `--device cuda`, each within its own limit of time, and prints what they print,
and at the end one table of the figures that say most. A benchmark that fails or takes too long is said to have, and the
others go on. `--device cpu --small` is the same at toy sizes, to see that it runs.
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


HERE = Path(__file__).resolve().parent
SMALL = ["--block_out_channels", "16", "16", "--resolution", "16", "--batch_size", "4", "--rounds", "1"]
QUICK = ["--small", "--batch_sizes", "1", "2", "--rounds", "1", "--timed_steps", "2", "--least_seconds", "0"]
PLAIN_CHANGES = [
    "single_chain", "frozen_energy", "closed_form", "one_pass", "fused_pooling", "channels_last", "bf16", "no_wait", "fused_optimizer",
]  # fmt: skip
# What is run, its arguments, those of the toy size, and its limit in seconds.
PARTS = [
    # What needs no compiling first: on an H100 training_step.py, compiling, did not end within 150 seconds.
    ("training_step.py", ["--rounds", "10", "--changes", *PLAIN_CHANGES], [*SMALL, "--langevin_steps", "2", "--changes", "bf16"], 50),
    ("limit.py", [], [*SMALL, "--langevin_steps", "2"], 50),
    ("precision.py", [], [], 70),
    ("sampling.py", ["--batch_sizes", "1", "64", "256", "--peer_batch_sizes", "1", "64"], QUICK, 120),
    ("sampling.py", ["--overhead", "--batch_sizes", "1", "64"], ["--small", "--overhead", "--pairs", "2", "--batch_sizes", "1", "2"], 50),
    ("growth.py", ["--rounds", "5"], ["--rounds", "1", "--quantities", "width", "--sizes", "4", "8"], 40),
    ("training_step.py", ["--rounds", "10", "--changes", "compiled"], [*SMALL, "--langevin_steps", "2", "--changes"], 210),
]  # fmt: skip


def run(script: str, arguments: list[str], limit: float) -> str:
    """Run a benchmark; in words, how it ended."""
    # A session of its own: what a benchmark starts itself must not go on beside the next one.
    command = [sys.executable, str(HERE / script), *arguments]
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
            outcome = run(
                script, ["--device", args.device, "--figures", str(file), *chosen], limit * (4 if args.small else 1)
            )
            outcomes.append(f"| {script} | {outcome} | {time.perf_counter() - started:.0f} |")
            found = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            figures += [f"| {script} | {row['what']} | {row['value']} |" for row in map(json.loads, found)]
    print("\n| benchmark | outcome | s |\n|---|---|---|\n" + "\n".join(outcomes))
    print("\n| benchmark | what | measured |\n|---|---|---|\n" + "\n".join(figures))
    return int(any("| ran |" not in row for row in outcomes))


if __name__ == "__main__":
    sys.exit(main())
