"""`train_ecvae.py`: the pipeline that it writes, what it starts from, and what it refuses before it writes."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from training_runs import TINY, metrics, train, weights, write_images

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.model_error import spectrum_of
from ecvae_diffusers.training.tasks.networks import load_pretrained
from ecvae_diffusers.training.train_ecvae import ECVAEConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "gray")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 12 steps, with a checkpoint at every fourth."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(
        "--train_data_dir", images, "--output_dir", output_dir, *TINY, "--max_train_steps", 12, "--log_steps", 1,
        "--checkpointing_steps", 4, "--checkpoints_total_limit", 2, "--save_images_steps", 6,
    )  # fmt: skip
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


def test_learns_and_keeps_the_newest_checkpoints_each_with_a_pipeline_to_look_at(finished):
    records = metrics(finished)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["reconstruction"] < records[0]["reconstruction"]
    assert len({record["dual"] for record in records}) == 12  # lambda moves
    assert {path.name for path in finished.glob("*checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    pipeline = ECVAEPipeline.from_pretrained(finished / "checkpoint-8" / "pipeline")
    assert pipeline(output_type="pt").images.shape == (1, 1, 16, 16)


def test_plain_vae_in_bf16_has_no_energy_model(images, tmp_path):
    train("--train_data_dir", images, "--output_dir", tmp_path, *TINY, "--max_train_steps", 2, "--calibration", "none",
          "--no-use_ema", "--mixed_precision", "bf16")  # fmt: skip
    pipeline = ECVAEPipeline.from_pretrained(tmp_path)
    assert pipeline.energy_model is None and pipeline.scheduler is None


def test_goes_on_from_a_pipeline_and_from_an_autoencoder(finished, images, tmp_path):
    """One step of learning rate almost 0: the weights are still those of the start."""
    still = ["--learning_rate", "1e-12", "--energy_learning_rate", "1e-12", "--max_train_steps", "1", "--no-use_ema"]
    start = weights(finished)
    for name, source in (("a", finished), ("b", finished / "vae")):
        train(
            "--train_data_dir", images, "--resolution", 16, "--train_batch_size", 8, *still, "--output_dir", tmp_path / name,
            "--pretrained_model_name_or_path", source,
        )  # fmt: skip
        found = weights(tmp_path / name)
        kept = [key for key in start if key.startswith("vae/") or name == "a"]
        for key in kept:
            torch.testing.assert_close(found[key], start[key], atol=1e-6, rtol=1e-6)


def test_what_is_no_pretrained_model_is_named(finished, tmp_path):
    def load(path, resolution=16):
        values = {"pretrained_model_name_or_path": str(path), "resolution": resolution}
        return load_pretrained(ECVAEConfig.from_flat(values), "vae", AutoencoderEC)

    model, companions = load(finished)
    assert model.training and companions["energy_model"].training
    shutil.copytree(finished / "vae", tmp_path / "other_sizes")
    config = json.loads((finished / "vae" / "config.json").read_text())
    (tmp_path / "other_sizes" / "config.json").write_text(json.dumps(config | {"latent_channels": 3}))
    for path in (finished / "energy_model", finished / "checkpoint-8", tmp_path / "other_sizes", tmp_path):
        with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
            load(path)
    with pytest.raises(ValueError, match="--resolution is 32"):
        load(finished, 32)


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("RGBA", 3)])
def test_colour_images(mode, channels, tmp_path):
    data = write_images(tmp_path / "data" / "class", mode=mode, size=20, count=8)
    train("--train_data_dir", data.parent, "--output_dir", tmp_path / "out", *TINY, "--max_train_steps", 1)
    assert ECVAEPipeline.from_pretrained(tmp_path / "out").vae.config.in_channels == channels


def broken(images: Path) -> None:
    for path in sorted(images.iterdir())[12:]:
        path.write_bytes(path.read_bytes()[:40])


def emptied(images: Path) -> None:
    for path in images.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "change, extra, named",
    [
        (emptied, [], "--train_data_dir"),
        (broken, [], "12 of 24"),
        (None, ["--train_batch_size", 64], "--train_batch_size"),
        (None, ["--mixed_precision", "fp16"], "--mixed_precision"),
        (None, ["--block_out_channels", 8, 0], "block_out_channels"),
        (None, ["--energy_num_scales", 9], "num_scales"),
        (None, ["--initial_dual", 200], "initial_dual"),
        (None, ["--conditioning_weight", 6], "conditioning_weight"),
        (None, ["--in_channels", 3, "--pretrained_model_name_or_path", "{finished}"], "--in_channels"),
    ],
)
def test_refuses_before_it_writes(change, extra, named, finished, tmp_path):
    data = write_images(tmp_path / "data")
    if change is not None:
        change(data)
    extra = [finished if one == "{finished}" else one for one in extra]
    with pytest.raises(SystemExit, match=named):
        train("--train_data_dir", data, "--output_dir", tmp_path / "out", *TINY, *extra)
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_refused_and_stays(images, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(SystemExit, match="--output_dir"):
            train("--train_data_dir", images, "--output_dir", tmp_path, *TINY, "--max_train_steps", 1, *extra)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.txt", "years of work")]
