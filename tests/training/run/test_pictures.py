"""Pictures and scalars of a run: grids, the chain's strip, and spreads over several processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ecvae_diffusers.training.data.transforms import batch_spread
from ecvae_diffusers.training.run.log import reduce_scalars
from ecvae_diffusers.training.run.pictures import chain_strip, pairs_grid


def test_spread_of_energies_over_processes_comes_from_moments():
    class TwoProcesses:
        """The mean over this process and one with 5 and 7."""

        @staticmethod
        def reduce(values, reduction):
            return (values + torch.tensor([6.0, 37.0], dtype=values.dtype)) / 2

    first, whole = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0, 5.0, 7.0])
    logged = reduce_scalars(TwoProcesses(), {"energy": first.mean(), "energy_square": first.square().mean()})
    assert logged == pytest.approx({"energy": whole.mean().item(), "energy_std": whole.std(correction=0).item()})


def test_scalars_on_mps(like_mps):
    accelerator, values = Accelerator(cpu=True), torch.tensor([1.0, 3.0])
    with like_mps():
        logged = reduce_scalars(accelerator, {"energy": values.mean(), "energy_square": values.square().mean()})
    assert logged == pytest.approx({"energy": 2.0, "energy_std": 1.0})


def test_grids():
    assert batch_spread(torch.ones(4, 1, 2, 2)) == 0
    assert batch_spread(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])) == 0.5
    pairs = np.asarray(pairs_grid(torch.zeros(16, 1, 4, 4), torch.ones(16, 1, 4, 4)))
    assert pairs.shape == (4 * 5 - 1, 8 * 5 - 1)
    assert [pairs[row * 5, 0] for row in range(4)] == [128, 255, 128, 255]
    assert pairs_grid(torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)).size == (3 * 5 - 1, 2 * 5 - 1)
    states = torch.zeros(3, 2, 4, 4, 4)
    states[1:, 0, 0] = 0.01
    strip = np.asarray(chain_strip(states))
    assert strip.shape == (2 * 5 - 1, 4 * 5 - 1, 4)
    # Where it moved most is white in that channel, grey elsewhere, and opaque.
    assert strip[0, 15].tolist() == [255, 128, 128, 255] and strip[5, 15].tolist() == [128, 128, 128, 255]
