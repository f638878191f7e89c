"""The random draws of one iteration, from its number alone.

They depend on the seed and the step, and on nothing that came before: a resumed run draws what the uninterrupted one
would have. And each process draws those of the GLOBAL batch and takes its share: one process and many agree, at the
cost of drawing what others use, which is little beside a network pass.
"""

import numpy as np
import torch


class StepNoise:
    """
    Args:
        seed (`int`), step (`int`): What the draws depend on.
        process_index (`int`), num_processes (`int`): Which share of the global batch is this process's.
        device (`torch.device`): Where to draw.
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
        """Standard normal draws (batch_size, *shape), of the (num_processes * batch_size, *shape) that all have."""
        size = (self.num_processes * batch_size, *shape)
        return self._share(torch.randn(size, generator=self.generator, device=self.generator.device))

    def uniform(self, batch_size: int, *shape: int) -> torch.Tensor:
        """As `normal`, from [0, 1)."""
        size = (self.num_processes * batch_size, *shape)
        return self._share(torch.rand(size, generator=self.generator, device=self.generator.device))


class ChainNoise:
    """The draws of a Langevin chain, each when its step asks for it: all at once would be K global batches of images."""

    def __init__(self, noise: StepNoise, samples: torch.Tensor):
        self.noise = noise
        self.shape = samples.shape

    def __getitem__(self, timestep: int) -> torch.Tensor:
        return self.noise.normal(*self.shape)
