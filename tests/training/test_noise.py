"""The draws of one iteration: the same for one process and for many, whatever came before."""

import torch

from ecvae_training.noise import ChainNoise, StepNoise


CPU = torch.device("cpu")


def test_shares_of_many_processes_are_the_draws_of_one():
    one = StepNoise(3, 7, 0, 1, CPU)
    four = [StepNoise(3, 7, rank, 4, CPU) for rank in range(4)]
    for draw in ("uniform", "normal"):  # in turn: each draw goes on where the one before ended, on every process
        whole = getattr(one, draw)(8, 2, 3)
        assert torch.equal(whole, torch.cat([getattr(noise, draw)(2, 2, 3) for noise in four]))
    samples = torch.zeros(8, 1, 4, 4)
    chain, shares = ChainNoise(one, samples), [ChainNoise(noise, samples[:2]) for noise in four]
    for timestep in range(3):
        assert torch.equal(chain[timestep], torch.cat([share[timestep] for share in shares]))


def test_draws_depend_on_seed_and_step_alone():
    draws = {
        (seed, step): StepNoise(seed, step, 0, 1, CPU).normal(2, 500)
        for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    for key, values in draws.items():
        assert torch.equal(values, StepNoise(*key, 0, 1, CPU).normal(2, 500))
        for other, others in draws.items():
            if other != key:
                assert torch.corrcoef(torch.stack([values.flatten(), others.flatten()]))[0, 1].abs() < 0.15
    assert abs(draws[0, 0].mean()) < 0.1 and abs(draws[0, 0].std() - 1) < 0.1
