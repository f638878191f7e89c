"""The training script, run as a user runs it: in a subprocess, on image folders made here."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import TINY, metrics, run, succeed, weights, write_images

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.model_error import spectrum_of
from ecvae_diffusers.training.tasks.networks import load_pretrained
from ecvae_diffusers.training.train_ecvae import ECVAEConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "gray")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 12 steps through `accelerate launch`, with a checkpoint at every fourth."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    succeed(
        "--train_data_dir", images, "--output_dir", output_dir, *TINY, "--max_train_steps", 12, "--log_steps", 1,
        "--checkpointing_steps", 4, "--checkpoints_total_limit", 2, "--save_images_steps", 6, launcher=launcher,
    )  # fmt: skip
    return output_dir


def test_writes_a_pipeline_that_samples(finished):
    pipeline = ECVAEPipeline.from_pretrained(finished)
    config = pipeline.vae.config
    assert (config.in_channels, config.sample_size, config.latent_channels) == (1, 16, 4)
    assert pipeline.energy_model is not None and pipeline.scheduler.config.num_steps == 5
    sample = pipeline(batch_size=2, output_type="pt").images
    assert sample.shape == (2, 1, 16, 16) and torch.isfinite(sample).all()


def test_writes_the_reconstruction_variance_it_has(finished, images):
    pipeline = ECVAEPipeline.from_pretrained(finished)
    files = [PIL.Image.open(path) for path in sorted(images.iterdir())]
    real = pipeline.prepare_image(files)
    restored = pipeline.reconstruct(files, output_type="pt").images * 2 - 1
    config = pipeline.vae.config
    assert config.reconstruction_variance == pytest.approx((real - restored).square().mean().item(), 1e-4)
    power = torch.fft.rfft2((real - restored).double(), norm="ortho").abs().square().mean((0, 1))
    assert config.reconstruction_spectrum == pytest.approx(spectrum_of(power, real.shape[-1]), rel=1e-3, abs=1e-4)


def test_metrics_grids_and_checkpoints(finished):
    records = metrics(finished)
    assert [record["step"] for record in records] == list(range(1, 13))
    keys = {"reconstruction", "kl", "constraint", "noise_floor", "drift", "dual", "tolerance", "energy_real"}
    assert all(keys <= set(record) for record in records)
    assert len({record["dual"] for record in records}) == 12  # lambda moves
    # lambda is what the dual step makes of the constraint that stands beside it.
    for before, after in zip(records, records[1:]):
        expected = before["dual"] + 0.1 * min(after["constraint"] / after["tolerance"] - 1, 1)
        assert after["dual"] == pytest.approx(min(max(expected, 0), 100), rel=1e-4)
    assert records[-1]["reconstruction"] < records[0]["reconstruction"]
    with PIL.Image.open(finished / "samples" / "step-000012.png") as grid:
        assert grid.size == (8 * 17 - 1, 8 * 17 - 1)
    assert {path.name for path in finished.glob("*checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    assert json.loads((finished / "training_args.json").read_text())["max_train_steps"] == 12


def test_checkpoint_holds_a_pipeline_to_look_at(finished):
    pipeline = ECVAEPipeline.from_pretrained(finished / "checkpoint-8" / "pipeline")
    assert pipeline(output_type="pt").images.shape == (1, 1, 16, 16)


def test_a_run_cut_in_two_equals_a_run_in_one(finished, images, tmp_path):
    """24 images and batches of 8: the cut at step 4 lies inside the second epoch."""
    arguments = ["--train_data_dir", images, "--output_dir", tmp_path, *TINY, "--log_steps", 1]
    succeed(*arguments, "--max_train_steps", 4, "--checkpointing_steps", 4)
    result = succeed(*arguments, "--max_train_steps", 12, "--resume_from_checkpoint", "latest")
    assert "Resuming from checkpoint-4" in result.stderr
    expected, found = weights(finished), weights(tmp_path)
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    timeless = [
        [{**r, "images_per_second": 0, "training_seconds": 0, "peak_memory_gib": 0} for r in metrics(folder)]
        for folder in (finished, tmp_path)
    ]
    assert timeless[0] == timeless[1]


def test_latest_without_a_checkpoint_starts_at_zero_and_says_so(images, tmp_path):
    result = succeed(
        "--train_data_dir", images, "--output_dir", tmp_path / "new", *TINY, "--max_train_steps", 1,
        "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    assert "starting at step 0" in result.stderr


def test_plain_vae_has_no_energy_model(images, tmp_path):
    succeed("--train_data_dir", images, "--output_dir", tmp_path, *TINY, "--max_train_steps", 2, "--calibration", "none",
            "--no-use_ema", "--random_flip", "--mixed_precision", "bf16")  # fmt: skip
    pipeline = ECVAEPipeline.from_pretrained(tmp_path)
    assert pipeline.energy_model is None and pipeline.scheduler is None


def test_goes_on_from_a_pipeline_and_from_an_autoencoder(finished, images, tmp_path):
    """One step of learning rate almost 0: the weights are still those of the start."""
    still = ["--learning_rate", "1e-12", "--energy_learning_rate", "1e-12", "--max_train_steps", "1", "--no-use_ema"]
    common = ["--train_data_dir", images, "--resolution", "16", "--train_batch_size", "8", *still]
    succeed(*common, "--output_dir", tmp_path / "a", "--pretrained_model_name_or_path", finished)
    AutoencoderEC.from_pretrained(finished / "vae").save_pretrained(tmp_path / "vae_only")
    succeed(*common, "--output_dir", tmp_path / "b", "--pretrained_model_name_or_path", tmp_path / "vae_only")
    start, a, b = weights(finished), weights(tmp_path / "a"), weights(tmp_path / "b")

    def load(path):
        values = {"pretrained_model_name_or_path": str(path), "resolution": 16}
        return load_pretrained(ECVAEConfig.from_flat(values), "vae", AutoencoderEC)

    for path in (finished, tmp_path / "vae_only"):
        assert load(path)[0].training
    with pytest.raises(ValueError, match="is a EnergyModel, not a pipeline"):
        load(finished / "energy_model")
    with pytest.raises(ValueError, match="is a checkpoint: give the pipeline in it"):
        load(finished / "checkpoint-8")
    shutil.copytree(finished / "vae", tmp_path / "other_sizes")
    config = json.loads((finished / "vae" / "config.json").read_text())
    (tmp_path / "other_sizes" / "config.json").write_text(json.dumps(config | {"latent_channels": 3}))
    with pytest.raises(ValueError, match="(?s)other_sizes' can't be loaded: .*size mismatch"):
        load(tmp_path / "other_sizes")
    for key in start:
        if "_u" in key or "_v" in key:  # spectral norm's vectors turn at each step, whatever the rate
            continue
        torch.testing.assert_close(a[key], start[key], atol=1e-6, rtol=1e-6)
        if key.startswith("vae/"):
            torch.testing.assert_close(b[key], start[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_colour_images(mode, channels, tmp_path):
    data = write_images(tmp_path / "data" / "class", mode=mode, size=20, count=8)
    succeed("--train_data_dir", data.parent, "--output_dir", tmp_path / "out", *TINY, "--max_train_steps", 1,
            "--energy_num_scales", 2, "--conditioning_weight", 0.1, "--energy_regularization", 0.01,
            "--gradient_checkpointing")  # fmt: skip
    pipeline = ECVAEPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.vae.config.in_channels == channels
    assert len(pipeline.energy_model.networks) == 2


def test_data_set_with_an_image_column(tmp_path):
    import datasets

    pictures = [PIL.Image.fromarray(np.full((16, 16), 8 * i, np.uint8)) for i in range(16)]
    (tmp_path / "data").mkdir()
    columns = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"img": pictures, "label": list(range(16))}, features=columns)
    data.to_parquet(tmp_path / "data" / "train.parquet")
    arguments = ["--dataset_name", tmp_path / "data", *TINY, "--max_train_steps", 1]
    succeed(*arguments, "--output_dir", tmp_path / "out", "--max_train_samples", 8)
    assert ECVAEPipeline.from_pretrained(tmp_path / "out").vae.config.in_channels == 1
    result = run(*arguments, "--output_dir", tmp_path / "out2", "--image_column", "picture")
    assert result.returncode != 0 and "--image_column must be one of ['img'] in" in result.stderr


def test_broken_images_are_left_out_and_named(tmp_path):
    data = write_images(tmp_path / "data", count=12)
    for name in ("003.png", "007.png"):
        (data / name).write_bytes((data / name).read_bytes()[:50])
    arguments = ["--train_data_dir", data, "--output_dir", tmp_path / "out", *TINY, "--max_train_steps", 1]
    result = succeed(*arguments, "--skip_broken_images")
    assert "2 of 12 images can't be read" in result.stderr and "003.png" in result.stderr
    assert "10 images of 1x16x16" in result.stderr


def test_a_cut_between_two_logged_steps_is_not_seen(images, tmp_path):
    """With accumulation: what is logged of several steps, as the largest norms, is that of the run in one."""
    arguments = ["--train_data_dir", images, *TINY, "--log_steps", 5, "--gradient_accumulation_steps", 2]
    succeed(*arguments, "--output_dir", tmp_path / "whole", "--max_train_steps", 10)
    succeed(*arguments, "--output_dir", tmp_path / "cut", "--max_train_steps", 10, "--checkpointing_steps", 3)
    for step in (6, 9):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    succeed(
        *arguments, "--output_dir", tmp_path / "cut", "--max_train_steps", 10, "--resume_from_checkpoint", "latest"
    )
    timeless = [
        [{**r, "images_per_second": 0, "training_seconds": 0, "peak_memory_gib": 0} for r in metrics(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1] and "gradient_norm_max" in timeless[0][0]


def test_a_run_is_gone_on_with_on_its_own_data(finished, images, tmp_path):
    arguments = [*TINY, "--max_train_steps", 14, "--resume_from_checkpoint", "latest", "--output_dir", finished]
    other = write_images(tmp_path / "other", count=30)
    result = run("--train_data_dir", other, *arguments)
    assert result.returncode == 1 and "num_images (was 24, is 30)" in result.stderr
    result = run("--train_data_dir", images, *arguments, "--mixed_precision", "bf16")
    assert result.returncode == 1 and "--mixed_precision (was None, is bf16)" in result.stderr
