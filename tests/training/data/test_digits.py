"""The digits and the features that measure them."""

import numpy as np
import PIL.Image
import torch

from ecvae_diffusers.training.data.digits import DigitFeatures, load_digits, measure, write_digits


def test_folders_hold_the_split(tmp_path):
    write_digits(tmp_path)
    assert len(list(tmp_path.glob("train/*/*.png"))) == 1500
    assert len(list(tmp_path.glob("test/*/*.png"))) == 297
    assert {path.name for path in (tmp_path / "train").iterdir()} == set("0123456789")
    images, labels = load_digits()
    path = tmp_path / "train" / str(int(labels[3])) / "0003.png"
    assert np.array_equal(np.asarray(PIL.Image.open(path)), images[3, 0].numpy())


def test_distances_order_digits_noised_digits_and_noise():
    images = load_digits()[0]
    torch.manual_seed(0)
    features = DigitFeatures().eval()
    noise = 40 * torch.randn(images[1500:].shape)
    sets = [images[1500:], (images[1500:] + noise).clamp(0, 255), (128 + noise).clamp(0, 255)]
    distances = [measure(features, images[:1500], s.to(torch.uint8))["frechet_distance"] for s in sets]
    assert distances == sorted(distances) and distances[1] > 2 * distances[0]
