# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Which figures may be stated."""

import pytest

from ecvae_diffusers.figures import is_above_noise, why_no_frechet_distance


@pytest.mark.parametrize("counts, is_stated", [((64, 64), True), ((63, 64), False), ((64, 63), False)])
def test_a_frechet_distance_needs_as_many_images_as_features(counts, is_stated):
    assert (why_no_frechet_distance(*counts, 64) is None) == is_stated


@pytest.mark.parametrize("value, std, is_above", [(0.06, 0.003, True), (-18874.0, 4e4, False), (1e-6, 1e-3, False)])
def test_a_kernel_distance_must_be_above_its_noise(value, std, is_above):
    assert is_above_noise(value, std) == is_above
