# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One pipeline that threads share, each call with its own generator, gives the images of each seed."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ecvae_diffusers import ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.operators import Inpainting


THREADS, CALLS = 8, 24
PICTURES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
LEFT = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)


def generate(pipe: ECVAEPipeline, seed: int) -> tuple[torch.Tensor, ...]:
    """Call what a seed chooses: generation with and without refinement, reconstruction, energies."""
    drawn = {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    match seed % 4:
        case 0:
            return (pipe(2, **drawn).images,)
        case 1:
            return (pipe(1 + seed % 3, num_refinement_steps=1 + seed % 5, **drawn).images,)
        case 2:
            return (pipe.reconstruct(PICTURES, sample_posterior=True, num_refinement_steps=2, **drawn).images,)
    return (pipe.score(PICTURES),)


def restore(pipe: ECVAERestorationPipeline, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    output = pipe(
        (2 * PICTURES - 1) * LEFT, Inpainting(LEFT), noise_std=0.1, num_inference_steps=4 + seed % 3, generator=generator,
        energy_weight=0.5 * (seed % 2), output_type="pt",
    )  # fmt: skip
    return output.images, output.std, output.energy


@pytest.fixture
def pipe(make_pipeline) -> ECVAEPipeline:
    """A pipeline with progress bars, whose models are in training mode, with spectral norm."""
    pipe = make_pipeline(drift_step_size=10.0)
    pipe.vae.register_to_config(reconstruction_variance=0.1)
    pipe.set_progress_bar_config(disable=False, leave=False)
    for model in (pipe.vae, pipe.energy_model):
        model.train()
    return pipe


@pytest.fixture
def many_switches():
    """Threads take turns at nearly every chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("call", [generate, restore])
def test_each_image_is_that_of_its_seed(pipe, call, many_switches):
    models = (pipe.vae, pipe.energy_model)
    shared = pipe if call is generate else ECVAERestorationPipeline.from_pipe(pipe)
    modes = [part.training for model in models for part in model.modules()]
    trained = [parameter.requires_grad for model in models for parameter in model.parameters()]
    expected = [call(shared, seed) for seed in range(CALLS)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda seed: call(shared, seed), range(CALLS)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [part.training for model in models for part in model.modules()] == modes
    assert [parameter.requires_grad for model in models for parameter in model.parameters()] == trained


def test_pipelines_that_share_weights_are_interrupted_on_their_own(pipe, many_switches):
    """`_interrupt` is that of a pipeline: `from_pipe` makes one for each call that may be stopped."""
    expected = {steps: restore(ECVAERestorationPipeline.from_pipe(pipe), steps) for steps in range(6)}

    def run(number: int) -> tuple[torch.Tensor, ...] | int:
        own, seen = ECVAERestorationPipeline.from_pipe(pipe), []
        if number % 2:
            return restore(own, number // 2)

        def stop(pipe, step, timestep, tensors):
            seen.append(step)
            pipe._interrupt = step == 1

        own((2 * PICTURES - 1) * LEFT, Inpainting(LEFT), num_inference_steps=50, callback_on_step_end=stop)
        return len(seen)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, range(12)))
    assert found[::2] == [2] * 6
    torch.testing.assert_close(found[1::2], list(expected.values()), rtol=0, atol=0)
