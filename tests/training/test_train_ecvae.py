"""`train_ecvae.py`: the pipeline that it writes, what it starts from, and what it refuses before it writes."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from training_runs import assert_same_start, metrics, train_tiny, write_images

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.model_error import spectrum_of
from ecvae_diffusers.training.tasks.networks import load_pretrained
from ecvae_diffusers.training.tasks.vae_config import ECVAEConfig


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 6 steps, with a checkpoint at every second."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    train_tiny(
        images, output_dir, 6, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2, "--learning_rate", 1e-3
    )
    return output_dir


def test_writes_a_pipeline_that_samples_and_knows_its_error(finished, images):
    pipeline = ECVAEPipeline.from_pretrained(finished)
    config = pipeline.vae.config
    assert (config.in_channels, config.sample_size, config.latent_channels) == (1, 16, 4)
    assert pipeline.energy_model is not None and pipeline.scheduler.config.num_steps == 5
    sample = pipeline(batch_size=2, output_type="pt").images
    assert sample.shape == (2, 1, 16, 16) and torch.isfinite(sample).all()
    files = [PIL.Image.open(path) for path in sorted(images.iterdir())]
    error = pipeline.prepare_image(files) - (pipeline.reconstruct(files, output_type="pt").images * 2 - 1)
    assert config.reconstruction_variance == pytest.approx(error.square().mean().item(), 1e-4)
    power = torch.fft.rfft2(error.double(), norm="ortho").abs().square().mean((0, 1))
    assert config.reconstruction_spectrum == pytest.approx(spectrum_of(power, 16), rel=1e-3, abs=1e-4)
    # All four directions together are the covariance of the encodings, whatever their signs.
    saved, found = (
        one.flatten(1) for one in (pipeline.principal_directions(4), pipeline.principal_directions(4, files))
    )
    torch.testing.assert_close(saved.T @ saved, found.T @ found, rtol=1e-2, atol=1e-4)


def test_learns_and_keeps_the_newest_checkpoints_each_with_a_pipeline_to_look_at(finished):
    records = metrics(finished)
    assert [record["step"] for record in records] == list(range(1, 7))
    assert records[-1]["reconstruction"] < records[0]["reconstruction"]
    assert len({record["dual"] for record in records}) == 6  # lambda moves
    assert {path.name for path in finished.glob("*checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    pipeline = ECVAEPipeline.from_pretrained(finished / "checkpoint-4" / "pipeline")
    assert pipeline(output_type="pt").images.shape == (1, 1, 16, 16)


def test_a_plain_vae_of_colour_images_in_bf16_has_no_energy_model(tmp_path):
    """RGBA images become RGB."""
    data = write_images(tmp_path / "data" / "class", mode="RGBA", size=20, count=8)
    arguments = ["--calibration", "none", "--no-use_ema", "--mixed_precision", "bf16", "--patch_size", 2]
    train_tiny(data.parent, tmp_path / "out", 1, *arguments)
    pipeline = ECVAEPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.energy_model is None and pipeline.scheduler is None and pipeline.vae.config.in_channels == 3
    assert pipeline.vae.config.patch_size == 2 and pipeline(output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("source, kept", [("", ""), ("vae", "vae/")])
def test_starts_from_a_pipeline_and_from_an_autoencoder(source, kept, finished, images, tmp_path):
    still = ["--learning_rate", "1e-12", "--energy_learning_rate", "1e-12", "--no-use_ema"]
    train_tiny(images, tmp_path / "run", 1, *still, "--pretrained_model_name_or_path", finished / source)
    assert_same_start(finished, tmp_path / "run", kept)


def test_what_is_no_pretrained_model_is_named(finished, tmp_path):
    def load(path, resolution=16):
        values = {"pretrained_model_name_or_path": str(path), "resolution": resolution}
        return load_pretrained(ECVAEConfig.from_flat(values), "vae", AutoencoderEC)

    model, companions = load(finished)
    assert model.training and companions["energy_model"].training
    shutil.copytree(finished / "vae", tmp_path / "other_sizes")
    config = json.loads((finished / "vae" / "config.json").read_text())
    (tmp_path / "other_sizes" / "config.json").write_text(json.dumps(config | {"latent_channels": 3}))
    for path in (finished / "energy_model", finished / "checkpoint-4", tmp_path / "other_sizes", tmp_path):
        with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
            load(path)
    assert load(finished, 32)[0].config.sample_size == 16  # it is resized later


@pytest.mark.parametrize(
    "whole, broken, extra, named",
    [
        (0, 0, [], "--train_data_dir"),
        (2, 2, [], "2 of 4"),
        (8, 0, ["--train_batch_size", 64], "--train_batch_size"),
        (8, 0, ["--mixed_precision", "fp16"], "--mixed_precision"),
        (8, 0, ["--in_channels", 3, "--pretrained_model_name_or_path", "{finished}"], "--in_channels"),
    ],
)
def test_refuses_before_it_writes(whole, broken, extra, named, finished, tmp_path):
    data = write_images(tmp_path / "data", count=whole)
    for i in range(broken):
        (data / f"broken_{i}.png").write_bytes(b"")
    extra = [finished if one == "{finished}" else one for one in extra]
    with pytest.raises(SystemExit, match=named):
        train_tiny(data, tmp_path / "out", 1, *extra)
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_refused_and_stays(images, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(SystemExit, match="--output_dir"):
            train_tiny(images, tmp_path, 1, *extra)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.txt", "years of work")]
