# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""An evaluation says how its figures are read."""

from pathlib import Path

import pytest

from ecvae_diffusers.evaluation.reading import how_to_read


def measures(**values) -> dict:
    return {"generation": {"measures": {"frechet_distance": {"mean": 30.0}}}, **values}


def test_an_evaluation_says_what_is_good_and_where_its_pictures_are():
    floor = {"measures": {"frechet_distance": 10.0}}
    text = how_to_read(measures(floor=floor), Path("out"), ["samples.png", "neighbours.png"])
    for name in ("samples.png", "neighbours.png", "evaluation.json"):
        assert str(Path("out") / name) in text
    assert "3 times the floor" in text and "AUROC" not in text
    for stated in ({}, {"floor": {"measures": {"frechet_distance": None}}}):
        assert "times the floor" not in how_to_read(measures(**stated), Path("out"), [])


@pytest.mark.parametrize(
    "section, words",
    [
        ({"reconstruction": {}}, "PSNR"),
        ({"likelihood": {"measures": {"elbo": -1.0}}}, "ELBO"),
        ({"likelihood": {"measures": {"bits_per_dimension": 3.0}}}, "bits per dimension"),
        ({"out_of_distribution": {}}, "AUROC"),
    ],
)
def test_each_section_of_an_evaluation_has_its_direction(section, words):
    assert words not in how_to_read(measures(), Path("out"), [])
    assert words in how_to_read(measures(**section), Path("out"), [])
