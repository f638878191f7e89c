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
SIZES = [(8, 8), (16, 16), (15, 12), (9, 32), (1, 1), (33, 7)]


def white(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_error_is_one_number_an_image():
    images, other = white(3, 2, 4, 4), white(3, 2, 4, 4, seed=1)
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(images, other)]).float()
    torch.testing.assert_close(squared_error(images, other), expected)


@pytest.mark.parametrize("height, width", SIZES)
def test_power_and_spectrum_of_white_errors(height, width):
    """Parseval's identity and a flat spectrum, whatever the parity of height and width."""
    images, other = white(3, 2, height, width), white(3, 2, height, width, seed=1)
    mean = mean_over_frequencies(error_power(images, other), width)
    torch.testing.assert_close(mean, (images - other).square().mean())
    power = torch.full((height, width // 2 + 1), 0.3, dtype=torch.float64)
    assert spectrum_of(power, width) == pytest.approx([1.0] * NUM_BANDS)


@pytest.mark.parametrize("height, width", [(16, 16), (15, 12)])
def test_a_spectrum_is_found_again_in_errors_drawn_of_it(height, width):
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


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_no_spectrum_of_no_error(value):
    with pytest.raises(ValueError, match="`power`"):
        spectrum_of(torch.full((8, 5), value, dtype=torch.float64), 8)


def test_without_a_spectrum_errors_stay_as_they_are():
    images = white(2, 3, 5, 4)
    assert colored(images, None) is images
    torch.testing.assert_close(colored(images, [1.0]), images)
    torch.testing.assert_close(colored(images, [2.0] * NUM_BANDS), images)
