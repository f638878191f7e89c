# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energies of samples and their gradients, for any frozen energy model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
from torch.nn.utils import parametrize


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Freeze a module while a chain runs on it: evaluation mode, no parameter gradients, normalized weights computed once. In training
    mode, spectral norm would take a power iteration at every step and so change the energy. The mode and `requires_grad` of every
    part are restored afterwards.

    Gradients also pass through a module that diffusers offloads or casts layer by layer. Its hooks swap the data of a parameter
    after the layer's forward pass, so the tensors that backward needs are saved during that pass.
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
    Return one energy per sample, shape (B,), in float32 or higher precision. `energy_model` is an [`EnergyModel`] or any callable
    that returns a tensor of B numbers. A module receives the samples in the precision of its parameters. A `condition` of B items,
    such as class labels, is passed as the second argument. Raises `ValueError` if the number of energies is not B.
    """
    if isinstance(energy_model, nn.Module):
        parameter = next(energy_model.parameters(), sample)
        if parameter.dtype != sample.dtype:
            # Layerwise casting stores weights in another precision than a diffusers model computes in, which is its `dtype`.
            sample = sample.to(getattr(energy_model, "dtype", parameter.dtype))
    output = energy_model(sample) if condition is None else energy_model(sample, condition)
    energy = getattr(output, "energy", output)
    if not isinstance(energy, torch.Tensor) or energy.numel() != len(sample):
        found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
        raise ValueError(f"`energy_model` must return one energy per sample ({len(sample)}), but returned {found}.")
    return energy.to(torch.promote_types(energy.dtype, torch.float32)).view(len(sample))


def out_of_inference_mode(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor from inference mode, which autograd can't use. Return any other tensor as it is."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def energy_and_gradient(
    energy_model: Callable, sample: torch.Tensor, condition: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the energies of samples, shape (B,), and their gradients, in the shape and dtype of `sample`, without a graph."""
    with torch.inference_mode(False), torch.enable_grad():
        sample = out_of_inference_mode(sample).detach().requires_grad_()
        energy = compute_energy(energy_model, sample, condition)
        return energy.detach(), torch.autograd.grad(energy.sum(), sample)[0]
