# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Cards: what they must be told, what they say of a model, and which figures they state."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.evaluation.schema import Evaluation, ImageSet, OutOfDistributionProtocol, Section
from ecvae_diffusers.hub.card import Details, figure, quality, stated_floor, write_card


ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"title": "Disks", "license": "mit", "data": {"name": "disks", "license": "CC0"}, "known_failures": "All."}
DETAILS = Details.from_yaml(FIELDS)


@pytest.mark.parametrize(
    "change, named",
    [
        *(({name: None}, name) for name in FIELDS),
        ({"license": " "}, "license"),
        ({"data": {"name": "", "license": "CC0"}}, "data.name"),
        ({"author": "me"}, "author"),
        ({"data": {"name": "x"}}, "data.license"),
        ({"training": "a week"}, "training"),
        ({"tags": [1]}, "tags"),
    ],
)
def test_details_that_are_none(change, named):
    with pytest.raises(ValueError, match=f"`{named}"):
        Details.from_yaml(FIELDS | change)


@pytest.mark.parametrize("with_energy", [True, False])
def test_a_card_says_what_the_model_is(with_energy, make_pipeline, tmp_path):
    """Not that a plain VAE is calibrated, nor that a model without a variance, which restoration needs, restores."""
    pipe = make_pipeline(with_energy=with_energy)
    for variance in (None, 0.1):
        pipe.vae.register_to_config(reconstruction_variance=variance)
        write_card(pipe, tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert ("energy-calibrated" in card.text) == ("EC-VAE" in card.text) == with_energy
        assert ("ecvae" in card.data.tags) == ("energy-based-model" in card.data.tags) == with_energy
        assert ("image-restoration" in card.data.tags) == ("restored" in card.text) == (variance is not None)
        write_card(ECVAERestorationPipeline(vae=pipe.vae), tmp_path)
        assert ("mask_image=mask" in ModelCard.load(tmp_path / "README.md").text) == (variance is not None)


def test_next_to_the_energy_stands_what_the_plain_model_tells_apart(pipe, tmp_path):
    """Its reconstruction error on the same sets: on other sets it says nothing of these."""

    def told_apart(measures: dict, **outside: int) -> Section:
        inside = ImageSet(data="disks", split="test", num_images=9)
        return Section(protocol=OutOfDistributionProtocol(inside=inside, outside=outside), measures=measures)

    evaluation = Evaluation.load(ROOT / "model_cards" / "digits")
    ours = {"noise": {"energy": 0.75, "error": 0.5}, "stripes": {"energy": 0.25, "error": 0.5}}
    evaluation.out_of_distribution = told_apart(ours, noise=5, stripes=7)
    theirs = {"noise": {"error": 0.875}, "stripes": {"error": 1.0}}
    evaluation.baseline.out_of_distribution = told_apart(theirs, noise=5, stripes=8)
    write_card(pipe, tmp_path, evaluation, DETAILS)
    card = (tmp_path / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.endswith("| 0.75 | 0.875 |  |")]
    assert "noise" in row and "| 0.25 | 1 |  |" not in card


@pytest.mark.parametrize("name, is_stated", [("fashion_mnist", True), ("digits", False)])
def test_a_kernel_distance_within_its_noise_is_not_stated(name, is_stated, pipe, tmp_path):
    evaluation = Evaluation.load(ROOT / "model_cards" / name)
    with pytest.raises(ValueError, match="details"):
        write_card(pipe, tmp_path, evaluation)
    assert not (tmp_path / "README.md").exists()
    write_card(pipe, tmp_path, evaluation, DETAILS)
    card = ModelCard.load(tmp_path / "README.md")
    measures = evaluation.generation.measures
    rows = [line for line in card.text.splitlines() if line.startswith("| kernel distance |") and "samples" in line]
    assert (figure(measures["kernel_distance"].mean) in card.content) == is_stated == (len(rows) == 1)
    assert all(f"{measures['kernel_distance_std'].mean:.2g} over subsets" in row for row in rows)
    assert any(result.metric_type == "kernel_distance" for result in card.data.eval_results) == is_stated
    for run in evaluation.training_seeds.runs:
        assert (figure(run.kernel_distance) in card.text) == is_stated
        assert figure(run.frechet_distance) in card.text


def test_the_floor_of_too_few_images_is_not_stated():
    """297 held-out digits are further from the training digits than 5,000 samples are, by their number alone."""
    evaluation = Evaluation.load(ROOT / "model_cards" / "digits")
    assert stated_floor(evaluation)[0] == {} and any("297" in line for line in quality(evaluation))
    evaluation.floor.protocol.compared.num_images = 5_000
    assert stated_floor(evaluation)[0]["frechet_distance"] > 100


def test_the_quality_stands_next_to_the_floor_and_the_baseline():
    evaluation = Evaluation.load(ROOT / "model_cards" / "fashion_mnist")
    line = quality(evaluation)[0]
    assert "98.6" in line and "25.5" in line and f"341 for {evaluation.baseline.name}" in line
