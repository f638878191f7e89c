"""Random draws of a training step, which depend only on the seed and the number of the step.

A resumed run draws the same numbers as an uninterrupted one. Each process draws the numbers of the GLOBAL batch and takes its
share, so the results do not depend on the number of processes. The cost is small compared with a pass through a network.
"""

import numpy as np
import torch


class StepNoise:
    """
    A source of random draws for one batch of training.

    Args:
        seed (`int`), step (`int`): Determine the draws.
        process_index (`int`), num_processes (`int`): Determine this process's share of the global batch.
        device (`torch.device`): The device of the draws.
        reseed (`int`, *optional*, defaults to 0): Another number gives other draws.
    """

    def __init__(
        self, seed: int, step: int, process_index: int, num_processes: int, device: torch.device, reseed: int = 0
    ):
        mixed = np.random.SeedSequence([seed, step, reseed]).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator(device=device).manual_seed(int(mixed) >> 1)
        self.process_index = process_index
        self.num_processes = num_processes

    def _share(self, draws: torch.Tensor) -> torch.Tensor:
        return draws.chunk(self.num_processes)[self.process_index]

    def normal(self, batch_size: int, *shape: int) -> torch.Tensor:
        """Return this process's (batch_size, *shape) of (num_processes * batch_size, *shape) standard normal draws."""
        size = (self.num_processes * batch_size, *shape)
        return self._share(torch.randn(size, generator=self.generator, device=self.generator.device))

    def uniform(self, batch_size: int, *shape: int) -> torch.Tensor:
        """Return draws like `normal`, but uniform in [0, 1)."""
        size = (self.num_processes * batch_size, *shape)
        return self._share(torch.rand(size, generator=self.generator, device=self.generator.device))


class ChainNoise:
    """The noise of a Langevin chain, drawn step by step: drawn at once it would take the memory of K global batches."""

    def __init__(self, noise: StepNoise, samples: torch.Tensor):
        self.noise = noise
        self.shape = samples.shape

    def __getitem__(self, timestep: int) -> torch.Tensor:
        return self.noise.normal(*self.shape)
