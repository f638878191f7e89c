# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energies of samples and their gradients, for any frozen energy model."""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils import parametrize


def once(normalize: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """
    Return a parametrization, such as spectral norm, that computes its weight at the first call and keeps it. Two threads that call it
    first may both compute it. The weight never belongs to inference mode, since other threads may need gradients through it.
    """

    @functools.cache
    def forward() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return normalize()

    return forward


class Freeze:
    """What a module, without its parts, was before it was frozen, and the number of contexts that need it frozen."""

    def __init__(self, module: nn.Module, keeps_weight: bool):
        self.module, self.users, self.training, self.keeps_weight = module, 0, module.training, keeps_weight
        self.trained = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        self.forward = vars(module).get("forward")  # that of a hook
        for parameter in self.trained:
            parameter.requires_grad_(False)
        if keeps_weight:
            module.forward = once(module.forward)
        module.training = False

    def undo(self) -> None:
        self.module.training = self.training
        for parameter in self.trained:
            parameter.requires_grad_(True)
        if self.keeps_weight:
            del self.module.forward
            if self.forward is not None:
                self.module.forward = self.forward


# Of all threads, which may share modules.
FREEZES = dict[nn.Module, Freeze]()
FREEZES_LOCK = threading.Lock()


def unfrozen_copy(module: nn.Module) -> Any:
    """Return a deep copy of a module, which may be frozen meanwhile: the copy normalizes its own weights."""
    with FREEZES_LOCK:
        twin = copy.deepcopy(module)
        for part, own in zip(twin.modules(), module.modules()):
            if own in FREEZES and FREEZES[own].keeps_weight:
                del part.forward
    return twin


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Freeze a module while a chain runs on it: evaluation mode, no parameter gradients, normalized weights computed once. In training
    mode, spectral norm would take a power iteration at every step and so change the energy. The mode and `requires_grad` of every
    part are restored afterwards. If several threads freeze a module, that is when the last of them is done.

    Gradients also pass through a module that diffusers offloads or casts layer by layer. Its hooks swap the data of a parameter
    after the layer's forward pass, so the tensors that backward needs are saved during that pass.
    """
    parts = list(module.modules())
    # A compiled module normalizes its weights in its graph: it would be compiled again for each freeze.
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
    with FREEZES_LOCK:
        for part in parts:
            if part not in FREEZES:
                # Not by `parametrize.cached`: it keeps the weights of all modules in all threads, also those in training.
                FREEZES[part] = Freeze(part, isinstance(part, parametrize.ParametrizationList) and not is_compiled)
            FREEZES[part].users += 1
    is_hooked = any(hasattr(part, "_diffusers_hook") for part in parts)
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    try:
        with kept if is_hooked else nullcontext():
            yield
    finally:
        with FREEZES_LOCK:
            for part in parts:
                FREEZES[part].users -= 1
                if FREEZES[part].users == 0:
                    FREEZES.pop(part).undo()


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
