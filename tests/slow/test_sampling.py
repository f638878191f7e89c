# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The sampling benchmark at toy size: its rows, not its times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sampling.py"
OURS = "ECVAEPipeline"
LANGEVIN = "ECVAEPipeline, 16 Langevin steps"
PEERS = {
    "DDPM, 1000 steps": 1000,
    "DDIM, 50 steps": 50,
    "DPM-Solver++, 20 steps": 20,
    "score SDE (VE), 2000 steps": 4000,
    "consistency model, 1 step": 1,
    "consistency model, 2 steps": 2,
}


def run(output: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(SCRIPT), "--small", "--output", str(output), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    # A line a row, below the heading, the columns' names and the rule.
    assert sum(line.startswith("| ") for line in result.stdout.splitlines()) == len(rows) + 1
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_the_samplers(tmp_path, dtype):
    rows = run(
        tmp_path / "rows.jsonl", "--batch_sizes", "1", "3", "--peer_batch_sizes", "3", "--rounds", "1",
        "--timed_steps", "2", "--least_seconds", "0", "--dtype", dtype,
    )  # fmt: skip
    assert [row["sampler"] for row in rows if row["batch_size"] == 1] == [OURS, LANGEVIN]
    at_three = {row["sampler"]: row for row in rows if row["batch_size"] == 3}
    assert {name: row["evaluations"] for name, row in at_three.items()} == {OURS: 1, LANGEVIN: 17, **PEERS}

    # One UNet makes all peers, so its operations are each one's over its evaluations.
    for name in PEERS:
        one = at_three[name]["gmac"] / at_three[name]["evaluations"]
        assert one == pytest.approx(at_three["consistency model, 1 step"]["gmac"])
    energies = at_three[LANGEVIN]["gmac"] - at_three[OURS]["gmac"]
    assert energies > 0

    for row in rows:
        ours = next(other for other in rows if (other["sampler"], other["batch_size"]) == (OURS, row["batch_size"]))
        assert row["dtype"] == dtype
        assert row["promised"] == pytest.approx(row["gmac"] / ours["gmac"])
        # There is one round, so that ratios of medians are medians of ratios.
        assert row["times_slower"] == pytest.approx(row["ms_a_batch"] / ours["ms_a_batch"])
        assert row["measured_over_promised"] == pytest.approx(row["times_slower"] / row["promised"])
        assert row["ms_an_image"] == pytest.approx(row["ms_a_batch"] / row["batch_size"])
        assert row["images_a_second"] == pytest.approx(1e3 / row["ms_an_image"])


def test_rows_of_the_overhead(tmp_path):
    rows = run(tmp_path / "rows.jsonl", "--overhead", "--batch_sizes", "1", "2", "--pairs", "1")
    assert [(row["batch_size"], row["output_type"]) for row in rows] == 2 * [
        (1, "pt"),
        (1, "pil"),
        (2, "pt"),
        (2, "pil"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["pipeline_ms"] / row["decode_ms"])
