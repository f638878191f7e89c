"""A network with its optimizer and schedule, and what is done to their rates and gradients."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from diffusers.optimization import get_scheduler

from ecvae_diffusers.training.config import OptimizerConfig


@dataclass
class Trained:
    """A wrapped network, its wrapped optimizer and schedule, and the rate that it was given."""

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: AcceleratedScheduler
    learning_rate: float

    def scale_learning_rate(self, factor: float) -> None:
        """Go on at `factor` times the rate that was given, wherever in the schedule."""
        schedule = self.lr_scheduler.scheduler
        schedule.base_lrs = [self.learning_rate * factor] * len(schedule.base_lrs)
        for group, base, rule in zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
            group["lr"] = base * rule(schedule.last_epoch)


def build_trained(
    config: OptimizerConfig,
    accelerator: Accelerator,
    network: torch.nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
) -> Trained:
    """Return Adam and its schedule for the trained parameters of a network, wrapped by Accelerate."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=0.0)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        # Accelerate steps a prepared schedule once a process.
        num_warmup_steps=(config.lr_warmup_steps or 0) * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
    )
    network, optimizer, lr_scheduler = accelerator.prepare(network, optimizer, lr_scheduler)
    return Trained(network, optimizer, lr_scheduler, learning_rate)


def clip_gradients(accelerator: Accelerator, trained: Trained, max_norm: float | None) -> torch.Tensor:
    """The Euclidean norm of a network's gradients, after which they are scaled down to `max_norm`, if one is given."""
    # Of this optimizer alone: Accelerate's own clipping would unscale the gradients of both.
    accelerator.unscale_gradients(trained.optimizer)
    return torch.nn.utils.clip_grad_norm_(trained.network.parameters(), math.inf if max_norm is None else max_norm)
