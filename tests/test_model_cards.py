# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The models that the repository carries: their cards say what their evaluations say, and their snippets run."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.evaluation.schema import Evaluation
from ecvae_diffusers.hub.card import CARD_MARKER, evaluation_table, figure
from ecvae_diffusers.hub.contents import files_to_publish


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/model_index.json"))


def test_there_are_models_and_they_are_small():
    assert FOLDERS
    files = [path for folder in FOLDERS for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_a_folder_is_what_is_published_of_a_model_that_loads(folder):
    """Its evaluation is of its weights, or `files_to_publish` would refuse it."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(files_to_publish(folder)) > {"evaluation.json"}
    for path in folder.glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(path).values() if value.is_floating_point()} == {torch.float16}
    pipe = ECVAEPipeline.from_pretrained(folder)
    images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.dtype == torch.float32 and images.isfinite().all() and images.std() > 0.05
    assert pipe.energy_model is not None and pipe.vae.config.reconstruction_variance > 0
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".py"):
            assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|Users)/", path.read_text()), path


def test_the_card_says_what_the_evaluation_says(folder):
    evaluation, card = Evaluation.load(folder), ModelCard.load(folder / "README.md")
    assert CARD_MARKER in card.text and evaluation_table(evaluation) in card.text
    measures = evaluation.generation.measures
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: measures[name].mean for name in results} and "frechet_distance" in results
    baseline, ours = (one.generation.measures["frechet_distance"].mean for one in (evaluation.baseline, evaluation))
    assert f"| {figure(ours)} | {figure(baseline)} | {baseline / ours:.1f} |" in card.text
    if evaluation.training_seeds is None:
        assert "- seeds: one\n" in card.text
    else:
        # The median of three seeds is published.
        distances = {run.seed: run.frechet_distance for run in evaluation.training_seeds.runs}
        assert len(distances) == 3
        assert distances[evaluation.training_seeds.published] == sorted(distances.values())[1]


def run_snippets(page: Path) -> dict:
    """Run the Python of a page that is of a model here, with few steps, and return the names that it has made."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict = {}
    code = "\n".join(block for block in blocks if "model_cards/" in block)
    exec(code.replace("num_restorations=4", "num_restorations=4, num_inference_steps=2"), names)
    return names


def test_the_snippets_run(folder, tmp_path, monkeypatch):
    """Those without the package need the code that `make cards` writes."""
    copy = shutil.copytree(folder, tmp_path / "model_cards" / folder.name)
    ECVAEPipeline.from_pretrained(copy).save_code(copy)
    monkeypatch.chdir(tmp_path)
    names = run_snippets(folder / "README.md")
    assert len(names["images"]) == 16 and len(names["restored"]) == 4
