# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Cards: what they must be told, what they say of a model, and which figures they state."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.figures import NOISE
from ecvae_diffusers.hub.card import baseline_rows, check_details, figure, write_card


ROOT = Path(__file__).resolve().parents[2]
DETAILS = {"title": "Disks", "license": "mit", "data": {"name": "disks", "license": "CC0"}, "known_failures": "All."}


def evaluation_of(name: str) -> dict:
    return json.loads((ROOT / "model_cards" / name / "evaluation.json").read_text())


@pytest.mark.parametrize(
    "change, named",
    [
        *(({name: None}, f"`{name}`") for name in DETAILS),
        ({"author": "me"}, "`author`"),
        ({"data": {"name": "x"}}, "`data.license`"),
        ({"data": "digits"}, "`data`"),
        ({"data": {**DETAILS["data"], "id": None}}, "`data.id`"),
        ({"data": {**DETAILS["data"], "size": "9"}}, "`data`"),
        ({"training": "a week"}, "`training`"),
        ({"training": None}, "`training`"),
        ({"tags": "faces"}, "`tags`"),
        ({"tags": [1]}, "`tags`"),
        ({"license": ["mit"]}, "`license`"),
    ],
)
def test_details_that_are_none(change, named):
    check_details(DETAILS)
    with pytest.raises(ValueError, match=named):
        check_details(DETAILS | change)
    with pytest.raises(ValueError, match="details"):
        check_details([])


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
    evaluation = evaluation_of("digits")
    protocol = {"inside": {"data": "disks", "num_images": 9}, "outside": {"noise": 5, "stripes": 7}}
    measures = {"noise": {"energy": 0.75, "error": 0.5}, "stripes": {"energy": 0.25, "error": 0.5}}
    evaluation["out_of_distribution"] = {"protocol": protocol, "measures": measures}
    other = {"protocol": {**protocol, "outside": {"noise": 5, "stripes": 8}}, "measures": {}}
    other["measures"] = {"noise": {"error": 0.875}, "stripes": {"error": 1.0}}
    evaluation["baseline"] = {**evaluation, "name": "a VAE", "out_of_distribution": other}
    write_card(pipe, tmp_path, evaluation, DETAILS)
    card = (tmp_path / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if "told apart: by the energy here" in line]
    assert "noise" in row and row.endswith("| 0.75 | 0.875 |  |")
    del evaluation["baseline"]["out_of_distribution"]
    assert len(baseline_rows(evaluation)) == 2


def test_a_card_with_figures_needs_details(pipe, tmp_path):
    with pytest.raises(ValueError, match="details"):
        write_card(pipe, tmp_path, evaluation_of("digits"))
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("name, is_stated", [("fashion_mnist", True), ("digits", False)])
def test_a_kernel_distance_within_its_noise_is_not_stated(name, is_stated, pipe, tmp_path):
    evaluation = evaluation_of(name)
    write_card(pipe, tmp_path, evaluation, DETAILS)
    card = ModelCard.load(tmp_path / "README.md")
    measures = evaluation["generation"]["measures"]
    (row,) = [line for line in card.text.splitlines() if line.startswith("| kernel distance |") and "samples" in line]
    assert (figure(measures["kernel_distance"]["mean"]) in card.content) == is_stated
    assert (NOISE in row) != is_stated and f"{measures['kernel_distance_std']['mean']:.2g} over subsets" in row
    assert any(result.metric_type == "kernel_distance" for result in card.data.eval_results) == is_stated
    for run in evaluation["training_seeds"]["runs"]:
        assert (figure(run["kernel_distance"]) in card.text) == is_stated
        assert figure(run["frechet_distance"]) in card.text
