# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Modules that several contexts freeze at a time, which need not end in the order in which they began."""

from contextlib import ExitStack

import pytest
import torch
from energies import randn, tiny_energy_model
from torch import nn

from ecvae_diffusers.energy import energy_and_gradient, frozen, unfrozen_copy


def flags(module: nn.Module) -> tuple[list[bool], list[bool]]:
    return [part.training for part in module.modules()], [one.requires_grad for one in module.parameters()]


@pytest.mark.parametrize("first_to_end", [0, 1])
@pytest.mark.parametrize("of_a_part", [False, True])
def test_a_module_is_frozen_until_the_last_context_ends(first_to_end, of_a_part):
    module = tiny_energy_model(num_scales=2).train()
    before, samples = flags(module), randn(2, 1, 8, 8)
    contexts = [ExitStack(), ExitStack()]
    contexts[0].enter_context(frozen(module))
    expected = energy_and_gradient(module, samples)
    contexts[1].enter_context(frozen(module.networks[1] if of_a_part else module))
    contexts[first_to_end].close()
    still_frozen = module.networks[1] if of_a_part and first_to_end == 0 else module
    assert not any(one for kind in flags(still_frozen) for one in kind)
    if still_frozen is module:
        torch.testing.assert_close(energy_and_gradient(module, samples), expected, rtol=0, atol=0)
    contexts[1 - first_to_end].close()
    assert flags(module) == before and any(one for kind in before for one in kind)


def test_other_modules_train_while_one_is_frozen():
    """Their normalized weights are computed for each pass, as `backward` requires, and follow each step."""
    module, other, samples = tiny_energy_model(), tiny_energy_model().train(), randn(2, 1, 8, 8)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with frozen(module):
        energies = []
        for _ in range(2):
            energy = other(samples).energy.sum()
            energy.backward()
            optimizer.step()
            energies.append(energy.item())
    assert energies[0] != energies[1]


def test_weights_of_inference_mode_have_gradients_elsewhere():
    module, samples = tiny_energy_model().eval(), randn(2, 1, 8, 8)
    expected = energy_and_gradient(module, samples)
    with frozen(module):
        with torch.inference_mode():
            module(samples)
        torch.testing.assert_close(energy_and_gradient(module, samples), expected, rtol=0, atol=0)


def test_a_frozen_module_normalizes_its_weights_once_and_follows_new_ones_later():
    module, samples = tiny_energy_model().eval(), randn(2, 1, 8, 8)
    calls = []
    normalized = [part for name, part in module.named_modules() if name.endswith("parametrizations.weight")]
    for part in normalized:
        part[0].register_forward_hook(lambda *_: calls.append(1))
    with frozen(module):
        first = [module(samples).energy for _ in range(3)][-1]
    assert len(calls) == len(normalized) > 0
    with torch.no_grad():
        module.networks[0].conv_out.bias.add_(1)
        module.networks[0].conv_in.parametrizations.weight.original.mul_(torch.rand(3, 3))
    with frozen(module):
        assert not torch.allclose(module(samples).energy, first + 1)


def test_a_copy_of_a_frozen_module_normalizes_its_own_weights():
    module, samples = tiny_energy_model().eval(), randn(2, 1, 8, 8)
    with frozen(module):
        module(samples)
        twin = unfrozen_copy(module)
    with torch.no_grad():
        twin.networks[0].conv_in.parametrizations.weight.original.mul_(torch.rand(3, 3))
    fresh = tiny_energy_model().eval()
    fresh.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(samples).energy, fresh(samples).energy)
