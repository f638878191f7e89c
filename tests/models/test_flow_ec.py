# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests of `FlowEC`: it can be inverted, and its log-determinant is that of the Jacobian."""

import math

import pytest
import torch
from energies import seeded
from model_tests import ModelTests, images, trained_parameters, unsettle

from ecvae_diffusers import FlowEC
from ecvae_diffusers.models import as_shown, bits_per_dimension, dequantize


CONFIGS = {
    "one_level": {"num_levels": 1, "steps_per_level": 2},
    "colour": {"num_levels": 3, "in_channels": 3},
    "oblong": {"sample_size": (4, 12), "in_channels": 6},
}


def tiny(sample_size: int | tuple[int, int] = 8, in_channels: int = 1, **kwargs) -> FlowEC:
    torch.manual_seed(0)
    kwargs = {"num_levels": 2, "steps_per_level": 1, "hidden_channels": 8, **kwargs}
    return FlowEC(sample_size=sample_size, in_channels=in_channels, **kwargs)


@pytest.fixture(params=CONFIGS)
def flow(request) -> FlowEC:
    model = tiny(**CONFIGS[request.param])
    return unsettle(model, sample_of(model))


def sample_of(flow: FlowEC, batch_size: int = 3, seed: int = 0) -> torch.Tensor:
    return images(batch_size, flow.config.in_channels, flow.config.sample_size, seed)


def latents_of(flow: FlowEC, batch_size: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, flow.num_latents, 1, 1, generator=seeded(seed))


class TestFlowECModel(ModelTests):
    @pytest.fixture
    def model(self):
        return unsettle(tiny(), images(3, 1, 8))

    def sample(self):
        return images(3, 1, 8)

    def outputs(self, model, sample):
        return list(model(sample, prior_latents=latents_of(model).to(sample.dtype)).to_tuple())

    def loss(self, model, sample):
        """The likelihood, plus a term on samples, which carry gradients too."""
        output = model(sample, prior_latents=latents_of(model))
        return -output.log_prob.mean() + output.prior_sample.square().flatten(1).sum(1).mean()


def test_is_inverted(flow):
    with torch.no_grad():
        latents, _ = flow.encode(sample_of(flow))
        assert latents.shape == (3, flow.num_latents, 1, 1)
        assert (flow.decode(latents) - sample_of(flow)).abs().max() < 1e-4
        # And from the other side, where steep places of a random map cost digits.
        drawn = latents_of(flow).double()
        assert (flow.double().encode(flow.decode(drawn))[0] - drawn).abs().max() < 1e-9


def test_is_inverted_under_autocast(flow):
    """Only the networks of couplings compute in bfloat16. Their inputs, equal up to rounding of float32, may round differently."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        latents, log_det = flow.encode(sample_of(flow))
        error = flow.decode(latents) - sample_of(flow)
    assert latents.dtype == log_det.dtype == torch.float32
    assert not torch.equal(latents, flow.encode(sample_of(flow))[0])  # bfloat16 was used
    assert error.abs().max() < 5e-3 and error.square().mean().sqrt() < 5e-4


def test_log_determinant_is_that_of_the_jacobian(flow):
    flow.double()
    for sample in sample_of(flow, 2).double():
        jacobian = torch.autograd.functional.jacobian(
            lambda x: flow.encode(x.view(1, *sample.shape))[0].flatten(), sample.flatten()
        )
        _, log_det = flow.encode(sample[None])
        assert abs(log_det.item() - torch.linalg.slogdet(jacobian)[1].item()) < 1e-9


def test_each_transform_is_inverted_with_its_determinant(flow):
    """The determinant of the inverse is the negative. Hooks and compilers see `forward` in both directions."""
    level = flow.double().levels[0]
    step, channels = level.blocks[0], 4 * flow.config.in_channels
    for transform in (step.norm, step.conv, step.coupling, step, level):
        x = torch.randn(3, channels // 4 if transform is level else channels, 4, 4, generator=seeded(3)).double()
        y, log_det = transform(x)
        again, inverse_log_det = transform(y, inverse=True)
        torch.testing.assert_close(again, x)
        torch.testing.assert_close(inverse_log_det, -log_det)


def test_log_prob_is_the_normal_density_times_the_determinant(flow):
    sample, drawn = sample_of(flow), latents_of(flow)
    with torch.no_grad():
        latents, log_det = flow.encode(sample)
        output = flow(sample, prior_latents=drawn)
        normal = torch.distributions.Normal(0, 1).log_prob(latents).flatten(1).sum(1)
        torch.testing.assert_close(output.log_prob, normal + log_det, rtol=1e-5, atol=1e-4)
        assert torch.equal(output.log_prob, flow.log_prob(sample))
        assert torch.equal(output.prior_sample, flow.decode(drawn))


def test_density_integrates_to_one():
    """By draws from the wider density r of a hotter flow: the mean of p / r is 1."""
    flow = tiny()
    with torch.no_grad():
        latents, log_det = flow.encode(flow.decode(1.2 * latents_of(flow, 20_000)))
        log_wider = torch.distributions.Normal(0, 1.2).log_prob(latents).flatten(1).sum(1) + log_det
        ratio = (flow.log_prob(flow.decode(latents)) - log_wider).double().exp()
    assert abs(ratio.mean().item() - 1) < 5 * ratio.std().item() / math.sqrt(len(ratio)) < 0.5


def test_gradients_pass_through_sampling():
    """Calibration trains the flow through its inverse: the gradient of samples by finite differences."""
    flow = unsettle(tiny(), images(3, 1, 8)).double()
    sample, drawn, parameters = sample_of(flow).double(), latents_of(flow, 1).double(), trained_parameters(flow)

    def decode(*values: torch.Tensor) -> torch.Tensor:
        weights = dict(zip(parameters, values))
        return torch.func.functional_call(flow, weights, (sample,), {"prior_latents": drawn}).prior_sample

    assert torch.autograd.gradcheck(decode, tuple(parameters.values()), fast_mode=True)


def test_samples_are_decoded_draws():
    flow = unsettle(tiny(), images(3, 1, 8))
    expected = flow.decode(0.7 * latents_of(flow, 4, seed=5))
    sample = flow.sample(4, seeded(5), temperature=0.7)
    assert torch.equal(sample, expected) and sample.requires_grad
    # One generator per image: each is drawn by itself.
    both = flow.sample(2, [seeded(5), seeded(6)])
    torch.testing.assert_close(both[1:], flow.sample(1, [seeded(6)]), rtol=1e-5, atol=1e-5)


def test_initialized_on_data_it_is_normalized():
    flow = tiny(steps_per_level=2)
    data = 0.3 * images(200, 1, 8) + 0.5
    flow.initialize(data)
    found = []
    for level in flow.levels:
        for step in level.blocks:
            step.norm.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    with torch.no_grad():
        flow.encode(data)
    assert len(found) == 4
    for output in found:
        assert output.mean((0, 2, 3)).abs().max() < 1e-4
        assert (output.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_dequantized_levels_fill_the_range_once():
    levels = torch.arange(256).float().view(1, 1, 16, 16) / 127.5 - 1
    low, high = dequantize(levels, torch.zeros_like(levels)), dequantize(levels, torch.ones_like(levels))
    assert low.min() == -1 and high.max() == 1
    assert torch.equal(low.flatten()[1:], high.flatten()[:-1])


def test_bits_of_a_uniform_density_are_eight():
    """Each of 256 levels as likely as any: 1/2 over [-1, 1)."""
    assert abs(bits_per_dimension(torch.tensor([-64 * math.log(2)]), 64).item() - 8) < 1e-6


def test_samples_are_calibrated_as_they_are_shown():
    """Clipped; entries out of range are pulled back, and never pushed further out."""
    samples = torch.tensor([[-9.0, -1.5, 0.25, 3.0, 3.0], [-1e5, 0.5, 0.25, 1.0, 2.0]])
    samples = samples.view(2, 1, 1, 5).requires_grad_()
    shown, is_far = as_shown(samples)
    assert torch.equal(shown.flatten(1), torch.tensor([[-1.0, -1.0, 0.25, 1.0, 1.0], [-1.0, 0.5, 0.25, 1.0, 1.0]]))
    assert is_far.tolist() == [False, True]
    # Only the second and the last entry of the first sample have targets further out.
    target = torch.tensor([-0.9, -1.5, 0.0, 0.5, 1.5]).view(1, 1, 1, 5)
    (shown - target).square().sum().backward()
    whole = 2 * (shown - target).detach().flatten(1)
    expected = torch.stack([whole[0] * torch.tensor([1, 0, 1, 1, 0]), 1e-4 * whole[1] * torch.tensor([1, 1, 1, 1, 0])])
    torch.testing.assert_close(samples.grad.flatten(1), expected)
    assert as_shown(torch.full((1, 1, 2, 2), math.nan))[0].isnan().all()  # nothing is hidden


def test_a_sample_that_is_far_away_weighs_little_more_than_others(flow):
    """Though the inverse's Jacobian is enormous there."""

    def gradient_norm(latents: torch.Tensor) -> float:
        flow.zero_grad()
        as_shown(flow.decode(latents))[0].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in trained_parameters(flow).values()]).norm().item()

    near, far = latents_of(flow, 1, seed=1), 1e4 * latents_of(flow, 1, seed=1)
    assert as_shown(flow.decode(far))[1].all()
    assert 0 < gradient_norm(far) < 10 * gradient_norm(near)


@pytest.mark.parametrize(
    "name, value",
    [
        ("sample_size", 9), ("sample_size", (8, 10)), ("in_channels", 17), ("num_levels", 4), ("num_levels", 0), ("steps_per_level", 0),
        ("steps_per_level", 10**6), ("hidden_channels", 0), ("hidden_channels", 10**6),
    ],
)  # fmt: skip
def test_invalid_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        tiny(**{name: value})


def test_wrong_input_is_refused():
    """Also images of 0 to 255, which would get a density far outside of [-1, 1]."""
    flow = tiny()
    for sample in (images(2, 3, 8), images(2, 1, 16), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="`sample`"):
            flow.log_prob(sample)
    with pytest.raises(ValueError, match="`latents`"):
        flow.decode(torch.zeros(2, 64))
