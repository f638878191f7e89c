# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energies of samples and their gradients, of any frozen energy model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
from torch.nn.utils import parametrize


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Freeze a module while a chain runs on it: evaluation mode (spectral norm would otherwise take a power iteration, and change the
    energy, at every step), no parameter gradients, normalized weights computed once. The mode and `requires_grad` of every part are
    restored.

    Gradients pass through a module that diffusers offloads or casts layer by layer too: its hooks swap the data of a parameter
    after the layer's forward pass, so what backward needs is kept from that pass.
    """
    modes = [(m, m.training) for m in module.modules()]
    trained = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    is_hooked = any(hasattr(m, "_diffusers_hook") for m, _ in modes)
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    try:
        with parametrize.cached(), kept if is_hooked else nullcontext():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def compute_energy(
    energy_model: Callable, sample: torch.Tensor, condition: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return one energy per sample, shape (B,), float32 or more, of an [`EnergyModel`] or of any callable that gives a tensor of B
    numbers. A module gets the samples in the precision of its parameters. A `condition` of B items, such as classes, is passed on
    as the second argument.
    """
    if isinstance(energy_model, nn.Module):
        parameter = next(energy_model.parameters(), sample)
        if parameter.dtype != sample.dtype:
            # A model of diffusers knows in which precision it computes, where layerwise casting stores weights in another.
            sample = sample.to(getattr(energy_model, "dtype", parameter.dtype))
    output = energy_model(sample) if condition is None else energy_model(sample, condition)
    energy = getattr(output, "energy", output)
    if not isinstance(energy, torch.Tensor) or energy.numel() != len(sample):
        found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
        raise ValueError(f"`energy_model` must give one energy per sample ({len(sample)}), but gave {found}.")
    return energy.to(torch.promote_types(energy.dtype, torch.float32)).view(len(sample))


def out_of_inference_mode(x: torch.Tensor) -> torch.Tensor:
    """Copy a tensor of inference mode, with which nothing can be computed where gradients are taken."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def energy_and_gradient(
    energy_model: Callable, sample: torch.Tensor, condition: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each sample's energy, shape (B,), and its gradient in shape and dtype of `sample`. No graph is kept."""
    with torch.inference_mode(False), torch.enable_grad():
        sample = out_of_inference_mode(sample).detach().requires_grad_()
        energy = compute_energy(energy_model, sample, condition)
        return energy.detach(), torch.autograd.grad(energy.sum(), sample)[0]
