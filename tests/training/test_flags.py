"""Flags that no other test gives: each does what its help says."""

import datasets
import numpy as np
import pytest
import torch
from training_runs import SCRIPTS, TINY, TINY_DECODER, metrics, run, succeed, write_autoencoder, write_images

from ecvae_diffusers import ECVAEPipeline


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_networks_optimizers_and_calibration(images, tmp_path):
    succeed(
        "--train_data_dir", images, "--output_dir", tmp_path, *TINY, "--max_train_steps", 6, "--log_steps", 1,
        "--layers_per_block", 2, "--energy_block_out_channels", 8, 16, 16, "--no-energy_spectral_norm",
        "--langevin_steps", 3, "--langevin_drift_step", 0.3, "--langevin_noise", 0.01,
        "--calibration_tolerance", 0.5, "--initial_dual", 3, "--max_dual", 4, "--dual_learning_rate", 5,
        "--adam_beta1", 0.5, "--adam_beta2", 0.95,
        "--learning_rate", 1e-3, "--energy_learning_rate", 2e-3, "--ema_max_decay", 0.5, "--divergence_guard",
        "--dataloader_num_workers", 1, "--checkpointing_steps", 6, "--kl_weight", 0.5,
    )  # fmt: skip
    records = metrics(tmp_path)
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 1]  # 24 images, batches of 8
    pipeline = ECVAEPipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config.layers_per_block == 2
    energy = pipeline.energy_model.config
    assert (list(energy.block_out_channels), energy.spectral_norm) == ([8, 16, 16], False)
    chain = pipeline.scheduler.config
    assert (chain.num_steps, chain.drift_step_size, chain.noise_scale) == (3, 0.3, 0.01)
    for record in records:
        assert record["tolerance"] == 0.5 and record["kl_weight"] == 0.5
        assert record["noise_floor"] == pytest.approx(256 * 3 * 0.01**2)
        assert 0 <= record["dual"] <= 4 and record["learning_rate"] == 1e-3 and record["energy_learning_rate"] == 2e-3
    assert records[0]["dual"] == pytest.approx(min(4, max(0, 3 + 5 * (records[0]["constraint"] / 0.5 - 1))), rel=1e-4)
    for file, betas in (("optimizer.bin", (0.5, 0.95)), ("optimizer_1.bin", (0.0, 0.99))):
        (group,) = torch.load(tmp_path / "checkpoint-6" / file, weights_only=True)["param_groups"]
        assert (group["betas"], group["weight_decay"]) == (betas, 0.0)


def test_the_average_forgets_at_its_decay(images, tmp_path):
    """Decay 0: the average is the last weights, which a run without one saves."""
    arguments = ["--train_data_dir", images, *TINY, "--max_train_steps", 4]
    succeed(*arguments, "--output_dir", tmp_path / "average", "--ema_max_decay", 0)
    succeed(*arguments, "--output_dir", tmp_path / "last", "--no-use_ema")
    succeed(*arguments, "--output_dir", tmp_path / "slow", "--ema_max_decay", 0.9)
    average, last, slow = (
        ECVAEPipeline.from_pretrained(tmp_path / name).vae.state_dict() for name in ("average", "last", "slow")
    )
    assert all(torch.allclose(average[key], last[key], atol=1e-7) for key in last)
    assert not all(torch.allclose(slow[key], last[key], atol=1e-7) for key in last)


def test_a_configuration_of_a_data_set(tmp_path):
    """A data set with two configurations, dark and bright images: the one that is named is trained on."""
    for name, level in (("dark", 20), ("bright", 230)):
        columns = datasets.Features({"image": datasets.Image()})
        pictures = [np.full((16, 16), level + i, np.uint8) for i in range(8)]
        (tmp_path / "data" / name).mkdir(parents=True)
        datasets.Dataset.from_dict({"image": pictures}, features=columns).to_parquet(
            tmp_path / "data" / name / "train.parquet"
        )
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: dark\n  data_files: dark/*.parquet\n"
        "- config_name: bright\n  data_files: bright/*.parquet\n---\n"
    )
    arguments = [
        "--dataset_name", tmp_path / "data", *TINY, "--max_train_steps", 1, "--log_steps", 1,
    ]  # fmt: skip
    errors = {}
    for name in ("dark", "bright"):
        succeed(*arguments, "--output_dir", tmp_path / name, "--dataset_config_name", name)
        errors[name] = metrics(tmp_path / name)[0]["reconstruction"]
    assert errors["dark"] != pytest.approx(errors["bright"], rel=1e-3)
    result = run(*arguments, "--output_dir", tmp_path / "none", "--dataset_config_name", "grey")
    assert result.returncode == 1 and "--dataset_name" in result.stderr and "grey" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "none").exists()


def write_stream(folder):
    """40 pictures in two files."""
    columns = datasets.Features({"image": datasets.Image()})
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part in range(2):
        pictures = [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(20)]
        datasets.Dataset.from_dict({"image": pictures}, features=columns).to_parquet(folder / f"train-{part}.parquet")


def test_a_decoder_is_calibrated_on_a_stream_in_its_own_channels(tmp_path):
    write_stream(tmp_path / "data")
    succeed(
        *TINY_DECODER, "--pretrained_model_name_or_path", write_autoencoder(tmp_path / "model"), "--dataset_name",
        tmp_path / "data", "--streaming", "--output_dir", tmp_path / "out", "--max_train_steps", 2, "--log_steps", 1,
        script=SCRIPTS / "calibrate_decoder.py",
    )  # fmt: skip
    assert [record["step"] for record in metrics(tmp_path / "out")] == [1, 2]


def test_a_stream_is_trained_on(tmp_path):
    write_stream(tmp_path / "data")
    arguments = [
        "--dataset_name", tmp_path / "data", "--streaming", "--in_channels", 3, *TINY,
        "--dataloader_num_workers", 2, "--log_steps", 1, "--checkpointing_steps", 4,
    ]  # fmt: skip
    succeed(*arguments, "--output_dir", tmp_path / "out", "--max_train_steps", 4)
    succeed(*arguments, "--output_dir", tmp_path / "out", "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert [record["step"] for record in metrics(tmp_path / "out")] == list(range(1, 9))
    assert ECVAEPipeline.from_pretrained(tmp_path / "out").vae.config.reconstruction_variance > 0
    result = run(*arguments, "--output_dir", tmp_path / "none", "--max_train_steps", 1, "--train_batch_size", 64)
    assert result.returncode == 1 and "--train_batch_size must be at most" in result.stderr
    assert not (tmp_path / "none").exists()
