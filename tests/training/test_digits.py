"""The demo's data and its yardstick."""

import numpy as np
import PIL.Image
import pytest
import torch

from ecvae_training.digits import DigitFeatures, frechet_distance, load_digits, write_digits
from ecvae_training.output import image_grid


def test_folders_hold_the_split(tmp_path):
    write_digits(tmp_path)
    assert len(list(tmp_path.glob("train/*/*.png"))) == 1500
    assert len(list(tmp_path.glob("test/*/*.png"))) == 297
    assert {path.name for path in (tmp_path / "train").iterdir()} == set("0123456789")
    images, labels = load_digits()
    path = tmp_path / "train" / str(int(labels[3])) / "0003.png"
    assert np.array_equal(np.asarray(PIL.Image.open(path)), images[3, 0].numpy())


def test_frechet_distance_equals_its_formula():
    """Against the formula in float64 with numpy's eigenvalues, on the features of random images."""
    torch.manual_seed(0)
    features = DigitFeatures().eval()
    real = torch.randint(0, 256, (400, 1, 16, 16), dtype=torch.uint8)
    fake = (real.flip(0).float() * 0.6 + 20).to(torch.uint8)
    with torch.no_grad():
        x, y = (features.double()(images).numpy() for images in (real, fake))
    product = np.cov(x.T) @ np.cov(y.T)
    root_trace = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * root_trace
    assert frechet_distance(features, real, fake) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(features, real, real) == pytest.approx(0, abs=1e-6 * np.trace(np.cov(x.T)) + 1e-8)


def test_image_grid_places_images_row_by_row():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    grid = image_grid(images, num_columns=3, scale=2)
    assert grid.size == ((3 * 5 - 1) * 2, (2 * 5 - 1) * 2)
    assert grid.getpixel((1, 1)) == 0 and grid.getpixel((11, 1)) == 64 and grid.getpixel((11, 11)) == 255
    assert grid.getpixel((8, 1)) == 255  # the line between two images
