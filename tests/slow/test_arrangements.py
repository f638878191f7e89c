# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The arrangements that training_step.py times compute the same thing. Slow: `make test-slow`."""

import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import torch

from ecvae_diffusers.training.run.log import peak_memory
from speed.training_step import CHANGES, Arrangement, Iteration


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "speed" / "training_step.py"
SIZES = {"sample_size": 16, "in_channels": 1, "block_out_channels": (8, 16)}


def iteration(monkeypatch, weight: float = 0.0, **changes: bool) -> Iteration:
    """With the same weights each time, chains without noise and an energy model that no forward pass changes."""
    for name, value in {"NOISE": 0.0, "LATENTS": 4, "LEARNING_RATE": 1e-3}.items():
        monkeypatch.setattr(f"speed.training_step.{name}", value)
    torch.manual_seed(0)
    made = Iteration(Arrangement(**changes), SIZES, num_steps=3, weight=weight, device=torch.device("cpu"))
    made.energy.eval()
    return made


def trained(made: Iteration) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(2):
        made.step(torch.rand(6, 1, 16, 16) * 2 - 1)
    return {**made.vae.state_dict(), **{f"energy.{name}": value for name, value in made.energy.state_dict().items()}}


@pytest.mark.parametrize(
    "change",
    ["frozen_energy", "closed_form", "one_pass", "fused_pooling", "channels_last", "no_wait", "fused_optimizer"],
)
def test_a_change_of_the_arrangement_does_not_change_the_training(monkeypatch, change):
    """Except in rounding. The conditioning pull is that of the energy's own term, by autograd, at weight 0.5."""
    expected = trained(iteration(monkeypatch, weight=0.5))
    found = trained(iteration(monkeypatch, weight=0.5, **{change: True}))
    start = iteration(monkeypatch).vae.state_dict()
    moved = torch.cat([(expected[key] - start[key]).flatten() for key in start]).norm()
    difference = torch.cat([(found[key] - expected[key]).flatten() for key in start]).norm()
    assert moved > 0.1
    # Adam turns the rounding of a gradient near zero into a whole step of its weight: few weights may be so.
    assert difference <= 0.02 * moved


def test_a_single_chain_saves_a_decode_and_a_chain(monkeypatch):
    counts = []
    for single_chain in (False, True):
        made = iteration(monkeypatch, single_chain=single_chain, frozen_energy=True, closed_form=True)
        calls = []
        made.calibrator.energy_model.register_forward_hook(lambda *_: calls.append(1))
        trained(made)
        counts.append(len(calls))
    # Two steps, each of chains of 3 and the energy model's own two passes.
    assert counts == [2 * (2 * 3 + 2), 2 * (3 + 2)]


def test_every_change_is_timed():
    arguments = ["--resolution", 16, "--block_out_channels", 8, 16, "--batch_size", 2, "--langevin_steps", 2]
    output = fork_server.run(SCRIPT, *arguments, "--rounds", 1)
    assert output.returncode == 0, output.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in output.stdout.splitlines() if line.startswith("| ")][1:]
    names = [name.replace("_", " ") for name in CHANGES if name != "compiled"]
    assert [row[0] for row in rows] == ["published", *names, "ours in fp32", "ours"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows) and float(rows[0][2]) == 1


def test_peak_memory_is_the_own_one():
    """Not that of the process that started it, from which Linux counts on."""
    held = torch.ones(2**27)  # half a GiB
    code = "import torch; from ecvae_diffusers.training.run.log import peak_memory; print(peak_memory(torch.device('cpu')))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    alone = float(output.stdout)
    held = held + 1
    assert peak_memory(torch.device("cpu")) > alone + 0.5 and 0.05 < alone < 1
