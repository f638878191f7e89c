"""Runs that version 0.1 saved (`tests/fixtures/v0_1`, by its commit dcd1cfd): they resume, load, and are reported and published."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from training_runs import train, weights

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.commands import publish
from ecvae_diffusers.report import report


FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
RUNS = {"energy": "train_ecvae", "both": "train_ecvae", "flow": "train_flow", "decoder": "calibrate_decoder"}
DETAILS = {
    "title": "Disks, 8 px", "license": "apache-2.0", "known_failures": "Six steps of training: noise.",
    "data": {"name": "disks", "license": "CC0", "description": "Drawn by a test."},
}  # fmt: skip


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A copy, as the working folder: the runs were given relative paths."""
    shutil.copytree(FIXTURES, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_to_the_weights_that_0_1_came_to(name, saved):
    expected = weights(saved / name)
    lines = (saved / name / "metrics.jsonl").read_text().splitlines()
    for part in ("vae", "flow", "energy_model"):
        shutil.rmtree(saved / name / part, ignore_errors=True)
    (saved / name / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    pretrained = ["--pretrained_model_name_or_path", "autoencoder"] if name == "decoder" else []
    train(
        "--train_data_dir", "images", "--output_dir", name, "--resolution", 8, "--max_train_steps", 6, "--log_steps", 1,
        "--resume_from_checkpoint", "latest", *pretrained, script=RUNS[name],
    )  # fmt: skip
    found = weights(saved / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        difference = (found[key].float() - value.float()).norm()
        assert difference <= 1e-4 * value.float().norm(), key
    resumed = [json.loads(line) for line in (saved / name / "metrics.jsonl").read_text().splitlines()]
    assert all(before.keys() <= after.keys() for before, after in zip(map(json.loads, lines), resumed, strict=True))


def test_its_folders_load(saved):
    for name in ("energy", "both"):
        pipe = ECVAEPipeline.from_pretrained(saved / name)
        assert pipe(batch_size=2, generator=torch.manual_seed(0), output_type="pt").images.shape == (2, 1, 8, 8)
        assert pipe.energy_model is not None
    restoration = ECVAERestorationPipeline.from_pretrained(saved / "energy")
    assert restoration.vae.config.sample_size == 8
    # By the code beside it.
    remote = DiffusionPipeline.from_pretrained(saved / "energy", trust_remote_code=True)
    assert len(remote(batch_size=2).images) == 2
    flow = ECFlowPipeline.from_pretrained(saved / "flow")
    assert flow(batch_size=2, output_type="pt").images.shape == (2, 1, 8, 8)
    assert AutoencoderKL.from_pretrained(saved / "decoder").config.latent_channels == 2


@pytest.mark.parametrize("name", RUNS)
def test_its_runs_are_reported_and_published(name, saved):
    report.main([name])
    assert (saved / name / "report.html").is_file()
    evaluation = []
    if name == "energy":
        Path("details.yaml").write_text(json.dumps(DETAILS))  # which is YAML too
        evaluation = ["--evaluation", "evaluation", "--details", "details.yaml"]
    publish.main([name, *evaluation, "--output_dir", "card"])
    assert (saved / "card" / "README.md").is_file()
    assert weights(saved / "card").keys() >= {key for key in weights(saved / name) if not key.startswith("energy")}


def test_names_of_its_training_modules_are_those_of_today():
    from ecvae_training import decoders
    from ecvae_training.data import ImageDataset

    from ecvae_diffusers.training.data import images
    from ecvae_diffusers.training.tasks import autoencoders as moved

    assert ImageDataset is images.ImageDataset and decoders is moved
