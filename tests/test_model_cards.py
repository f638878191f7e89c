# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The models that the repository carries: their cards say what their evaluations say, and their snippets run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.hub.card import CARD_MARKER, evaluation_table, figure
from ecvae_diffusers.hub.contents import files_to_publish
from ecvae_diffusers.hub.saving import weights_fingerprint


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/model_index.json"))
MOST_BYTES, MOST_BYTES_IN_ALL = 4 * 2**20, 16 * 2**20
# Colour takes wider networks.
MOST_BYTES_OF = {"cifar10": 8 * 2**20}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_there_are_models_and_they_are_small():
    assert FOLDERS
    for folder in FOLDERS:
        assert size(folder) <= MOST_BYTES_OF.get(folder.name, MOST_BYTES), folder.name
    assert sum(map(size, FOLDERS)) <= MOST_BYTES_IN_ALL


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_nothing_but_what_is_published(folder):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(files_to_publish(folder))


def test_half_precision_weights_that_load_in_full(folder):
    for path in folder.glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(path).values() if value.is_floating_point()} == {torch.float16}
    pipe = ECVAEPipeline.from_pretrained(folder)
    images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.dtype == torch.float32 and images.isfinite().all() and images.std() > 0.05
    assert pipe.energy_model is not None and pipe.vae.config.reconstruction_variance > 0


def test_the_card_says_what_the_evaluation_of_these_weights_says(folder):
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["weights"] == weights_fingerprint(ECVAEPipeline.from_pretrained(folder))
    card = ModelCard.load(folder / "README.md")
    assert CARD_MARKER in card.text and evaluation_table(evaluation) in card.text
    measures = evaluation["generation"]["measures"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: measures[name]["mean"] for name in results} and "frechet_distance" in results
    baseline = evaluation["baseline"]["generation"]["measures"]["frechet_distance"]["mean"]
    ours = measures["frechet_distance"]["mean"]
    assert f"| {figure(ours)} | {figure(baseline)} | {baseline / ours:.1f} |" in card.text


def test_the_median_of_three_training_seeds_is_published(folder):
    seeds = json.loads((folder / "evaluation.json").read_text())["training_seeds"]
    distances = {run["seed"]: run["frechet_distance"] for run in seeds["runs"]}
    assert len(distances) == 3
    assert distances[seeds["published"]] == sorted(distances.values())[1]


def test_the_snippets_run(folder, tmp_path):
    """Those without the package need the code that `make cards` writes."""
    copy = shutil.copytree(folder, tmp_path / "model_cards" / folder.name)
    ECVAEPipeline.from_pretrained(copy).save_code(copy)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    code = "\n".join(blocks) + "\nassert len(images) == 16 and len(restored) == 4\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_first_snippet_of_the_readme_runs_without_a_network(tmp_path):
    """From any place: the model's folder is all that it needs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = next(block for block in blocks if "model_cards/digits" in block)
    code = code.replace("model_cards/digits", str(ROOT / "model_cards" / "digits"))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nassert len(images) == 16 and images[0].size == (16, 16)"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_path_of_a_machine(folder):
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".py"):
            assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|Users)/", path.read_text()), path
