"""The model's own error: its size, its spectrum, and errors drawn of it."""

import pytest
import torch

from ecvae_diffusers.model_error import (
    NUM_BANDS,
    at_frequencies,
    colored,
    error_power,
    mean_over_frequencies,
    spectrum_of,
    squared_error,
)


SMOOTH = [8.0, 6.0, 3.0, 1.0, 0.5] + [0.1] * (NUM_BANDS - 5)


def white(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("height, width", [(16, 16), (15, 12), (1, 1), (33, 7)])
def test_the_mean_power_is_the_mean_squared_error(height, width):
    """Parseval's identity, whatever the parity of height and width. The spectrum of white errors is flat."""
    images, other = white(3, 2, height, width), white(3, 2, height, width, seed=1)
    mean = mean_over_frequencies(error_power(images, other), width)
    torch.testing.assert_close(mean, (images - other).square().mean())
    torch.testing.assert_close(squared_error(images, other).mean(), mean.float())
    power = torch.full((height, width // 2 + 1), 0.3, dtype=torch.float64)
    assert spectrum_of(power, width) == pytest.approx([1.0] * NUM_BANDS)


def test_a_spectrum_is_found_again_in_errors_drawn_of_it():
    height, width = 15, 12
    errors = colored(white(4000, 1, height, width), SMOOTH)
    assert errors.square().mean().item() == pytest.approx(1, abs=0.05)
    found = torch.tensor(spectrum_of(error_power(torch.zeros_like(errors), errors), width), dtype=torch.float64)
    expected, values = (
        at_frequencies(torch.tensor(s, dtype=torch.float64), height, width) for s in (SMOOTH, found.tolist())
    )
    expected = expected / mean_over_frequencies(expected, width)
    # Bands are means over rings, which smooths what falls steeply.
    off, size = (mean_over_frequencies(x.square(), width).sqrt() for x in (values - expected, expected))
    assert off < 0.15 * size


def test_coloring_is_symmetric_and_its_covariance_the_same_everywhere():
    identity = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    root = colored(identity, SMOOTH).flatten(1)
    torch.testing.assert_close(root, root.mT)
    covariance = root @ root.mT
    torch.testing.assert_close(covariance.diagonal(), torch.ones(64, dtype=torch.float64))
    shifted = covariance.view(8, 8, 8, 8).roll((3, 2, 3, 2), (0, 1, 2, 3)).reshape(64, 64)
    torch.testing.assert_close(covariance, shifted)
    assert covariance[0, 1] > 0.5  # neighbours' errors are alike
    assert colored(identity, None) is identity
    torch.testing.assert_close(colored(identity, [2.0] * NUM_BANDS), identity)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_no_spectrum_of_no_error(value):
    with pytest.raises(ValueError, match="`power`"):
        spectrum_of(torch.full((8, 5), value, dtype=torch.float64), 8)
