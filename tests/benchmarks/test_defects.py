# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Painted defects lie where their masks say, and are the same at each call."""

import pytest
import torch

from common.defects import KINDS, LEAST_CHANGE, paint_defects
from ecvae_diffusers.training.data.digits import load_digits


@pytest.fixture(scope="module")
def images():
    return load_digits()[0][:30]


def test_a_mask_holds_what_painting_changed(images):
    painted, masks, kinds = paint_defects(images)
    change = (painted.int() - images.int()).abs().amax(1)
    assert torch.equal(masks, change > LEAST_CHANGE)
    assert masks.flatten(1).sum(1).min() >= 4
    assert set(kinds) == set(KINDS)


def test_a_missing_part_has_the_level_of_the_border(images):
    painted, masks, kinds = paint_defects(images)
    for image, before, mask, kind in zip(painted, images, masks, kinds):
        if kind == "missing part":  # the border of a digit is black
            assert (image[0][mask] < before[0][mask]).all()


def test_the_seed_chooses_the_defects(images):
    first, second, other = (paint_defects(images, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
