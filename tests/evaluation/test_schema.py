# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""`evaluation.json` is read and written as it was by every version."""

import json
from pathlib import Path

import pytest

from ecvae_diffusers.evaluation.schema import EVALUATION_FILE, Evaluation


ROOT = Path(__file__).parents[2]
FILES = [*ROOT.glob("model_cards/*/evaluation.json"), *ROOT.glob("tests/fixtures/*/evaluation/evaluation.json")]
SMALLEST = {
    "weights": None,
    "protocol": {"images": "16 px", "features": "lite0"},
    "generation": {"protocol": {"reference": {"data": "a", "split": "train", "num_images": 8}, "num_samples": 8}, "measures": {}},
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_saved_files_are_read_whole(path):
    assert Evaluation.load(path.parent).to_json() == json.loads(path.read_text(encoding="utf-8"))


def test_a_file_without_optional_parts():
    assert Evaluation.from_json(SMALLEST).to_json() == SMALLEST


@pytest.mark.parametrize(
    "text, named",
    [
        ("{", "evaluation.json"),
        ("[]", "the file"),
        ("{}", "weights"),
        (json.dumps(SMALLEST | {"note": 1}), "note"),
        (json.dumps(SMALLEST | {"protocol": {"images": 16, "features": "lite0"}}), "protocol.images"),
        (json.dumps(SMALLEST | {"generation": {"protocol": [], "measures": {}}}), "generation.protocol"),
        (json.dumps(SMALLEST).replace("null", "NaN"), "NaN"),
    ],
)  # fmt: skip
def test_what_is_no_evaluation_is_refused_in_one_line(tmp_path, text, named):
    (tmp_path / EVALUATION_FILE).write_text(text)
    with pytest.raises(ValueError, match=named) as raised:
        Evaluation.load(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
