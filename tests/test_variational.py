"""The variational bound and active units."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from energies import randn, seeded
from linear_decoder import LATENTS, PIXELS, VARIANCE, LinearDecoder, posterior_of

from ecvae_diffusers.variational import active_units, elbo_loss, kl_warmup, likelihood_bounds


def posterior(batch_size: int = 6, dimensions: int = 5, seed: int = 0) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(randn(batch_size, 2 * dimensions, 1, 1, seed=seed).requires_grad_())


def images(seed: int) -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=seeded(seed)) * 2 - 1


def test_loss_is_summed_error_plus_beta_kl():
    q, real, made = posterior(), images(1), images(2)
    output = elbo_loss(real, made, q, kl_weight=0.3)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(q.mean, q.std), normal(0.0, 1.0)).sum().item() / len(real)
    error = (real - made).square().sum() / len(real)
    assert output.reconstruction == pytest.approx(error.item(), rel=1e-6)
    assert output.kl == pytest.approx(kl, rel=1e-5)
    assert output.loss.item() == pytest.approx(error.item() + 0.3 * kl, rel=1e-5)
    assert output.loss.requires_grad and not output.reconstruction.requires_grad and not output.kl.requires_grad


def test_active_units_are_those_whose_mean_varies():
    scale = torch.tensor([1.0, 0.3, 0.05, 0.0])
    mean = randn(500, 4) * scale + 7.0
    assert active_units(mean) == 2
    assert active_units(mean.view(500, 4, 1, 1)) == 2
    assert active_units(mean[:1]) == 0


def test_kl_warmup_rises_in_equal_parts_to_the_weight_and_stays():
    weights = [kl_warmup(2.0, step, 4) for step in range(6)]
    assert weights == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert kl_warmup(2.0, 0, 0) == 2.0


@pytest.fixture
def model():
    """Images of a linear decoder, the decoder, its posterior and log p(x)."""
    decoder = LinearDecoder()
    sample = decoder(randn(6, LATENTS, 1, 1)) + VARIANCE**0.5 * randn(6, 1, 2, 4, seed=1)
    covariance = decoder.weight @ decoder.weight.T + VARIANCE * torch.eye(PIXELS)
    normal = torch.distributions.MultivariateNormal(torch.zeros(PIXELS), covariance)
    return sample, decoder, decoder.posterior(sample), normal.log_prob(sample.flatten(1))


def test_bounds_are_log_p_if_the_posterior_is_exact(model, like_mps):
    sample, decoder, q, exact = model
    bounds = likelihood_bounds(sample, q, decoder, 7, VARIANCE, seeded(1))
    assert torch.allclose(bounds.importance_weighted, exact, atol=1e-3)
    assert torch.allclose(bounds.elbo, exact, atol=1e-3)
    parts = likelihood_bounds(sample, q, decoder, 7, VARIANCE, seeded(1), batch_size=6)
    assert torch.allclose(parts.importance_weighted, bounds.importance_weighted, atol=1e-5)
    with like_mps():  # without float64
        bounds = likelihood_bounds(sample, q, decoder, 7, VARIANCE, seeded(1))
    assert torch.allclose(bounds.importance_weighted, exact, atol=1e-2)


def test_bounds_lie_below_log_p_and_rise_with_the_number_of_samples(model):
    sample, decoder, true, exact = model
    q, generator = posterior_of(true.mean + 0.1, 2**0.5 * true.std), seeded(1)
    of = likelihood_bounds(sample, q, decoder, 20_000, VARIANCE, generator)
    # The mean of many bounds of five samples each.
    many = DiagonalGaussianDistribution(q.parameters.repeat(500, 1, 1, 1))
    of_five = likelihood_bounds(sample.repeat(500, 1, 1, 1), many, decoder, 5, VARIANCE, generator)
    assert of.elbo.mean() + 0.5 < of_five.importance_weighted.mean() < of.importance_weighted.mean() - 0.05
    assert torch.allclose(of.importance_weighted, exact, atol=0.05)
    # The bound of one sample, which training minimizes, is log p(x) - KL(q || p(z|x)).
    normals = (torch.distributions.Normal(one.mean, one.std) for one in (q, true))
    expected = exact - torch.distributions.kl_divergence(*normals).flatten(1).sum(1)
    assert torch.allclose(of.elbo, expected, atol=0.1)


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"variance": float("nan")}, {"batch_size": 0}])
def test_bounds_refuse(wrong, model):
    sample, decoder, q, _ = model
    with pytest.raises(ValueError, match=next(iter(wrong))):
        likelihood_bounds(sample, q, decoder, **wrong)
