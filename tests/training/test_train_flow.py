"""`train_flow.py`. What it shares with `train_ecvae.py` is tested there, except for resuming."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import assert_same_start, assert_same_weights, metrics, train_tiny, without_end

from ecvae_diffusers import AutoencoderEC, ECFlowPipeline
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.training.train_flow import parse_args


train = functools.partial(train_tiny, script="train_flow")
WARNING = "A new flow is calibrated from its first step"
RESUMED = ("--resume_from_checkpoint", "latest")
CONSTANT = ("--lr_scheduler", "constant", "--checkpointing_steps", 2)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 4 steps with a checkpoint in its middle."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(images, output_dir, 4, *CONSTANT)
    return output_dir


def test_a_flow_learns_its_data_is_calibrated_and_samples(finished):
    lines = metrics(finished)
    assert lines[-1]["bits_per_dimension"] < lines[0]["bits_per_dimension"]
    assert all(line["constraint"] > 0 and line["tolerance"] > 0 for line in lines)
    assert lines[-1]["dual"] != lines[0]["dual"] and all(0 <= line["far_samples"] <= 1 for line in lines)
    pipe = ECFlowPipeline.from_pretrained(finished)
    assert [image.size for image in pipe(batch_size=3).images] == [(16, 16)] * 3
    assert pipe.energy_model is not None and pipe.scheduler is not None
    assert (finished / "samples").is_dir() and (finished / "chain").is_dir()


def test_a_run_cut_in_two_equals_a_run_in_one(finished, images, tmp_path):
    cut = without_end(finished, tmp_path / "cut", 4)
    train(images, cut, 4, *CONSTANT, *RESUMED)
    assert_same_weights(finished, cut)


def test_a_plain_flow_has_no_energy_model_and_is_evaluated_by_bits(images, tmp_path, caplog):
    arguments = ("--calibration", "none", "--evaluation_steps", 1, "--evaluation_samples", 24, "--no-use_ema")
    (line,) = train(images, tmp_path, 1, *arguments)
    assert "constraint" not in line and WARNING not in caplog.text
    pipe = ECFlowPipeline.from_pretrained(tmp_path)
    assert pipe.energy_model is None and pipe.scheduler is None
    found = json.loads((tmp_path / "evaluations.jsonl").read_text())
    pixels = np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(images.glob("*.png"))])
    real = torch.from_numpy(pixels)[:, None] / 127.5 - 1
    with torch.no_grad():
        noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
        bits = bits_per_dimension(pipe.flow.log_prob(dequantize(real, noise)), pipe.flow.num_latents).mean().item()
    assert found["bits_per_dimension"] == pytest.approx(bits, rel=1e-2)  # of other noise, and no other images


def test_bf16_rounds_the_first_step_of_float32(finished, images, tmp_path):
    half, plain = train(images, tmp_path, 2, *CONSTANT, "--mixed_precision", "bf16"), metrics(finished)
    for name in ("bits_per_dimension", "sample_spread"):
        assert half[0][name] == pytest.approx(plain[0][name], rel=1e-2)
    assert half[1]["gradient_norm"] != plain[1]["gradient_norm"] and half[1]["constraint"] > 0


def test_starts_from_a_pipeline_at_a_lower_rate_which_a_resumed_run_keeps(finished, images, tmp_path, caplog):
    """3e-3 of a new flow and 5e-4 of a pretrained one, which begins with its weights and is not initialized anew."""
    start = ("--pretrained_model_name_or_path", finished, "--lr_scheduler", "constant", "--checkpointing_steps", 1)
    train(images, tmp_path / "given", 1, *start, "--learning_rate", "1e-12", "--no-use_ema")
    assert_same_start(finished, tmp_path / "given", "flow/")
    out = tmp_path / "default"
    assert train(images, out, 1, *start)[0]["learning_rate"] == 5e-4
    # Resumed without the argument that its default came from: the weights are the checkpoint's.
    assert train(images, out, 2, *RESUMED)[1]["learning_rate"] == 5e-4 and WARNING not in caplog.text
    with pytest.raises(SystemExit, match="learning_rate"):
        train(images, out, 3, *RESUMED, "--learning_rate", 1e-3)
    # Where there is no checkpoint, it is a new run after all.
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    given = ["--train_data_dir", str(images), "--output_dir", str(out), *RESUMED]
    assert parse_args(given).optimizer.learning_rate == 3e-3
    train(images, tmp_path / "new", 1, *RESUMED)
    assert WARNING in caplog.text


def test_wrong_arguments_and_another_model_are_refused(images, tmp_path, capsys):
    AutoencoderEC(sample_size=16, in_channels=1, latent_channels=4, block_out_channels=(16, 16)).save_pretrained(
        tmp_path / "vae"
    )
    for arguments, named in (
        (["--num_levels", 5], "--num_levels"), (["--kl_weight", 1], "--kl_weight"),
        (["--pretrained_model_name_or_path", tmp_path / "vae"], "not FlowEC"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as refusal:
            train(images, tmp_path / "run", 1, *arguments)
        assert named in capsys.readouterr().err + str(refusal.value)
    assert not (tmp_path / "run").exists()
