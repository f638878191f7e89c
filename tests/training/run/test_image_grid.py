"""Grids of images."""

import torch

from ecvae_diffusers.training.run.pictures import image_grid


def test_image_grid_places_images_row_by_row():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    grid = image_grid(images, num_columns=3, scale=2)
    assert grid.size == ((3 * 5 - 1) * 2, (2 * 5 - 1) * 2)
    assert grid.getpixel((1, 1)) == 0 and grid.getpixel((11, 1)) == 64 and grid.getpixel((11, 11)) == 255
    assert grid.getpixel((8, 1)) == 255  # the line between two images
