# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The arrangements that training_step.py times compute the same thing. Slow: `make test-slow`."""

import pytest
import torch

from speed import training_step
from speed.training_step import CHANGES, OURS, Iteration


SIZES = {"sample_size": 16, "in_channels": 1, "block_out_channels": (8, 16)}


@pytest.fixture
def iteration(monkeypatch):
    """With the same weights each time, chains without noise and an energy model that no forward pass changes."""
    for name, value in {"NOISE": 0.0, "LATENTS": 4, "LEARNING_RATE": 1e-3}.items():
        monkeypatch.setattr(training_step, name, value)

    def make(*changes: str, weight: float = 0.5) -> Iteration:
        torch.manual_seed(0)
        made = Iteration(set(changes), SIZES, num_steps=3, weight=weight, device=torch.device("cpu"))
        made.energy.eval()
        return made

    return make


def trained(made: Iteration) -> torch.Tensor:
    torch.manual_seed(1)
    for _ in range(2):
        made.step(torch.rand(6, 1, 16, 16) * 2 - 1)
    return weights(made)


def weights(made: Iteration) -> torch.Tensor:
    networks = (made.vae, made.energy)
    return torch.cat([value.flatten() for network in networks for value in network.state_dict().values()])


@pytest.mark.parametrize("change", sorted(OURS - {"single_chain", "bf16"}))
def test_a_change_of_the_arrangement_does_not_change_the_training(iteration, change):
    """Except in rounding. The conditioning pull is that of the energy's own term, by autograd."""
    expected, found = trained(iteration()), trained(iteration(change))
    moved = (expected - weights(iteration())).norm()
    # Adam turns the rounding of a gradient near zero into a whole step of its weight: few weights may be so.
    assert moved > 0.1 and (found - expected).norm() <= 0.02 * moved


def test_a_single_chain_saves_a_decode_and_a_chain(iteration):
    counts = []
    for changes in ((), ("single_chain",)):
        made, calls = iteration("frozen_energy", "closed_form", *changes), []
        made.calibrator.energy_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trained(made)
        counts.append(len(calls))
    # Two steps, each of chains of 3 and the energy model's own two passes.
    assert counts == [2 * (2 * 3 + 2), 2 * (3 + 2)]


def test_every_change_is_timed(capsys):
    sizes = ["--resolution", "16", "--block_out_channels", "8", "16", "--batch_size", "2", "--langevin_steps", "2"]
    training_step.main([*sizes, "--rounds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [name.replace("_", " ") for name in CHANGES if name in OURS]
    assert [row[0] for row in rows[1:]] == [
        "published",
        *names,
        "ours in fp32",
        "ours, norms in channels_last",
        "ours",
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[1:]) and float(rows[1][2]) == 1
