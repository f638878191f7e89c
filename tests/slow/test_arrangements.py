# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The arrangements that training_step.py times compute the same thing, and limit.py counts what is computed. Slow: `make test-slow`."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import torch
import torch.nn as nn
from limit import ConvolutionRecorder, alone
from precision import quantities
from training_step import CHANGES, Arrangement, Iteration

from ecvae_diffusers import AutoencoderEC, EnergyModel, LangevinScheduler
from ecvae_diffusers.training.run.log import peak_memory


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"sample_size": 16, "in_channels": 1, "block_out_channels": (8, 16)}


def iteration(monkeypatch, weight: float = 0.0, **changes: bool) -> Iteration:
    """With the same weights each time, chains without noise and an energy model that no forward pass changes."""
    monkeypatch.setattr("training_step.NOISE", 0.0)
    torch.manual_seed(0)
    made = Iteration(
        Arrangement(**changes), SIZES, num_steps=3, weight=weight, device=torch.device("cpu"), latent_channels=4,
        learning_rate=1e-3,
    )  # fmt: skip
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
    """But in rounding. The conditioning pull is that of the energy's own term, by autograd, at weight 0.5."""
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


def test_every_change_is_timed_and_remembered(tmp_path):
    arguments = [
        "--resolution", 16, "--block_out_channels", 8, 16, "--batch_size", 2,
        "--langevin_steps", 2, "--rounds", 1,
    ]  # fmt: skip
    output = fork_server.run(BENCHMARKS / "training_step.py", *arguments)
    assert output.returncode == 0, output.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in output.stdout.splitlines() if line.startswith("| ")][1:]
    names = [name.replace("_", " ") for name in CHANGES if name != "compiled"]
    assert [row[0] for row in rows] == ["published", *names, "ours in fp32", "ours"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows) and float(rows[0][2]) == 1
    assert "Peak memory of a process with one alone: published 0." in output.stdout


def test_recorded_convolutions_are_those_of_the_formula():
    """2 B H W C_in C_out k^2 operations forward; as many again for each gradient asked for."""
    conv = nn.Conv2d(3, 5, 3, padding=1)
    sample = torch.randn(2, 3, 8, 8)
    forward = 2 * 2 * 8 * 8 * 3 * 5 * 9
    with ConvolutionRecorder() as recorder, torch.no_grad():
        conv(sample)
        conv(sample)
    assert recorder.flops == 2 * forward and list(recorder.calls.values()) == [2]

    frozen = copy.deepcopy(conv).requires_grad_(False)
    sample.requires_grad_()
    with ConvolutionRecorder() as recorder:
        torch.autograd.grad(frozen(sample).sum(), sample)
    assert recorder.flops == 2 * forward and len(recorder.calls) == 2
    assert alone(recorder.calls, torch.device("cpu"), rounds=1) > 0


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("limit.py", ["--resolution", 16, "--block_out_channels", 8, 16, "--batch_size", 2, "--langevin_steps", 2]),
        ("growth.py", ["--rounds", 1, "--quantities", "batch_size", "--sizes", 1, 2]),
    ],
)
def test_a_table_is_printed(script, arguments):
    output = fork_server.run(BENCHMARKS / script, *arguments)
    assert output.returncode == 0, output.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in output.stdout.splitlines() if line.startswith("| ")]
    columns = len(rows[0])
    assert len(rows) > 2 and all(len(row) == columns for row in rows)
    assert all(float(value) >= 0 for row in rows[1:] for value in row[2:])


@pytest.mark.parametrize(
    ("option", "least", "most"),
    # Not frozen, a chain's steps each take a power iteration: new networks' spectral norms are far from found.
    [("frozen energy", 1e-4, 0.2), ("float64", 0, 1e-4), ("channels_last", 0, 1e-4), ("bf16 everywhere", 1e-3, 0.2)],
)
def test_numerical_differences_of_the_options(option, least, most):
    torch.manual_seed(0)
    networks = AutoencoderEC(**SIZES, latent_channels=4), EnergyModel(**SIZES), LangevinScheduler()
    expected = quantities(*networks, None, torch.device("cpu"))
    found = quantities(*networks, option, torch.device("cpu"))
    for key in ("samples", "chain's move", "autoencoder's gradient", "energy model's gradient"):
        difference = (found[key] - expected[key]).norm() / expected[key].norm()
        # The chain has no part in the samples.
        assert (0 if key == "samples" and option == "frozen energy" else least) <= difference <= most, key


WRONG = [
    ("training_step.py", ["--rounds", "0"], "argument --rounds: must be a whole number of at least 1, but is 0"),
    (
        "training_step.py",
        ["--resolution", "20"],
        "argument --resolution: must be a power of two from 8 to 256, but is 20",
    ),
    ("training_step.py", ["--conditioning_weight", "10"], "--conditioning_weight must be from 0 to 5, but is 10.0"),
    ("limit.py", ["--device", "nonsense"], "argument --device: must be a device of this machine, but is nonsense"),
    ("growth.py", ["--quantities", "resolution", "--sizes", "10"], "--sizes must be of (16, 32, 64, 128, 256)"),
    ("sampling.py", ["--pairs", "x"], "argument --pairs: must be a whole number of at least 1, but is x"),
    ("precision.py", ["--model", "missing"], "--model 'missing' can't be loaded"),
    (
        "chain_study.py",
        ["--output_dir", "x", "--seeds", "-1"],
        "argument --seeds: must be a whole number of at least 0",
    ),
    ("chain_study.py", ["--output_dir", "x", "--plot", "x.png"], "--plot needs --fashion_mnist"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), WRONG)
def test_wrong_arguments_are_refused_before_anything_is_measured(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = fork_server.run(BENCHMARKS / script, *arguments)
    assert output.returncode == 2 and message in output.stderr, output.stderr[-2000:]
    assert not output.stdout and not any(tmp_path.iterdir())


def test_peak_memory_is_the_own_one():
    """Not that of the process that started it, from which Linux counts on."""
    held = torch.ones(2**27)  # half a GiB
    code = "import torch; from ecvae_diffusers.training.run.log import peak_memory; print(peak_memory(torch.device('cpu')))"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.with_name("training"))}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    alone = float(output.stdout)
    held = held + 1
    assert peak_memory(torch.device("cpu")) > alone + 0.5 and 0.05 < alone < 1


def test_growth_of_a_size_is_measured_in_a_process_of_its_own():
    sizes = {"resolution": 16, "batch_size": 2, "langevin_steps": 1, "width": 8}
    output = fork_server.run(BENCHMARKS / "growth.py", "--rounds", 1, "--one", json.dumps(sizes))
    found = json.loads(output.stdout.strip().splitlines()[-1])
    assert found["ms"] > 0 and 0.05 < found["memory_gib"] < 4
