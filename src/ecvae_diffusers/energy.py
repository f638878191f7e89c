# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energies of samples and their gradients, of any energy model held still."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
from torch.nn.utils import parametrize


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Hold a module still while a chain runs on it: evaluation mode (spectral norm would otherwise take a power iteration,
    and change the energy, at every step), no parameter gradients, normalized weights computed once. The mode and
    `requires_grad` of every part are restored.

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


def compute_energy(energy_model: Callable, sample: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    One energy a sample, shape (B,), float32 or more, of an [`EnergyModel`] or of any callable that gives a tensor of B.
    A module is given samples in the precision of its parameters; with `dtype` it computes in that one, by autocast.
    """
    if isinstance(energy_model, nn.Module):
        parameter = next(energy_model.parameters(), sample)
        if parameter.dtype != sample.dtype:
            # A model of diffusers knows in which precision it computes, where layerwise casting stores weights in another.
            sample = sample.to(getattr(energy_model, "dtype", parameter.dtype))
    if dtype is None:
        output = energy_model(sample)
    else:
        with torch.autocast(sample.device.type, dtype=dtype, enabled=dtype != torch.float32):
            if isinstance(energy_model, nn.Module):
                # The class's own `forward`: Accelerate puts one on the module that autocasts to the precision of training.
                output = type(energy_model).forward(energy_model, sample)
            else:
                output = energy_model(sample)
    energy = getattr(output, "energy", output)
    if not isinstance(energy, torch.Tensor) or energy.numel() != sample.shape[0]:
        found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
        raise ValueError(f"`energy_model` must give one energy a sample ({sample.shape[0]}), but gave {found}.")
    return energy.to(torch.promote_types(energy.dtype, torch.float32)).view(sample.shape[0])


def out_of_inference_mode(x: torch.Tensor) -> torch.Tensor:
    """A tensor of inference mode can't be computed with where gradients are taken, a copy of it can."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def energy_and_gradient(
    energy_model: Callable, sample: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Each sample's energy, shape (B,), and its gradient with respect to the sample, in shape and dtype of `sample`. No
    graph is kept. `dtype` as for `compute_energy`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        sample = out_of_inference_mode(sample).detach().requires_grad_()
        energy = compute_energy(energy_model, sample, dtype)
        return energy.detach(), torch.autograd.grad(energy.sum(), sample)[0]
